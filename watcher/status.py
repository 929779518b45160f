# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service runs on: the truth, read from the kernel. With the daemon or without it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from watcher.config import Settings
from watcher.ledger import Reader
from watcher.managers.standalone import registered, registrations
from watcher.model import Event, Kind, Layer, Stack
from watcher.mounts.table import Mounted, Table
from watcher.process import Gone, Process, namespace_id
from watcher.schema import Quarantined, ServiceNotFound, ServiceStatus, text
from watcher.stacks import Damaged, Stacks


def without_daemon(settings: Settings, service: str | None = None) -> list[ServiceStatus]:
    """The standalone services, or one of them, without asking the daemon.

    Raises:
        ServiceNotFound: it is not registered.
        PermissionError: this user may not look at its process.
        LedgerError: the history is there and cannot be read.
    """
    ledger = Reader(settings.state_directory)
    newest, pins, quarantined = ledger.newest(), ledger.pins(), ledger.quarantined()
    found = []
    for name in registrations(settings.runtime_directory):
        if service not in (None, name):
            continue
        with contextlib.suppress(ValueError), contextlib.ExitStack() as held:
            registration = registered(settings.runtime_directory, name)
            if registration is None:
                continue
            main = None
            with contextlib.suppress(Gone):
                main = held.enter_context(Process(registration.pid, registration.started))
            found.append(
                of_service(
                    settings.state_directory,
                    name,
                    "standalone",
                    main,
                    newest.get(text(name)),
                    pins.get(text(name)),
                    [one for one in quarantined if one.service == text(name)],
                )
            )
    if service is not None and not found:
        raise ServiceNotFound(service)
    return found


def of_service(
    state_directory: str,
    name: str,
    manager: str,
    main: Process | None,
    last: Event | None,
    pinned: str | None,
    quarantined: Sequence[Quarantined],
) -> ServiceStatus:
    """One service: `main` is its main process, None if it does not run; the rest comes from the ledger."""
    stacks = _kept(state_directory, name)
    status = ServiceStatus(
        service=name,
        manager=manager,
        state="stopped",
        accepted=stacks[0].id if stacks else "",
        last=last,
        pinned=pinned,
        quarantined=tuple(quarantined),
    )
    if main is None:
        return status
    try:
        if _shares_host(main):
            return replace(status, state="needs-restart", pid=main.pid)
        mounted = Table(main.mountinfo()).mounted()
    except (Gone, FileNotFoundError):
        return status
    layers = shown_layers(mounted, stacks)
    stack = Stack(layers).id
    since = last.when if last is not None and last.stack == stack else None
    return replace(status, state="running", pid=main.pid, stack=stack, layers=layers, since=since)


def _shares_host(main: Process) -> bool:
    try:
        return namespace_id(f"/proc/{main.pid}/ns/mnt") == namespace_id("/proc/1/ns/mnt")
    except PermissionError:  # in a user namespace: what is PID 1's cannot be ours
        return False


def shown_layers(mounted: Mounted, stacks: Sequence[Stack]) -> tuple[Layer, ...]:
    """The layers that a mount table shows, bottom to top.

    A stack that systemd mounted does not say what it is: the service was started on its slots, which is the first of
    the accepted stacks.
    """
    if mounted.layers is None:
        return stacks[0].layers if stacks else ()
    return tuple(_layer(one.name, one.version, one.digest, stacks) for one in mounted.layers)


def _kept(state_directory: str, name: str) -> list[Stack]:
    """The accepted stacks of a service, newest first: they know the whole names of what the kernel shows cut."""
    with contextlib.suppress(Damaged):
        return [accepted.stack for accepted in Stacks(state_directory).history(name)]
    return []


def _layer(name: str, version: str, digest: str, stacks: Sequence[Stack]) -> Layer:
    for stack in stacks:
        for layer in stack.layers:
            if layer.digest == digest:
                return layer
    return Layer("", name, version, digest, Kind.IMAGE, "")
