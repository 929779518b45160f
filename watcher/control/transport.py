# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink's transport for the control socket: calls in and replies out, with a bound for each. Who is there: peers.py.

A message is JSON and a NUL (varlink.org, "Method Call"). A connection is one task, which reads one call and sends its
replies before it reads the next. So no queue needs a bound: what a client sends meanwhile waits in the kernel's buffer.
A connection may be idle; it costs a descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from watcher.control.peers import Peer

REQUEST_MAX = 64 * 1024
"""Bytes of one call."""
SEND_SEC = 30
"""How long a client may take to take a reply."""


@contextlib.contextmanager
def listening(directory: Path, name: str) -> Iterator[socket.socket]:
    """The socket: when its name appears, it listens already, and every user may connect. Removed at the end."""
    temporary = f".{name}.{os.getpid()}"
    with contextlib.ExitStack() as stack:
        # By way of the directory's descriptor: an address has room for 108 bytes (unix(7)), a path may be longer.
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        _unlink(temporary, descriptor)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(f"/proc/self/fd/{descriptor}/{temporary}")
        stack.callback(_unlink, temporary, descriptor)
        os.chmod(temporary, 0o666, dir_fd=descriptor)
        listener.listen(128)
        os.rename(temporary, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        stack.callback(_unlink, name, descriptor)
        yield listener


def _unlink(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


@dataclass(frozen=True, slots=True)
class Request:
    """One call; its `parameters` are not checked yet."""

    method: str
    parameters: dict[str, Any]
    more: bool
    oneway: bool
    raw: bytes

    @staticmethod
    def parse(raw: bytes) -> Request:
        """Raises ValueError: not a Varlink call."""
        try:
            # A string, because json.loads() takes bytes that are UTF-16, or lone surrogates, as well.
            message = json.loads(raw.decode(), parse_constant=_no_constant, object_pairs_hook=_object)
        except RecursionError:
            raise ValueError("nested too deeply")
        if not isinstance(message, dict):
            raise ValueError("not an object")
        method = message.get("method")
        parameters = message.get("parameters")
        flags = [message.get(flag) or False for flag in ("more", "oneway")]
        if not isinstance(method, str) or not isinstance(parameters, dict | None):
            raise ValueError("no method, or parameters that are not an object")
        if any(not isinstance(flag, bool) for flag in flags):
            raise ValueError("a flag that is neither true nor false")
        return Request(method, parameters or {}, flags[0], flags[1], raw)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Connection:
    """One client; cancelling `scope` ends the connection."""

    def __init__(self, stream: trio.SocketStream, peer: Peer, scope: trio.CancelScope) -> None:
        self.peer = peer
        self.scope = scope
        self._stream = stream
        self._buffer = bytearray()

    async def receive(self) -> bytes | None:
        """The next message without its NUL, None at the end. Raises ValueError: longer than REQUEST_MAX."""
        searched = 0
        while (end := self._buffer.find(b"\0", searched)) < 0:
            searched = len(self._buffer)
            if searched > REQUEST_MAX:
                raise ValueError("longer than a call may be")
            try:
                received = await self._stream.receive_some(16 * 1024)
            except trio.BrokenResourceError:
                return None
            if not received:
                return None
            self._buffer += received
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return message

    async def send(self, message: bytes) -> None:
        """Sends one reply. If the client is gone, or does not take it, the connection ends."""
        try:
            with trio.fail_after(SEND_SEC):
                await self._stream.send_all(message + b"\0")
        except (trio.BrokenResourceError, trio.TooSlowError):
            self.scope.cancel()
            await trio.lowlevel.checkpoint()

    async def end_when_hung_up(self) -> None:
        """Ends the connection when the client has closed its socket.

        Reading does not tell: more calls may lie before the end, and a client that has shut down only its writing side
        (`socat`) is still there.
        """
        with select.epoll(1) as hangups:
            # No events: the kernel reports EPOLLHUP always (epoll_ctl(2)).
            hangups.register(self._stream.socket, 0)
            await trio.lowlevel.wait_readable(hangups.fileno())
        self.scope.cancel()
