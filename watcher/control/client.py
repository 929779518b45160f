# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client of the control socket, for the command line: blocking, and standard library only, to start fast.

    with Client(runtime_directory, timeout=30) as client:
        services = client.status("nginx.service")

Each failure is a CallError: `str()` is one line for a person, `exit_code` the command line's exit status. The errors of
the interface are in schema.py, those of the connection here.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from watcher.model import Event, shown
from watcher.records import schema
from watcher.records.schema import (
    ALL_OUTCOMES,
    CallError,
    ExitStatus,
    Failed,
    PlannedChange,
    Quarantined,
    ServiceStatus,
    Waited,
    Which,
)

RESTART_SEC = 30.0
"""Seconds for which a call without a time-out waits for a daemon that has ended: it may be being restarted."""
_POLL_SEC = 0.1


class NotRunning(CallError):
    """No daemon listens at the socket."""

    exit_code = ExitStatus.NOT_RUNNING


class TimedOut(CallError):
    """There was no answer in time; the daemon may go on with what it was asked for."""

    exit_code = ExitStatus.TIMED_OUT


class Disconnected(CallError):
    """The daemon refused the connection, or answered what cannot be read."""


class Closed(Disconnected):
    """The daemon closed the connection before it answered."""


class OtherVersion(Failed):
    """The daemon answered an error that this client does not know, as one of another version may."""


class Client:
    """A connection to the daemon; one call at a time.

    Args:
        runtime_directory: where the socket is.
        timeout: seconds for all calls together, None to wait for ever.

    Attributes:
        redacted: the last answer had outcomes only, because this user is not told reasons, paths and outputs.

    Raises:
        NotRunning: there is no daemon.
        TimedOut: it does not take the connection.
    """

    redacted = False

    def __init__(self, runtime_directory: str, timeout: float | None = None) -> None:
        self._directory = runtime_directory
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def status(self, service: str | None = None, *, deep: bool = False) -> list[ServiceStatus]:
        """The services that take part, or one; with `deep`, which needs a service, with all that lies there for it.

        Raises ServiceNotFound.
        """
        try:
            answer = self.call("Status", service=service, deep=deep or None)
        except OtherVersion:
            if not deep:  # which an older one does not know
                raise
            answer = self.call("Status", service=service)
        return self._list(ServiceStatus, "services", answer)

    def history(
        self, service: str | None = None, limit: int = 100, which: Which = ALL_OUTCOMES
    ) -> list[Event]:
        """Outcomes, newest first; fewer than asked for if they are too big for one reply."""
        asked = {name: value or None for name, value in schema.to_dict(which).items()}
        return self._list(Event, "events", self.call("History", service=service, limit=limit, **asked))

    def plan(
        self, service: str | None = None, *, debug: bool = False, check: bool = False
    ) -> list[PlannedChange]:
        """What a look now would change.

        Args:
            debug: with a report; needs a service.
            check: with what `Check=` says of it.

        Raises ServiceNotFound, MembersOnly.
        """
        answer = self.call("Plan", service=service, debug=debug or None, check=check or None)
        return self._list(PlannedChange, "changes", answer)

    def rollback(self, service: str, to: str | None = None) -> Iterator[Event]:
        """Puts the service back on a stack: where it goes, and then what came of it.

        Raises ServiceNotFound, NoSuchStack, NotPermitted, Failed.
        """
        for answer in self.stream("Rollback", service=service, to=to):
            yield read(Event, answer.get("event"))

    def forget(self, service: str, digest: str | None = None) -> list[Quarantined]:
        """Lets content back in, and returns what. Raises ServiceNotFound, NotPermitted."""
        answer = self.call("Forget", service=service, digest=digest)
        return self._list(Quarantined, "forgotten", answer)

    def wait(self, service: str, image: str) -> Iterator[Waited]:
        """What is so of the image, until the final answer, which comes last.

        Raises ServiceNotFound, TooManyCalls, TimedOut.
        """
        for answer in self.stream("Wait", service=service, image=image):
            yield read(Waited, answer)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The reply's parameters, to a method of our interface; parameters that are None are left out."""
        self._send(method, parameters, more=False)
        return self._answer(self._receive())

    def stream(self, method: str, **parameters: object) -> Iterator[dict[str, Any]]:
        """The parameters of each reply; for methods that have more than one."""
        self._send(method, parameters, more=True)
        continues = True
        while continues:
            reply = self._receive()
            continues = reply.get("continues") is True
            yield self._answer(reply)

    def _connect(self) -> None:
        where = shown(os.path.join(self._directory, schema.SOCKET))
        left = self._left()
        if left is not None:
            # Not settimeout(): it makes the socket nonblocking, and then a full backlog is an error (connect(2)).
            seconds, fraction = divmod(left, 1)
            limit = struct.pack("ll", int(seconds), max(1, int(fraction * 1e6)))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            # By way of the directory's descriptor: an address has room for 108 bytes (unix(7)), a path may be longer.
            directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._socket.connect(f"/proc/self/fd/{directory}/{schema.SOCKET}")
            finally:
                os.close(directory)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            start = (
                "; `systemctl start confext-watcher` starts it"
                if os.path.isdir("/run/systemd/system")
                else ""
            )
            raise NotRunning(f"the daemon is not running (nobody listens at {where}){start}")
        except BlockingIOError:
            raise TimedOut(f"{where}: confext-watcher does not take the connection")
        except OSError as error:
            raise Disconnected(f"{where}: cannot connect: {error.strerror}")

    def _left(self) -> float | None:
        """Seconds until the deadline. Raises TimedOut."""
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("timed out: confext-watcher has not answered yet")
        return left

    def _send(self, method: str, parameters: dict[str, object], *, more: bool) -> None:
        given = {name: schema.to_dict(value) for name, value in parameters.items() if value is not None}
        message: dict[str, object] = {"method": f"{schema.INTERFACE}.{method}", "parameters": given}
        if more:
            message["more"] = True
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(json.dumps(message).encode() + b"\0")
        except TimeoutError:
            raise TimedOut("timed out: confext-watcher does not take the call")
        except ConnectionError:
            # The daemon may have said why before it closed: the next read tells.
            pass

    def _receive(self) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\0", searched)) < 0:
            searched = len(self._buffer)
            if searched > schema.MESSAGE_MAX:
                raise Disconnected("confext-watcher answered with more than a reply may hold")
            try:
                self._socket.settimeout(self._left())
                received = self._socket.recv(256 * 1024)
            except TimeoutError:
                raise TimedOut("timed out: confext-watcher has not answered yet")
            except ConnectionError:
                received = b""
            if not received:
                raise Closed("confext-watcher closed the connection (stopped, or too many connections)")
            self._buffer += received
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            reply = json.loads(message)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not isinstance(reply.get("parameters") or {}, dict):
            raise Disconnected("what answers at the control socket does not speak Varlink")
        return reply

    def _answer(self, reply: dict[str, Any]) -> dict[str, Any]:
        parameters = reply.get("parameters") or {}
        if "error" not in reply:
            self.redacted = parameters.get("redacted") is True
            return dict(parameters)
        name = str(reply["error"])
        try:
            error: CallError = schema.from_dict(schema.ERRORS[name], parameters)
        except (KeyError, ValueError):
            said = ", ".join(f"{shown(key)} {shown(str(value))}" for key, value in parameters.items())
            error = OtherVersion(
                f"the running confext-watcher answered {shown(name)} ({said}); is it of another version?"
            )
        raise error

    def _list(self, cls: type[schema.T], key: str, answer: dict[str, Any]) -> list[schema.T]:
        items = answer.get(key)
        return [read(cls, item) for item in (items if isinstance(items, list) else [items])]


def read(cls: type[schema.T], data: object) -> schema.T:
    """A part of an answer. Raises Failed: it is none of that class."""
    try:
        return schema.from_dict(cls, data)
    except ValueError as error:
        raise Failed(f"the running confext-watcher gave an answer of another version: {error}")


def wait(
    runtime_directory: str, service: str, image: str, timeout: float | None, redacted: Callable[[bool], None]
) -> Iterator[Waited]:
    """`Client.wait()`, also of a daemon that is being restarted.

    Args:
        timeout: seconds; until then a daemon that does not run is waited for. None: one that does not run at first is
            an error at once, and one that ends meanwhile after RESTART_SEC.
        redacted: called with that of each answer.

    Raises: as `Client.wait()`, and NotRunning.
    """
    patience = 0.0 if timeout is None else timeout
    deadline = time.monotonic() + patience
    while True:
        try:
            left = None if timeout is None else max(deadline - time.monotonic(), 0.001)
            with Client(runtime_directory, left) as client:
                for answer in client.wait(service, image):
                    redacted(client.redacted)
                    yield answer
                    if timeout is None:
                        deadline = math.inf
            return
        except (NotRunning, Closed):
            if timeout is None and deadline == math.inf:
                deadline = time.monotonic() + RESTART_SEC
            if time.monotonic() + _POLL_SEC > deadline:
                raise
            time.sleep(_POLL_SEC)
