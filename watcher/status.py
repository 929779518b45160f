# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher status`: the truth, read from the kernel; no daemon is needed, and none is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

from watcher.config import Settings
from watcher.ledger import Reader
from watcher.managers.standalone import Registration, registered, registrations
from watcher.model import Event, Kind, Layer, Stack
from watcher.mounts.table import Table
from watcher.process import Gone, Process
from watcher.schema import ServiceNotFound, ServiceStatus, text
from watcher.stacks import Damaged, Stacks


def standalone(settings: Settings, service: str | None = None) -> list[ServiceStatus]:
    """The standalone services, or one of them.

    Raises:
        ServiceNotFound: it is not registered.
        PermissionError: this user may not look at its process.
        LedgerError: the history is there and cannot be read.
    """
    newest = Reader(settings.state_directory).newest()
    names = [name for name in registrations(settings.runtime_directory) if service in (None, name)]
    found = []
    for name in names:
        with contextlib.suppress(ValueError):
            registration = registered(settings.runtime_directory, name)
            if registration is not None:
                found.append(_status(settings, registration, newest))
    if service is not None and not found:
        raise ServiceNotFound(service)
    return found


def _status(settings: Settings, registration: Registration, newest: Mapping[str, Event]) -> ServiceStatus:
    name = registration.name
    stacks = _kept(settings, name)
    last = newest.get(text(name))
    status = ServiceStatus(
        service=name,
        manager="standalone",
        state="stopped",
        accepted=stacks[0].id if stacks else "",
        last=last,
    )
    try:
        with Process(registration.pid, registration.started) as main:
            mounted = Table(main.mountinfo()).mounted()
    except Gone:
        return status
    layers = tuple(_layer(one.name, one.version, one.digest, stacks) for one in mounted.layers or ())
    stack = Stack(layers).id
    since = last.when if last is not None and last.stack == stack else None
    return replace(status, state="running", pid=registration.pid, stack=stack, layers=layers, since=since)


def _kept(settings: Settings, name: str) -> list[Stack]:
    """The accepted stacks of a service, newest first: they know the whole names of what the kernel shows cut."""
    stacks = Stacks(settings.state_directory)
    with contextlib.suppress(Damaged):
        return [accepted.stack for accepted in stacks.history(name)]
    return []


def _layer(name: str, version: str, digest: str, stacks: list[Stack]) -> Layer:
    for stack in stacks:
        for layer in stack.layers:
            if layer.digest == digest:
                return layer
    return Layer("", name, version, digest, Kind.IMAGE, "")
