# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service runs on, as the kernel's mount table has it; with the daemon or without it."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from watcher.images.stacks import Stacks
from watcher.images.unit_links import UnitLinks
from watcher.managers.base import slots_of
from watcher.managers.registration import registered, registrations
from watcher.managers.systemd.unit_facts import policy_of, settings_of
from watcher.managers.systemd.unit_files import Index, is_service
from watcher.model import Event, Kind, Layer, Outcome, Setting, Stack, problem
from watcher.mounts.process import Gone, Process, shares_host
from watcher.mounts.table import Mounted, Table
from watcher.records import journal
from watcher.records.ledger import Reader
from watcher.records.schema import Drift, Quarantined, ServiceNotFound, ServiceStatus, utf8
from watcher.records.state import Accepted, Damaged, Quarantine, State
from watcher.rounds.image_policies import demands, not_allowed
from watcher.settings.config import ServiceSettings, Settings
from watcher.settings.image_policy import Demand

LOOKED_BACK = 50
"""So many outcomes are looked through for one that is not about a file that is gone."""


def without_daemon(settings: Settings, service: str | None = None) -> list[ServiceStatus]:
    """The services, or one of them, without asking the daemon.

    Raises:
        ServiceNotFound: it was never started here.
        PermissionError: this user may not look at its process.
        LedgerError: the history is there and cannot be read.
    """
    ledger = Reader(settings.state_directory)
    newest = ledger.newest()
    found, names = [], []
    with contextlib.ExitStack() as held:
        for name, manager, main, own, policy in known_services(settings, held):
            names.append(name)
            if service in (None, name, name.removesuffix(".service")):
                state = state_of(settings.state_directory, name, manager)
                known = newest.get(utf8(name)), state, ledger.placed, own
                policies = demands(settings, own, policy)
                one = of_service(settings.state_directory, name, manager, main, *known, policies=policies)
                found.append(without_gone(one, functools.partial(ledger.history, name, LOOKED_BACK)))
    if service is not None and not found:
        raise ServiceNotFound.among(service, names)
    return sorted(found, key=lambda one: one.service)


def known_services(
    settings: Settings, held: contextlib.ExitStack
) -> Iterator[tuple[str, str, Process | None, ServiceSettings, Setting | None]]:
    """Name, manager, main process, settings and `ExtensionImagePolicy=` of every service that is registered, and of
    units that have slots."""
    standalone = set()
    for name in registrations(settings.runtime_directory):
        with contextlib.suppress(ValueError):
            registration = registered(settings.runtime_directory, name)
            if registration is not None:
                standalone.add(name)
                main = _hold(held, registration.pid, registration.started, registration.namespace)
                yield name, "standalone", main, registration.own_settings, None
    if os.path.isdir("/run/systemd/system") and os.path.isdir(f"{settings.state_directory}/units"):
        units = sorted(filter(is_service, set(UnitLinks(settings.state_directory).units()) - standalone))
        index = Index()
        for name, pid in _main_pids(units).items():
            unit = index.unit(name)
            own = settings_of(index, unit)[0] if unit else ServiceSettings()
            policy = policy_of(index, unit) if unit else None
            yield name, "systemd", _hold(held, pid) if pid else None, own, policy


def _hold(
    held: contextlib.ExitStack, pid: int, started: int | None = None, home: tuple[int, int] | None = None
) -> Process | None:
    try:
        return held.enter_context(Process(pid, started, home))
    except Gone:
        return None


def _main_pids(units: Sequence[str]) -> dict[str, int]:
    """Main PIDs by unit, 0 for one that does not run; empty if systemd does not answer."""
    if not units:
        return {}
    words = ["systemctl", "show", "--property=Id,MainPID", "--", *units]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        journal.log.warning(f"systemd cannot be asked about its units: {problem(error)}")
        return {}
    blocks = (dict(line.split("=", 1) for line in block.splitlines()) for block in answer.split("\n\n"))
    return {block["Id"]: int(block["MainPID"]) for block in blocks if "MainPID" in block}


def of_service(
    state_directory: str,
    name: str,
    manager: str,
    main: Process | None,
    last: Event | None,
    state: State,
    placed: Callable[[str, str], int | None],
    settings: ServiceSettings,
    invocation: str = "",
    policies: Sequence[Demand] = (),
) -> ServiceStatus:
    """One service.

    Args:
        main: its main process, None if it does not run.
        last, placed: what the ledger knows; `placed(service, stack)` is when the service last got the stack, None where
            that is not known.
        state: what is decided about it.
        settings: its own.
        invocation: see `Service`; "" where that is not known.
        policies: which images may get in.
    """
    kept = kept_stacks(state_directory, slots_of(name, manager))
    stacks = [accepted.stack for accepted in kept]
    status = ServiceStatus(
        service=name,
        manager=manager,
        state="template" if manager == "systemd" and "@." in name else "stopped",
        accepted=stacks[0].id if stacks else "",
        last=last,
        pinned=state.pin,
        quarantined=quarantined(name, state.quarantine),
        settings=settings.written,
        not_allowed=not_allowed(policies, stacks[0]) if stacks else (),
        drifted=drift(state),
    )
    if main is None:
        return status
    try:
        if shares_host(main.pid) or not main.at_home():
            waits = bool(stacks and stacks[0].layers)  # a restart brings something
            return replace(status, state="needs-restart" if waits else "running", pid=main.pid)
        mounted = Table(main.read("mountinfo")).mounted()
    except (Gone, FileNotFoundError):
        return status
    layers = shown_layers(mounted, stacks)
    stack = Stack(layers).id
    # `exec` writes no history when it starts a service on a stack: then the time of acceptance counts.
    accepted = (one.when for one in kept if one.stack.id == stack)
    since = placed(name, stack) or next(accepted, None)
    trial = on_trial(state, stack, invocation)
    return replace(
        status, state="running", pid=main.pid, stack=stack, layers=layers, since=since, on_trial=trial
    )


def on_trial(state: State, stack: str, invocation: str) -> bool:
    """Whether a service that runs on a stack has still to prove it good; also at its first start on it, if only a
    reload has seen it."""
    trial, reloaded = state.trial, state.untried.get(stack)
    if stack != state.accepted.stack.id:
        return False
    new = trial is not None and trial.stack == stack and trial.verdict is None
    return new or (reloaded is not None and invocation not in ("", reloaded))


def drift(state: State) -> tuple[Drift, ...]:
    """Files of the host that have changed below the accepted stack."""
    return tuple(Drift(f"/etc/{one.path}", one.image, one.change) for one in state.drifted)


def about(status: ServiceStatus) -> set[str]:
    """The files that are said to be kept out or refused."""
    found = {one.source for one in status.quarantined}
    if status.last is not None and status.last.outcome in (Outcome.REFUSED, Outcome.INCOMPLETE):
        found.add(status.last.source)
    return found - {""}


def without_gone(status: ServiceStatus, history: Callable[[], Sequence[Event]]) -> ServiceStatus:
    """A status that says nothing about files that are not there any more. Blocks, on where these come from."""
    gone = {source for source in about(status) if not os.path.lexists(source)}
    if not gone:
        return status
    stays = tuple(one for one in status.quarantined if one.source not in gone)
    last = status.last
    if last is not None and last.source in gone and last.source in about(replace(status, quarantined=())):
        last = next((one for one in history() if not _is_of_gone(one)), None)
    return replace(status, quarantined=stays, last=last)


def _is_of_gone(event: Event) -> bool:
    refused = event.outcome in (Outcome.REFUSED, Outcome.INCOMPLETE)
    return refused and event.source != "" and not os.path.lexists(event.source)


def quarantined(name: str, entries: Sequence[Quarantine]) -> tuple[Quarantined, ...]:
    """What a service must not get again, oldest first. What is kept out for the moment is not told."""
    stays = (one for one in entries if not one.for_now)
    return tuple(Quarantined(name, one.digest, one.reason, one.when, one.source) for one in stays)


def shown_layers(mounted: Mounted, stacks: Sequence[Stack]) -> tuple[Layer, ...]:
    """The layers that a mount table shows, bottom to top.

    A stack that systemd mounted has no names in it. Then the service was started on its slots, which are the newest
    accepted stack, unless that waits for a swap. subject.py finds that out: it mounts all stacks that are kept, which
    is too much for hundreds of services, and for one who asks because mounting hangs.
    """
    if mounted.layers is None:
        return stacks[0].layers if stacks else ()
    known = {layer.digest: layer for stack in reversed(stacks) for layer in reversed(stack.layers)}
    return tuple(
        known.get(one.digest) or Layer("", one.name, one.version, one.digest, Kind.IMAGE, "")
        for one in mounted.layers
    )


def _stacks(state_directory: str) -> Stacks | None:
    """None: there are none, and to make the directory is not for one who may only look."""
    return Stacks(state_directory) if os.path.isdir(f"{state_directory}/stacks") else None


def state_of(state_directory: str, name: str, manager: str) -> State:
    """The record of a service, as it is on the disk."""
    stacks = _stacks(state_directory)
    try:
        return (stacks and stacks.read(slots_of(name, manager))) or State()
    except Damaged as error:
        journal.log.warning(f"{error}; the daemon makes it anew", service=name)
        return State()


def kept_stacks(state_directory: str, slots: str) -> tuple[Accepted, ...]:
    """The accepted stacks kept under a name, newest first. They have the whole names, which the mount table cuts."""
    stacks = _stacks(state_directory)
    return stacks.history(slots) if stacks else ()
