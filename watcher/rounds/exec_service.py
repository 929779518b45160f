# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher exec`: start a program in a mount namespace of its own, already on its stack, and register it.

The program becomes this very process: no supervisor stays in between; PID, signals and exit status are its own. No
daemon is needed to start it. `exec` uses the same admission, store and slots as the daemon, which takes over as soon as
it sees the registration.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace

from watcher.images import tries
from watcher.images.admission import Admission, host
from watcher.images.store import Store
from watcher.managers.base import slots_of, trust_of
from watcher.managers.registration import (
    Registration,
    ServiceOptions,
    register,
    registered,
    services_directory,
    unregister,
)
from watcher.model import Later, Refused, Stack, problem, shown
from watcher.mounts import syscalls
from watcher.mounts.etc import Moved
from watcher.mounts.process import Gone, Process, may_mount, namespace_id, shares_host, start_time
from watcher.mounts.swap import swap
from watcher.mounts.workers import HostNamespace, MountWorkers
from watcher.records import durable, journal
from watcher.records.ledger import LedgerError, Reader
from watcher.records.schema import Quarantined, utf8
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.rounds.desired import Desired, Given, find, newest_whole
from watcher.rounds.state import CountedTries, Trial, Trials
from watcher.settings.config import Settings
from watcher.watch.offload import comes_back

_ANSWER_SEC = 5.0
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
    with (
        MountWorkers(1, privileged=may_mount()) as workers,
        Store(
            settings.state_directory, settings.store_max, settings.image_max, settings.keep_stacks
        ) as store,
    ):
        stack = _admit(settings, store, workers, options, answers=answers)
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
                _swap(store, workers, namespace, _admit(settings, store, workers, options, answers=answers))
        finally:
            os.close(namespace)


def _swap(store: Store, workers: MountWorkers, namespace: int, stack: Stack) -> None:
    copies = {layer.digest: store.copy(layer) for layer in stack.layers}
    workers.submit(swap, workers, namespace, stack, copies).result()


def _admit(
    settings: Settings, store: Store, workers: MountWorkers, options: ExecOptions, *, answers: bool
) -> Stack:
    """The stack that the service starts on: its slots are set to it."""
    if not answers:
        what = f"what it is to be given does not answer within {_ANSWER_SEC:g} s (a file system that hangs?)"
        journal.log.warning(f"{options.name}: starts on its last accepted stack: {what}")
        with store.using():
            return newest_whole(store, slots_of(options.name, "standalone"))
    _mention_absent(options)
    trials, counted = Trials(settings.state_directory), CountedTries(settings.state_directory)
    with store.using():
        try:
            desired = _find(settings, Admission(store, workers), store, trials, options)
        except LedgerError as error:
            journal.log.warning(f"{options.name}: starts on its last accepted stack: {error}")
            return newest_whole(store, slots_of(options.name, "standalone"))
        for remark in desired.look.remarks:
            if remark.level != "debug":
                journal.say(remark)
        for passed in desired.passed:
            journal.log.warning(
                f"{options.name}: {shown(passed.candidate.path)} passed over: {passed.reason}"
            )
        if desired.new and desired.current.layers and _is_tried_by_the_daemon(options):
            return desired.staying().stack
        stack = _on_trial(trials, counted, options, desired) if desired.new else desired.stack
        try:
            entries = [pick.entry for pick in desired.look.picks]
            store.accept(slots_of(options.name, "standalone"), stack, entries, [trials.directory])
            counted.end(options.name)
        except Later as error:
            journal.log.warning(f"{options.name}: starts on its last accepted stack: {error}")
            return desired.whole
    if desired.fallen and not stack.layers:
        journal.log.error(f"{options.name}: nothing in the store is whole, it starts with the host's /etc")
    return stack


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


def _find(
    settings: Settings, admission: Admission, store: Store, trials: Trials, options: ExecOptions
) -> Desired:
    """What the service should have.

    Raises:
        LedgerError: what must not get in is not known, and the service has an accepted stack to start on.
    """
    name, slots = options.name, slots_of(options.name, "standalone")
    kept_out: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    pin = None
    try:
        ledger = Reader(settings.state_directory)
        quarantined = ledger.quarantined()
        kept_out = {one.digest: one.reason for one in quarantined if one.service == utf8(name)}
        elsewhere = _kept_out_elsewhere(settings, options, quarantined)
        pin = ledger.pins().get(utf8(name))
    except LedgerError as error:
        if store.accepted(slots) is not None:
            raise
        # It never ran, so nothing has proved bad with it.
        journal.log.warning(f"{name}: starts without regard to history: {error}")
    own = options.own_settings
    given = Given(
        slots,
        options.declared,
        host(),
        kept_out,
        elsewhere,
        pin,
        trials.of(name),
        own.image_policy,
        trust_of(own, "standalone"),
    )
    return find(store, admission, given)


def _kept_out_elsewhere(
    settings: Settings, options: ExecOptions, quarantined: Sequence[Quarantined]
) -> dict[str, str]:
    """With `Rollout=rolling`: what proved bad for others with the same setting, with the reasons."""
    found: dict[str, str] = {}
    if options.own_settings.rollout == "rolling":
        for one in quarantined:
            other = _registered(settings, one.service) if one.service != utf8(options.name) else None
            if other is not None and other.own_settings.rollout == "rolling":
                found[one.digest] = f"it did not do on {one.service}: {one.reason}"
    return found


def _is_tried_by_the_daemon(options: ExecOptions) -> bool:
    """Whether a new stack has to wait until the program runs: for its check, or for its turn."""
    own = options.own_settings
    return bool(own.check) or own.rollout == "rolling"


def _on_trial(trials: Trials, counted: CountedTries, options: ExecOptions, desired: Desired) -> Stack:
    """A new stack, which the daemon judges when the program runs."""
    name, trust = options.name, trust_of(options.own_settings, "standalone")
    try:
        stack = counted.begin(name, desired.stack, desired.current, tries.unseen, trust)
    except FileNotFoundError:
        stack = desired.stack  # another service's attempt has just renamed it
    trials.begin(name, Trial(stack.id))
    return stack
