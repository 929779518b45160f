# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's control socket: Varlink, interface `io.confext.Watcher` (schema.py), under trio.

**What the varlink package does here, and what not.** Its `Service.handle()` is free of any transport, but it calls each
method as a plain function, and here nearly every answer has to be waited for: a rollback for as long as the service
reloads, `Wait` for hours. A thread for each call would make it fit, but could not be cancelled when the client goes
away, and a hundred waiting clients would be a hundred threads. So the package parses the interface description,
checks parameters against it and answers everything of `org.varlink.service`; the calls of our own interface are
dispatched here, to an async Backend.

**A client can hurt nobody but itself** (bounds: transport.py, peers.py): a connection is a task of its own, and
a client that does not take its reply, sends rubbish, or comes back a thousand times is only ever in its own way.

**Strangers are told less** (redact.py): each reply goes through `_Server._encoded()`, and nothing leaves another way.

**Going away.** A client that closes its connection during `Wait` ends it. A changing call is finished all the same:
nobody wants half a rollback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio
import varlink
from varlink.scanner import Interface

import watcher
from watcher.control import peers, redact
from watcher.control.peers import Peer, Quota, Readers, Turn, Turns
from watcher.control.transport import Connection, Request, listening
from watcher.model import Event, shown
from watcher.records import schema
from watcher.records.lean import structlog
from watcher.records.schema import (
    ErrorReply,
    Failed,
    NotPermitted,
    PlannedChange,
    Quarantined,
    ServiceStatus,
    TooManyCalls,
)

HISTORY_DEFAULT = 100
HISTORY_MAX = 1000
"""Events in one reply."""
REPLY_MAX = 2 * 1024 * 1024
"""Characters of events in one reply; JSON takes up to six bytes for one, and sd-varlink 16 MiB (schema.MESSAGE_MAX)."""

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

Tell = Callable[[Event], Awaitable[None]]


class Backend(Protocol):
    """What the daemon gives to be controlled by.

    Every method may raise a ErrorReply, which the client gets; anything else is logged as a bug, and the client gets
    Failed. When the server is stopped, calls in progress are cancelled: what must not be cut short (a swap) belongs
    into a task of the daemon's own.
    """

    async def status(self, service: str | None) -> Sequence[ServiceStatus]:
        """One service or all. Raises ServiceNotFound.

        Without outputs: those of hundreds of services would not fit into one reply.
        """

    async def history(self, service: str | None, limit: int) -> Sequence[Event]:
        """Outcomes, newest first."""

    async def plan(self, service: str | None) -> Sequence[PlannedChange]:
        """What a look now would change. Raises ServiceNotFound."""

    async def wait(self, service: str, image: str, tell: Tell, waits: Callable[[], None]) -> Event:
        """The verdict on an image, once there is one; cancelled when the client goes away.

        `tell` what happens to it before; it waits for the client, so it is called from this task and never from the
        service's round. `waits` is called when the work is done, and all that is left is to wait. `service` and
        `image` have been through `schema.utf8()`. Raises ServiceNotFound.
        """

    async def rollback(self, service: str, to: str | None) -> Event:
        """Back to a stack by its identity, or the one before. Raises ServiceNotFound, NoSuchStack, Failed."""

    async def forget(self, service: str, digest: str | None) -> Sequence[Quarantined]:
        """Lets content back in, and returns what; undoes a rollback. Raises ServiceNotFound."""

    async def reload(self) -> None:
        """Reads the settings again and looks at every service."""


async def serve(
    backend: Backend,
    runtime_directory: str,
    readers: Readers,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled: `await nursery.start(serve, backend, directory)` returns when clients can connect.

    The caller makes sure that there is one daemon to a runtime directory: a socket that is already there is
    taken for a dead one's, and replaced.

    Raises:
        OSError: the socket cannot be made.
    """
    server = _Server(backend, readers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.follow)
        with listening(Path(runtime_directory), schema.SOCKET) as made:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(made))
            task_status.started()
            await server.accept(listener, nursery)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call whose parameters are as the interface has them: those that are optional may be missing.

    Attributes:
        stranger: the client is to be told less; replies are made less anyway (`_Server._encoded()`).
        waits: called when the work is done, and all that is left is to wait.
    """

    backend: Backend
    parameters: dict[str, Any]
    tell: Tell
    stranger: bool
    waits: Callable[[], None]

    def get(self, name: str) -> Any:
        return self.parameters.get(name)


class _Server:
    def __init__(self, backend: Backend, readers: Readers) -> None:
        self._backend = backend
        self._readers = readers
        self._places = Quota(peers.CONNECTIONS, peers.CONNECTIONS_PER_USER)
        self._waits = Quota(peers.WAITS, peers.WAITS_PER_USER)
        self._turns = Turns()
        # Of their own: the daemon may have all of trio's threads busy copying images.
        self._threads = trio.CapacityLimiter(2)
        self._service = varlink.Service(
            vendor="confext-watcher",
            product="confext-watcher",
            version=watcher.__version__,
        )
        self._interface = Interface(schema.DESCRIPTION)
        self._service.interfaces[self._interface.name] = self._interface

    async def accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        exhausted = False
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                if not exhausted:
                    log.warning(f"control socket: no connection can be taken now: {error.strerror}")
                exhausted = True
                # They wait in the backlog.
                await trio.sleep(0.1)
            else:
                exhausted = False
                peer = Peer.of(stream)
                nursery.start_soon(self._converse, stream, peer)
                if not peer.privileged:
                    # Who connects without end would otherwise keep the event loop busy, refused or not.
                    await trio.sleep(1 / peers.CONNECTS_PER_SEC)

    async def _converse(self, stream: trio.SocketStream, peer: Peer) -> None:
        with trio.CancelScope() as scope:
            async with stream:
                with self._places.one_for(peer) as free:
                    try:
                        if not free:
                            raise ValueError("too many connections")
                        await self._answer_calls(Connection(stream, peer, scope))
                    except ValueError as error:
                        log.debug(f"control socket: connection closed: {error}", uid=peer.uid, pid=peer.pid)

    async def _answer_calls(self, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            async with self._turns.one_for(connection.peer) as turn:
                request = Request.parse(message)
                if request.method == _WAIT:
                    reply = await self._reply_unless_hung_up(connection, request, turn)
                else:
                    reply = await self._reply(connection, request, turn)
            if not request.oneway:
                await connection.send(reply)

    async def _reply_unless_hung_up(self, connection: Connection, request: Request, turn: Turn) -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.end_when_hung_up)
            reply = await self._reply(connection, request, turn)
            nursery.cancel_scope.cancel()
        return reply

    async def _reply(self, connection: Connection, request: Request, turn: Turn) -> bytes:
        """The reply, whatever happens: no exception leaves here."""
        peer = connection.peer
        try:
            name, parameters = self._checked(request)
            if not request.method.startswith(f"{schema.INTERFACE}."):
                return b"".join(self._service.handle(request.raw))
            return await self._encoded(peer, await self._call(connection, request, name, parameters, turn))
        except varlink.VarlinkError as error:
            return _encode({"error": error.error(), "parameters": error.parameters()})
        except ErrorReply as error:
            return self._encoded_error(peer, error)
        except Exception:
            log.exception(f"control socket: {request.method} failed by a mistake in the program")
            reason = "a mistake in the program: the watcher's log has the details"
            return self._encoded_error(peer, Failed(reason))

    async def _encoded(self, peer: Peer, results: dict[str, Any], **flags: bool) -> bytes:
        """A reply as this peer may have it."""

        def encode() -> bytes:
            told = results if self._readers.include(peer) else redact.redacted_results(results)
            return _encode({"parameters": told, **flags})

        # Hundreds of services take a while to write down, which must not hold up the daemon.
        return await trio.to_thread.run_sync(encode, limiter=self._threads)

    def _encoded_error(self, peer: Peer, error: ErrorReply) -> bytes:
        told = error.parameters() if self._readers.include(peer) else redact.redacted_error(error)
        return _encode({"error": error.name, "parameters": told})

    def _checked(self, request: Request) -> tuple[str, dict[str, Any]]:
        """The method's name and its parameters, optional ones without a value left out. Raises varlink.VarlinkError."""
        name_of_interface, _, name = request.method.rpartition(".")
        interface = self._service.interfaces.get(name_of_interface)
        if interface is None:
            raise varlink.InterfaceNotFound(name_of_interface)
        fields = interface.get_method(name).in_type.fields
        for parameter in request.parameters:
            if parameter not in fields:
                raise varlink.InvalidParameter(parameter)
        checked = {}
        for parameter, kind in fields.items():
            try:
                value = interface.filter_params(
                    parameter, kind, False, request.parameters.get(parameter), None
                )
            except (ValueError, OverflowError):
                raise varlink.InvalidParameter(parameter)
            if value is not None:
                checked[parameter] = value
        return name, checked

    async def _call(
        self, connection: Connection, request: Request, name: str, parameters: dict[str, Any], turn: Turn
    ) -> dict[str, Any]:
        peer = connection.peer
        stranger = not self._readers.include(peer)

        async def tell(event: Event) -> None:
            if request.more and not request.oneway:
                said = {"event": event, "redacted": stranger}
                await connection.send(await self._encoded(peer, said, continues=True))

        if name in _CHANGING:
            if not peer.privileged:
                raise NotPermitted(request.method)
            about = f" {shown(parameters['service'])}" if "service" in parameters else ""
            log.info(f"{name.lower()}{about}: asked for by uid {peer.uid} (pid {peer.pid})")
            return await _CHANGING[name](_Call(self._backend, parameters, tell, stranger, turn.over))
        with contextlib.ExitStack() as held:
            if request.method == _WAIT and not held.enter_context(self._waits.one_for(peer)):
                raise TooManyCalls(peer.uid, self._waits.per_user)
            call = _Call(self._backend, parameters, tell, stranger, turn.over)
            return {**await _READING[name](call), "redacted": stranger}


async def _status(call: _Call) -> dict[str, Any]:
    return {"services": await call.backend.status(call.get("service"))}


async def _history(call: _Call) -> dict[str, Any]:
    limit = call.parameters.get("limit", HISTORY_DEFAULT)
    events = await call.backend.history(call.get("service"), max(0, min(limit, HISTORY_MAX)))
    fitting = []
    room = REPLY_MAX
    for event in events:
        told = redact.redacted(event) if call.stranger else event
        room -= len(told.output) + len(told.reason) + len(told.message) + 1000 + 500 * len(told.layers)
        if room < 0:
            break
        fitting.append(told)
    cut = len(fitting) < len(events) or (limit > HISTORY_MAX and len(events) == HISTORY_MAX)
    return {"events": fitting, "truncated": cut}


async def _plan(call: _Call) -> dict[str, Any]:
    return {"changes": await call.backend.plan(call.get("service"))}


async def _wait(call: _Call) -> dict[str, Any]:
    service, image = schema.utf8(call.parameters["service"]), schema.utf8(call.parameters["image"])
    if call.stranger:
        # Whether there is a path may be a secret; its last part is not.
        image = os.path.basename(image)
    return {"event": await call.backend.wait(service, image, call.tell, call.waits)}


async def _rollback(call: _Call) -> dict[str, Any]:
    return {"event": await call.backend.rollback(call.parameters["service"], call.get("to"))}


async def _forget(call: _Call) -> dict[str, Any]:
    return {"forgotten": await call.backend.forget(call.parameters["service"], call.get("digest"))}


async def _reload(call: _Call) -> dict[str, Any]:
    await call.backend.reload()
    return {}


_WAIT = f"{schema.INTERFACE}.Wait"
_Answer = Callable[[_Call], Awaitable[dict[str, Any]]]
_READING: dict[str, _Answer] = {"Status": _status, "History": _history, "Plan": _plan, "Wait": _wait}
_CHANGING: dict[str, _Answer] = {"Rollback": _rollback, "Forget": _forget, "Reload": _reload}
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(schema.to_dict(message), separators=(",", ":")).encode()
