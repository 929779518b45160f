# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics for `systemd-report` and its kin: the Varlink interface `io.systemd.Metrics`, in a socket of its own.

systemd has the interface from version 260 on (src/shared/varlink-io.systemd.Metrics.c). Each program has one socket in
`/run/systemd/report/`, by the name of its own interface; all its families begin with that name, or the reader drops
them. Both methods answer with one metric, or one family, in each reply (`more`).

Everybody may ask: of services it tells their names, and how many there are of what (redact.py has what is public).
Counters begin at 0 when the watcher starts.
"""

from __future__ import annotations

import bisect
import collections
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import trio
import varlink
from varlink.scanner import Interface

import watcher
from watcher.control.conversation import checked, converse
from watcher.control.peers import Turns
from watcher.control.transport import Connection, Request, listening
from watcher.images.store import Store
from watcher.images.store_names import DIGEST
from watcher.model import Event, Outcome, problem
from watcher.records import journal, schema
from watcher.records.schema import ErrorReply, ServiceStatus

DIRECTORY = "/run/systemd/report"
"""systemd makes it when it starts, from version 260 on."""

INTERFACE = "io.systemd.Metrics"
# `value` is "any" from 261 on, which the varlink package does not know; a reader does not look at its type here.
DESCRIPTION = f"""\
# Metrics APIs
interface {INTERFACE}

type MetricFamilyType (counter, gauge, string)

# Metrics, one in each reply
method List() -> (name: string, value: object, object: ?string, fields: ?object)

# Families of metrics, one in each reply
method Describe() -> (name: string, description: string, type: MetricFamilyType)

error NoSuchMetric ()
"""

BOUNDS_USEC = tuple(
    count * unit for unit in (1_000, 10_000, 100_000, 1_000_000, 10_000_000) for count in (1, 2, 5)
)
"""Upper ends of the classes in which latencies are counted; the last class has none."""

OBJECTS_MAX = 1000
"""Services that are told one by one: systemd-report takes 4096 metrics from all programs together."""

_EXPECTED_MORE = "org.varlink.service.ExpectedMore"


class Family(NamedTuple):
    """Metrics by one name.

    Attributes:
        kind: a `MetricFamilyType`.
    """

    name: str
    kind: str
    description: str


FAMILIES = tuple(
    Family(f"{schema.INTERFACE}.{name}", kind, description)
    for name, kind, description in (
        ("ServicesByState", "gauge", "Services that take part, by state"),
        ("ServicesOnTrial", "gauge", "Services whose stack has still to prove good"),
        ("ServicesPinned", "gauge", "Services that were put on a stack by hand, and stay on it"),
        ("ServiceState", "string", "State of a service"),
        ("ImagesKeptOut", "gauge", "Images that a service must not get again; only services with some"),
        ("OutcomesTotal", "counter", "Outcomes since the watcher started, by outcome"),
        ("LatencyTotal", "counter", "Stacks applied since the watcher started whose latency was measured"),
        ("LatencyUSecTotal", "counter", "Sum of the latencies, in microseconds"),
        ("LatencyUSecLast", "gauge", "The last latency, in microseconds"),
        ("LatencyUSecMax", "gauge", "The longest latency since the watcher started, in microseconds"),
        ("LatencyByUSecTotal", "counter", "Stacks applied with a latency of at most `le` microseconds"),
        ("StoreBytes", "gauge", "Bytes that the copies in the store take"),
        ("StoreCopies", "gauge", "Images and directory trees in the store"),
    )
)
"""In the order of their rows."""

_STATES = ("running", "stopped", "needs-restart", "template")


class Latencies:
    """How long something took, of all times since the start."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_USEC) + 1)
        self._sum = self._max = self._last = 0

    def add(self, usec: int) -> None:
        """Note one."""
        self._counts[bisect.bisect_left(BOUNDS_USEC, usec)] += 1
        self._sum += usec
        self._last, self._max = usec, max(self._max, usec)

    def rows(self, of: str) -> Iterator[dict[str, Any]]:
        """Its metrics; `of` is what was measured."""
        fields = {"of": of}
        total = sum(self._counts)
        yield _row("LatencyTotal", total, fields=fields)
        yield _row("LatencyUSecTotal", self._sum, fields=fields)
        if total:
            yield _row("LatencyUSecLast", self._last, fields=fields)
            yield _row("LatencyUSecMax", self._max, fields=fields)
        below = 0
        for count, bound in zip(self._counts, (*map(str, BOUNDS_USEC), "+Inf"), strict=True):
            below += count
            yield _row("LatencyByUSecTotal", below, fields={**fields, "le": bound})


class Metrics:
    """What is counted, and what is asked for when somebody wants to know.

    Args:
        services: all services as they are now.
    """

    def __init__(self, services: Callable[[], Awaitable[Sequence[ServiceStatus]]], store: Store) -> None:
        self._services, self._store = services, store
        self._outcomes: collections.Counter[Outcome] = collections.Counter()
        self._swaps, self._totals = Latencies(), Latencies()

    def tell(self, event: Event) -> None:
        """Count an outcome."""
        self._outcomes[event.outcome] += 1
        if event.outcome is Outcome.APPLIED:
            if event.swap_usec is not None:
                self._swaps.add(event.swap_usec)
            if event.total_usec is not None:
                self._totals.add(event.total_usec)

    async def rows(self) -> list[dict[str, Any]]:
        """All metrics, in the order of `FAMILIES`. Never none."""
        services = await self._services()
        found = [*_of_services(services)]
        found += [
            _row("OutcomesTotal", self._outcomes[one], fields={"outcome": one.value}) for one in Outcome
        ]
        found += [*self._totals.rows("drop-to-reload"), *self._swaps.rows("swap")]
        try:
            size = await trio.to_thread.run_sync(self._store.usage)
            copies = await trio.to_thread.run_sync(os.listdir, f"{self._store.state_directory}/store")
        except OSError as error:
            journal.log.debug(f"metrics without the store: {problem(error)}")
        else:
            found += [
                _row("StoreBytes", size),
                _row("StoreCopies", sum(map(bool, map(DIGEST.fullmatch, copies)))),
            ]
        order = {family.name: number for number, family in enumerate(FAMILIES)}
        return sorted(found, key=lambda row: order[row["name"]])


def _of_services(services: Sequence[ServiceStatus]) -> Iterator[dict[str, Any]]:
    states = collections.Counter(service.state for service in services)
    for state in _STATES:
        yield _row("ServicesByState", states[state], fields={"state": state})
    yield _row("ServicesOnTrial", sum(service.on_trial for service in services))
    yield _row("ServicesPinned", sum(service.pinned is not None for service in services))
    # Where there are too many, those that need a restart come first.
    for service in sorted(services, key=lambda one: one.state != "needs-restart")[:OBJECTS_MAX]:
        yield _row("ServiceState", service.state, service.service)
    kept_out = [service for service in services if service.quarantined]
    for service in kept_out[:OBJECTS_MAX]:
        yield _row("ImagesKeptOut", len(service.quarantined), service.service)


def _row(family: str, value: object, name: str = "", fields: dict[str, str] | None = None) -> dict[str, Any]:
    row = {"name": f"{schema.INTERFACE}.{family}", "value": value}
    if name:
        row["object"] = schema.utf8(name)
    return {**row, "fields": fields} if fields else row


async def serve(metrics: Metrics, directory: str = DIRECTORY) -> None:
    """Serves until cancelled; returns at once where systemd has no such directory, or it cannot be written to."""
    if not os.path.isdir(directory):
        return
    server = _Server(metrics)
    try:
        with listening(Path(directory), schema.INTERFACE) as made:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(made))
            await converse(listener, server.answer_calls, "metrics socket")
    except* OSError as errors:  # the nursery of connections puts one into a group
        journal.log.warning(f"no metrics for systemd-report: {directory}: {problem(errors.exceptions[0])}")


class _Server:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._turns = Turns()
        self._service = varlink.Service(
            vendor="confext-watcher", product="confext-watcher", version=watcher.__version__
        )
        self._service.interfaces[INTERFACE] = Interface(DESCRIPTION)

    async def answer_calls(self, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            async with self._turns.one_for(connection.peer):
                request = Request.parse(message)
                reply = await self._reply(request)
            if not request.oneway:
                await connection.send(reply)

    async def _reply(self, request: Request) -> bytes:
        """All replies to a call. No exception leaves here."""
        try:
            name, _ = checked(self._service, request)
            if not request.method.startswith(f"{INTERFACE}."):
                return b"".join(self._service.handle(request.raw))
            if not request.more:
                return _encoded({"error": _EXPECTED_MORE, "parameters": {}})
            if name == "Describe":
                return _replies([_described(family) for family in FAMILIES])
            return _replies(await self._metrics.rows())
        except varlink.VarlinkError as error:
            return _encoded({"error": error.error(), "parameters": error.parameters()})
        except ErrorReply as error:  # the ledger cannot be read: its reason is not for everybody
            journal.log.debug(f"metrics socket: {error}")
            return _encoded({"error": error.name, "parameters": {}})
        except Exception:  # noqa: BLE001 -- it is logged as a bug, and the client gets an error
            journal.log.exception(f"metrics socket: {request.method} failed by a mistake in the program")
            return _encoded({"error": f"{INTERFACE}.NoSuchMetric", "parameters": {}})


def _described(family: Family) -> dict[str, Any]:
    return {"name": family.name, "description": family.description, "type": family.kind}


def _replies(all_parameters: Sequence[dict[str, Any]]) -> bytes:
    """One reply for each, all but the last with `continues`."""
    *first, last = all_parameters
    replies = [_encoded({"parameters": one, "continues": True}) for one in first]
    return b"\0".join((*replies, _encoded({"parameters": last})))


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
