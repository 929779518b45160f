# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher exec`: start a program in a mount namespace of its own, already on its stack, and register it.

The program becomes this very process: no supervisor stays in between; PID, signals and exit status are its own. No
daemon is needed to start it. `exec` uses the same admission, store and slots as the daemon, which takes over as soon as
it sees the registration.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace

from watcher.images import tries
from watcher.images.admission import Admission
from watcher.images.made_for import host
from watcher.images.store import Store
from watcher.images.upgrade import upgrade
from watcher.images.verified_mounts import VerifiedMounts
from watcher.managers.base import slots_of, trust_of
from watcher.managers.registration import (
    Registration,
    ServiceOptions,
    register,
    registered,
    registrations,
    services_directory,
    unregister,
)
from watcher.model import Later, Refused, Settling, Stack, problem, shown
from watcher.mounts import syscalls
from watcher.mounts.etc import Moved
from watcher.mounts.process import Gone, Process, may_mount, namespace_id, shares_host, start_time
from watcher.mounts.swap import swap
from watcher.mounts.workers import HostNamespace, MountWorkers
from watcher.records import durable, journal
from watcher.records.ledger import Reader
from watcher.records.state import State
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.rounds import changes, decide, messages
from watcher.rounds.desired import Desired, Given, find, newest_whole
from watcher.rounds.facts import Facts
from watcher.rounds.image_policies import demands
from watcher.rounds.patience import limits
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new
from watcher.watch.comes_back import comes_back
from watcher.watch.writers import Writers

# Outcomes that are read to make a lost record anew.
_HISTORY_READ = 1000

_ANSWER_SEC = 5.0
# Beyond `SettleTreeSec=`: a tree that still changes then is none that was finished before the start.
_GRACE_SEC = 1.0
_TICK_SEC = 0.01
"""If what is dropped has not answered by then, the program starts on what was accepted last."""


class CannotStart(Exception):
    """The program is not started; `str()` is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecOptions(ServiceOptions):
    """What `exec` was told; paths as given."""

    program: tuple[str, ...]


def launch(settings: Settings, options: ExecOptions) -> None:
    """Start the program in place of this process; does not return.

    Raises:
        CannotStart: and nothing was changed but the service's slots.
    """
    options = _absolute(options)
    _require_ended(_registered(settings, options.name))
    try:
        durable.make(settings.runtime_directory)
        # Forks, so before there are threads.
        answers = comes_back(lambda: _look(options), _ANSWER_SEC)
        _enter_stack(settings, options, answers=answers)
    except (OSError, Refused, Later, Moved, HostNamespace) as error:
        raise CannotStart(f"{options.name}: its stack cannot be put in place: {problem(error)}") from error
    with _registering(settings):
        # Again: another `exec` for the same service, started at the same time, may have been quicker.
        former = _registered(settings, options.name)
        _require_ended(former)
        register(settings.runtime_directory, _registration(options))
    # Python ignores these two signals, and execve(2) keeps what is ignored.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(options.program[0], options.program)
    except OSError as error:
        if former is None:
            unregister(settings.runtime_directory, options.name)
        else:
            register(settings.runtime_directory, former)
        raise CannotStart(f"{shown(options.program[0])} cannot be executed: {error.strerror}") from error


def _registration(options: ExecOptions) -> Registration:
    """Of this process."""
    return Registration(
        pid=os.getpid(),
        started=start_time(os.getpid()),
        namespace=namespace_id("/proc/self/ns/mnt"),
        user_namespace=namespace_id("/proc/self/ns/user"),
        environment=tuple(f"{name}={value}" for name, value in os.environ.items()),
        **{field.name: getattr(options, field.name) for field in fields(ServiceOptions)},
    )


@contextmanager
def _registering(settings: Settings) -> Iterator[None]:
    """No other `exec` registers a service meanwhile."""
    # Not the directory itself: other users can open that, and so lock it.
    path = os.path.join(services_directory(settings.runtime_directory), ".lock")
    lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _absolute(options: ExecOptions) -> ExecOptions:
    """With absolute paths: the daemon has another working directory."""

    def made(paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            ("-" if path.startswith("-") else "") + os.path.abspath(path.removeprefix("-")) for path in paths
        )

    return replace(
        options,
        confext_dirs=made(options.confext_dirs),
        images=made(options.images),
        directories=made(options.directories),
    )


def _registered(settings: Settings, name: str) -> Registration | None:
    try:
        return registered(settings.runtime_directory, name)
    except (OSError, ValueError):
        return None  # what lies there is no registration, and is replaced


def _require_ended(other: Registration | None) -> None:
    if other is None:
        return
    try:
        Process(other.pid, other.started).close()
    except Gone:
        return
    raise CannotStart(f"{other.name} is running already, as process {other.pid}")


def _enter_stack(settings: Settings, options: ExecOptions, *, answers: bool) -> None:
    """Move this process into a mount namespace of its own with the service's stack on `/etc`."""
    for remark in upgrade(settings.state_directory, settings.runtime_directory):
        journal.say(remark)
    mounts = VerifiedMounts()
    with (
        MountWorkers(privileged=may_mount(), fsmount=mounts.fsmount) as workers,
        Store(
            settings.state_directory,
            settings.store_max,
            settings.image_max,
            settings.keep_stacks,
            functools.partial(Reader(settings.state_directory).history, limit=_HISTORY_READ),
        ) as store,
    ):
        admission = Admission(store, workers, mounts=mounts, writers=Writers(settings.state_directory))
        stack = _admit(settings, store, admission, options, answers=answers)
        # As systemd does it: what the host mounts arrives here, nothing goes back, and namespaces that the program
        # makes for its children follow. If another service runs `exec`, its swaps must not arrive: each would bring a
        # stack beneath this one and lift this one off.
        arrives = syscalls.MS_SLAVE if shares_host("self") else syscalls.MS_PRIVATE
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | arrives)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SHARED)
        namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                _swap(store, workers, namespace, stack)
            except (OSError, Refused, Later):
                store.doubt(slots_of(options.name, "standalone"))
                if store.is_whole(stack):
                    raise
                _swap(store, workers, namespace, _admit(settings, store, admission, options, answers=answers))
        finally:
            os.close(namespace)


def _swap(store: Store, workers: MountWorkers, namespace: int, stack: Stack) -> None:
    copies = {layer.digest: store.copy(layer) for layer in stack.layers}
    workers.submit(swap, workers, namespace, stack, copies).result()


def _admit(
    settings: Settings, store: Store, admission: Admission, options: ExecOptions, *, answers: bool
) -> Stack:
    """The stack that the service starts on: its slots are set to it."""
    slots = slots_of(options.name, "standalone")
    if not answers:
        what = f"what it is to be given does not answer within {_ANSWER_SEC:g} s (a file system that hangs?)"
        journal.log.warning(f"{options.name}: starts on its last accepted stack: {what}")
        with store.using():
            return newest_whole(store, slots, store.state(slots))
    _mention_absent(options)
    if why := why_nothing_new():
        journal.log.warning(f"{options.name}: starts on what it had, and gets nothing new: {why}")
    with store.using():
        desired = _find_complete(settings, admission, store, options)
        _say(options, desired)
        try:
            stack = _accept(store, options, desired)
        except Later as error:
            journal.log.warning(f"{options.name}: starts on its last accepted stack: {error}")
            return desired.fallback
    if stack.id in desired.damaged or (desired.damaged and not stack.layers):
        journal.log.error(f"{options.name}: nothing in the store is whole, it starts with the host's /etc")
    return stack


def _say(options: ExecOptions, desired: Desired) -> None:
    for remark in desired.look.remarks:
        if remark.level != "debug":
            journal.say(remark)
    for passed in desired.passed:
        journal.log.warning(f"{options.name}: {shown(passed.candidate.path)} passed over: {passed.reason}")


def _accept(store: Store, options: ExecOptions, desired: Desired) -> Stack:
    """The steps of a round before the service runs: the daemon takes the others.

    Raises:
        Later: the stack cannot be accepted now.
    """
    slots, own = slots_of(options.name, "standalone"), options.own_settings
    state, first = store.state(slots), True
    while True:
        facts = Facts(
            now=messages.now(),
            state=state,
            first=first,
            running=False,
            explained=False,
            no_shadow="it is about to be started",
            has_check=bool(own.check),
            rollback=own.rollback,
            rolling=own.rollout == "rolling",
            wanted=desired.wanted,
            fallback=desired.fallback,
            pinned=desired.pinned,
            damaged=desired.damaged,
            entries=desired.entries,
            mounted=desired.mounted,
            nothing_new=why_nothing_new(),
        )
        if facts.rolling and facts.accepted.layers:
            facts = replace(facts, waits="the daemon decides when it is its turn (Rollout=rolling)")
        step = decide.decide(facts)
        match step:
            case decide.LetIn():
                state = store.change(slots, functools.partial(changes.let_in, step, ""))
            case decide.Count():
                desired, state = _count(store, desired, facts, options), store.state(slots)
            case decide.Accept():
                accepted = functools.partial(_accepted, step, facts)
                stack = store.accept(slots, step.stack, facts.listed, accepted).accepted.stack
                store.settle()  # the daemon will tell of it
                return stack
            case _:
                return facts.accepted
        first = False


def _accepted(step: decide.Accept, facts: Facts, state: State) -> State:
    """The state with a newly accepted stack, of which nothing is said: a start by `exec` is no outcome."""
    return replace(changes.accept(step, facts, "", (), state), replaced=None)


def _count(store: Store, desired: Desired, facts: Facts, options: ExecOptions) -> Desired:
    slots, trust = slots_of(options.name, "standalone"), trust_of(options.own_settings, "standalone")
    try:
        return changes.count(store, desired, facts, slots, options.name, tries.unseen, trust)
    except FileNotFoundError:  # another service's attempt has just renamed it
        counted = tries.noted(desired.wanted, facts.accepted)
        store.change(slots, lambda state: replace(state, counted=counted))
        return desired


def _look(options: ExecOptions) -> None:
    """Follow every path that a start follows, and read a little of each image."""
    with StrictModes(trust_of(options.own_settings, "standalone")) as modes:
        for pick in scan.look(options.declared, modes=modes).picks:
            for candidate in pick.candidates:
                with suppress(OSError, Refused):
                    found = modes.open(candidate.path)
                    if found.unsafe is None and stat.S_ISREG(found.status.st_mode):
                        fd = os.open(f"/proc/self/fd/{found.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                        os.pread(fd, 1, 0)


def _mention_absent(options: ExecOptions) -> None:
    for directory in options.confext_dirs:
        if not os.path.lexists(directory):
            journal.log.info(f"{options.name}: {shown(directory)} does not exist yet, it is watched for")


def _find_complete(settings: Settings, admission: Admission, store: Store, options: ExecOptions) -> Desired:
    """`_find()`, again once the trees are complete of which the service has nothing yet.

    Who makes a tree and starts the service on it would else get it a moment later, by a reload.
    """
    slots = slots_of(options.name, "standalone")
    quiet = limits(settings, options.own_settings).tree_usec / 1e6
    deadline = time.monotonic() + quiet + _GRACE_SEC
    said = False
    while True:
        desired = _find(settings, admission, store, options)
        has = {layer.slot for layer in store.state(slots).accepted.stack.layers}
        waiting = [one for one in desired.passed if isinstance(one.reason, Settling) and one.slot not in has]
        if not waiting or desired.look_again is None or time.monotonic() >= deadline:
            return desired
        if not said:
            said, path = True, shown(waiting[0].candidate.path)
            journal.log.info(f"{options.name}: waits until {path} is complete: {waiting[0].reason}")
        time.sleep(max(min(desired.look_again, deadline - time.monotonic()), _TICK_SEC))


def _find(settings: Settings, admission: Admission, store: Store, options: ExecOptions) -> Desired:
    """What the service should have. What it is kept out of for the moment, this start tries again."""
    slots, own = slots_of(options.name, "standalone"), options.own_settings
    state = store.state(slots)
    if state.undoing is None:
        state = replace(state, quarantine=tuple(one for one in state.quarantine if not one.for_now))
    given = Given(
        slots,
        options.declared,
        host(),
        state,
        _kept_out_elsewhere(settings, store, options),
        demands(settings, own),
        trust_of(own, "standalone"),
        limits(settings, own),
    )
    return find(store, admission, given)


def _kept_out_elsewhere(settings: Settings, store: Store, options: ExecOptions) -> dict[str, str]:
    """With `Rollout=rolling`: what proved bad for others with the same setting, with the reasons."""
    found: dict[str, str] = {}
    if options.own_settings.rollout == "rolling":
        for name in registrations(settings.runtime_directory):
            other = _registered(settings, name) if name != options.name else None
            if other is not None and other.own_settings.rollout == "rolling":
                state = store.state(slots_of(name, "standalone"))
                found |= {key: f"it did not do on {name}: {why}" for key, why in state.kept_out.items()}
    return found
