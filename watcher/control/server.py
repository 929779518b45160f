# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's control socket: Varlink, interface `io.confext.Watcher` (schema.py), under trio.

**What the varlink package does here.** It parses the interface description, checks parameters against it, and answers
all calls of `org.varlink.service`. It calls each method as a plain function, but nearly every answer here has to wait:
a rollback for as long as the service reloads, `Wait` for hours. A thread for each call cannot be cancelled when the
client goes away, and a hundred clients that wait are a hundred threads. So this module dispatches the calls of our own
interface to an async Backend.

**A client can only hurt itself** (bounds: transport.py, peers.py, conversation.py). A client
that takes no reply, sends rubbish, or comes back a thousand times is only in its own way.

**Strangers are told less** (redact.py): each reply goes through `_Server._encoded()` or `_encoded_error()`, but for
those of `Trace` and `Compare`, which are not for strangers at all (trace_process.py).

**Going away.** A client that closes its connection during `Wait` ends the call. The daemon finishes a changing call
all the same: no service stays rolled back by half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import trio
import varlink
from varlink.scanner import Interface

import watcher
from watcher.control import peers, redact
from watcher.control.conversation import checked, converse
from watcher.control.peers import Peer, Quota, Readers, Turn, Turns, Untaken
from watcher.control.trace_process import Asked, pieces
from watcher.control.transport import Connection, Request, listening
from watcher.images.access import User
from watcher.model import Event, Outcome, shown
from watcher.records import journal, schema
from watcher.records.schema import (
    ErrorReply,
    Failed,
    MembersOnly,
    NotPermitted,
    PlannedChange,
    Quarantined,
    ServiceStatus,
    TooManyCalls,
    Waited,
    Which,
)

HISTORY_DEFAULT = 100
HISTORY_MAX = 1000
"""Events in one reply."""
REPLY_MAX = 2 * 1024 * 1024
"""Characters of events in one reply; JSON takes up to six bytes for one, and sd-varlink 16 MiB (schema.MESSAGE_MAX)."""

Tell = Callable[[Event], Awaitable[None]]
TellWaited = Callable[[Waited], Awaitable[None]]


class Backend(Protocol):
    """What the server asks the daemon for.

    Every method may raise an ErrorReply, which the client gets. The server logs any other exception as a bug, and the
    client gets Failed. When the server stops, it cancels calls in progress: what must not be cut short (a swap) belongs
    into a task of the daemon's own.
    """

    async def status(self, service: str | None, *, deep: bool) -> Sequence[ServiceStatus]:
        """One service or all, without outputs: those of hundreds do not fit into one reply.

        Args:
            deep: of one service, also what lies there for it.

        Raises:
            ServiceNotFound: no such service.
        """

    async def history(self, service: str | None, limit: int, which: Which) -> Sequence[Event]:
        """Outcomes, newest first."""

    async def plan(self, service: str | None, *, debug: bool, check: bool) -> Sequence[PlannedChange]:
        """What a look now would change; with `debug`, with a report; with `check`, what Check= says of it.

        Raises:
            ServiceNotFound: no such service.
        """

    async def wait(self, service: str, image: str, tell: TellWaited, waits: Callable[[], None]) -> Waited:
        """The final answer on an image, once there is one; cancelled when the client goes away.

        Args:
            service, image: after `schema.utf8()`.
            tell: to call with each answer before. It waits for the client: call it from this task, never from the
                service's round.
            waits: to call when the work is done, and all that is left is to wait.

        Raises:
            ServiceNotFound: no such service.
        """

    async def rollback(self, service: str, to: str | None, by: str, tell: Tell) -> Event:
        """Back to a stack by its identity, or the one before.

        Args:
            by: who asks for it.
            tell: to call with where it goes, before it does.

        Raises:
            ServiceNotFound, NoSuchStack: no such service or stack.
            Failed: it was not done, and will not be.
        """

    async def forget(self, service: str, digest: str | None, by: str) -> Sequence[Quarantined]:
        """Lets content back in, and returns what; undoes a rollback. Raises ServiceNotFound."""

    async def trace(self, asked: Asked) -> BinaryIO:
        """The answer to `Trace` or `Compare`, for `trace_process.pieces()`; cancelled when the client goes away.

        Raises:
            Failed: it cannot be looked at.
        """

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

    The caller makes sure that a runtime directory has one daemon: a socket that is already there gets replaced.

    Raises:
        OSError: the socket cannot be made.
    """
    server = _Server(backend, readers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.follow)
        with listening(Path(runtime_directory), schema.SOCKET) as made:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(made))
            task_status.started()
            await converse(listener, server.answer_calls, "control socket")


class _Server:
    def __init__(self, backend: Backend, readers: Readers) -> None:
        self._backend = backend
        self._readers = readers
        self._waiting = Quota(peers.WAITS, peers.WAITS_PER_USER)
        self._untaken = {privileged: Untaken() for privileged in (True, False)}
        self._turns = Turns()
        # Not trio's own: the daemon may have all of them busy copying images.
        self._threads = trio.CapacityLimiter(2)
        self._service = varlink.Service(
            vendor="confext-watcher",
            product="confext-watcher",
            version=watcher.__version__,
        )
        self._interface = Interface(schema.DESCRIPTION)
        self._service.interfaces[self._interface.name] = self._interface

    async def answer_calls(self, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            async with self._turns.one_for(connection.peer) as turn:
                request = Request.parse(message)
                if request.method in _END_WITH_CLIENT:
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
            name, given = checked(self._service, request)
            if not request.method.startswith(f"{schema.INTERFACE}."):
                return b"".join(self._service.handle(request.raw))
            if name in _TRACES:
                return await self._trace(connection, request, name, given, turn)
            return await self._encoded(peer, await self._call(connection, request, name, given, turn))
        except varlink.VarlinkError as error:
            return _encode({"error": error.error(), "parameters": error.parameters()})
        except ErrorReply as error:
            return self._encoded_error(peer, error)
        except Exception:  # noqa: BLE001 -- it is logged as a bug, and the client gets Failed
            journal.log.exception(f"control socket: {request.method} failed by a mistake in the program")
            reason = "a mistake in the program: the watcher's log has the details"
            return self._encoded_error(peer, Failed(reason))

    async def _encoded(self, peer: Peer, results: dict[str, Any], **flags: bool) -> bytes:
        """A reply as this peer may have it."""

        def encode() -> bytes:
            told = results if self._readers.include(peer) else redact.redacted_results(results)
            return _encode({"parameters": told, **flags})

        # Hundreds of services take a while to encode, which must not hold up the daemon.
        return await trio.to_thread.run_sync(encode, limiter=self._threads)

    def _encoded_error(self, peer: Peer, error: ErrorReply) -> bytes:
        told = error.parameters() if self._readers.include(peer) else redact.redacted_error(error)
        return _encode({"error": error.name, "parameters": told})

    async def _trace(
        self, connection: Connection, request: Request, name: str, given: dict[str, Any], turn: Turn
    ) -> bytes:
        """Nothing of it is for strangers: what a stack is made of are paths, and what is in these may be a secret."""
        peer = connection.peer
        if not self._readers.include(peer):
            raise MembersOnly(request.method, peers.GROUP)
        if not peer.all_groups:
            raise Failed(f"uid {peer.uid} is in too many groups to know what this user could read")
        turn.machine.close()  # looks have a bound of their own, and their client takes as long as he likes
        user = None if peer.privileged else User(peer.uid, peer.groups)
        more = request.more and not request.oneway
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        answer = await self._backend.trace(Asked(name, more=more, user=user, **given))
        with answer, self._untaken[peer.privileged].one(connection.scope):
            for piece, is_last in pieces(answer):
                reply = b'{"parameters":' + piece
                if is_last:
                    return reply + b"}"
                await connection.send(reply + b',"continues":true}')
        raise RuntimeError("an answer without an end")

    async def _call(
        self, connection: Connection, request: Request, name: str, given: dict[str, Any], turn: Turn
    ) -> dict[str, Any]:
        """What the backend answers, under the names that the interface has for it."""
        peer, backend = connection.peer, self._backend
        stranger = not self._readers.include(peer)

        async def say(said: dict[str, Any]) -> None:
            if request.more and not request.oneway:
                await connection.send(await self._encoded(peer, said, continues=True))

        async def tell(event: Event) -> None:
            await say({"event": event})

        async def tell_waited(waited: Waited) -> None:
            await say({"event": waited.event, "answer": waited.answer, "redacted": stranger})

        if name in _CHANGING:
            if not peer.privileged:
                raise NotPermitted(request.method)
            about = f" {shown(given['service'])}" if "service" in given else ""
            journal.log.info(f"{name.lower()}{about}: asked for by uid {peer.uid} (pid {peer.pid})")
        found: dict[str, Any]
        match name:
            case "Status":
                found = {"services": await self._status(given, stranger)}
            case "Plan":
                debug = given.get("debug", False)
                if debug and "service" not in given:  # reports of hundreds do not fit into one reply
                    raise varlink.InvalidParameter("service")
                check = given.get("check", False)
                if check and stranger:
                    raise MembersOnly(request.method, peers.GROUP)
                found = {"changes": await backend.plan(given.get("service"), debug=debug, check=check)}
            case "History":
                limit = given.get("limit", HISTORY_DEFAULT)
                which = _which(given)
                events = await backend.history(given.get("service"), max(0, min(limit, HISTORY_MAX)), which)
                found = _fitting(events, limit, stranger)
            case "Wait":
                # Whether there is a path may be a secret; its last part is not.
                image = os.path.basename(given["image"]) if stranger else given["image"]
                with self._waiting.take(peer) as free:
                    if not free:
                        raise TooManyCalls(peer.uid, self._waiting.per_user)
                    service, image = schema.utf8(given["service"]), schema.utf8(image)
                    waited = await backend.wait(service, image, tell_waited, turn.close)
                    found = {"event": waited.event, "answer": waited.answer}
            case "Rollback":
                by = await trio.to_thread.run_sync(peers.who, peer)
                return {"event": await backend.rollback(given["service"], given.get("to"), by, tell)}
            case "Forget":
                by = await trio.to_thread.run_sync(peers.who, peer)
                return {"forgotten": await backend.forget(given["service"], given.get("digest"), by)}
            case "Reload":
                await backend.reload()
                return {}
            case _:
                raise NotImplementedError(name)
        return {**found, "redacted": stranger}

    async def _status(self, given: dict[str, Any], stranger: bool) -> Sequence[ServiceStatus]:
        deep = given.get("deep", False)
        if deep and "service" not in given:  # a look at each of hundreds takes too long
            raise varlink.InvalidParameter("service")
        # Strangers are not told what lies there, so it is not looked at for them.
        return await self._backend.status(given.get("service"), deep=deep and not stranger)


def _which(given: dict[str, Any]) -> Which:
    """Raises InvalidParameter: there is no such outcome."""
    outcomes = tuple(given.get("outcomes", ()))
    if not {outcome.value for outcome in Outcome}.issuperset(outcomes):
        raise varlink.InvalidParameter("outcomes")
    return Which(outcomes, max(given.get("since", 0), 0), given.get("image", ""))


def _fitting(events: Sequence[Event], limit: int, stranger: bool) -> dict[str, Any]:
    """As many events, newest first, as one reply holds."""
    fitting = []
    room = REPLY_MAX
    for event in events:
        told = redact.redacted(event) if stranger else event
        room -= len(told.output) + len(told.reason) + len(told.message) + 1000 + 500 * len(told.layers)
        if room < 0:
            break
        fitting.append(told)
    cut = len(fitting) < len(events) or (limit > HISTORY_MAX and len(events) == HISTORY_MAX)
    return {"events": fitting, "truncated": cut}


_TRACES = ("Trace", "Compare")
_END_WITH_CLIENT = frozenset(f"{schema.INTERFACE}.{name}" for name in ("Wait", *_TRACES))
_CHANGING = ("Rollback", "Forget", "Reload")


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(schema.to_dict(message), separators=(",", ":")).encode()
