# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Trace` and `Compare` of the control socket: the look is made by a process of its own (trace_program.py).

What it reads are images of strangers, as large as these like, perhaps on a file system that does not answer. Here it
would keep the event loop from the interpreter for most of a second, and leave its memory with the daemon. A process has
limits, can be killed when its client goes away, and takes nobody with it.

It writes one piece after the other into a pipe, ready to be sent, and no more than the client takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

import watcher
from watcher.control.trace_pieces import ERROR, LAST
from watcher.images.access import User
from watcher.model import shown
from watcher.records import schema
from watcher.records.schema import ErrorReply, Failed
from watcher.settings.config import Settings
from watcher.settings.signals import reason_of

AT_ONCE = 2
"""So many looks, of all users together but the privileged, who have as many of their own."""
LOOK_SEC = 120
"""With the time that the client takes."""

_DYING_SEC = 5.0
_LIBRARY = str(Path(watcher.__file__).resolve().parents[1])


@dataclass(frozen=True, slots=True)
class Asked:
    """One call.

    Attributes:
        method: "Trace" or "Compare".
        more: the client takes several replies.
        user: who asks; None: root, or the daemon's own user.
    """

    method: str
    service: str
    more: bool
    user: User | None
    paths: tuple[str, ...] = ()
    before: str | None = None
    after: str | None = None


class Traces:
    """Makes looks for clients, some at a time."""

    def __init__(self) -> None:
        self._members, self._privileged = trio.Semaphore(AT_ONCE), trio.Semaphore(AT_ONCE)

    async def look(self, settings: Settings, asked: Asked, tell: Callable[[bytes], Awaitable[None]]) -> bytes:
        """The last piece, as JSON of the method's results; `tell` gets each before.

        Raises:
            ErrorReply: what the look has found wrong, or why there is none.
        """
        async with self._members if asked.user else self._privileged:
            with trio.move_on_after(LOOK_SEC):
                async with _process(settings, asked) as process:
                    return await _follow(process, asked.service, tell)
        raise Failed(f"{shown(asked.service)}: the look was ended, it took longer than {LOOK_SEC} s")


@asynccontextmanager
async def _process(settings: Settings, asked: Asked) -> AsyncIterator[trio.Process]:
    # Only what the daemon itself imports from: not its working directory, nor what its environment says.
    paths = [_LIBRARY, *(path for path in sys.path if os.path.isabs(path) and path != _LIBRARY)]
    program = f"import sys; sys.path[:] = {paths!r}; from watcher.control.trace_program import main; main()"
    where = {name: getattr(settings, name) for name in ("runtime_directory", "state_directory")}
    text = json.dumps({"asked": dataclasses.asdict(asked), "settings": where}, default=sorted)
    order = os.memfd_create("confext-watcher", os.MFD_CLOEXEC)
    try:
        os.write(order, text.encode())
        os.lseek(order, 0, os.SEEK_SET)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-IBc", program],
            stdin=order,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
    except OSError as error:
        raise Failed(f"{shown(asked.service)}: no process can be started to look: {error.strerror}")
    finally:
        os.close(order)
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: trio.Process) -> None:
    """Kill it, with what it has started. One that the kernel does not let go of is left to a thread."""
    assert process.stdout is not None
    with trio.CancelScope(shield=True):
        await process.stdout.aclose()
    if process._proc.returncode is not None:  # it was waited for: its PID may be another's by now
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(_DYING_SEC, shield=True):
        await process.wait()
        return
    with suppress(RuntimeError):  # no thread can be had: it stays a zombie until the next child is made
        threading.Thread(target=process._proc.wait, name="reaper", daemon=True).start()


async def _follow(process: trio.Process, service: str, tell: Callable[[bytes], Awaitable[None]]) -> bytes:
    assert process.stdout is not None
    buffer = bytearray()
    while True:
        searched = 0
        while (end := buffer.find(b"\0", searched)) < 0:
            searched = len(buffer)
            if searched > schema.MESSAGE_MAX:
                raise Failed(f"{shown(service)}: more than one reply may hold")
            received = await process.stdout.receive_some(256 * 1024)
            if not received:
                why = reason_of(await process.wait())
                raise Failed(
                    f"{shown(service)}: the process that looked {why}; the watcher's log may say more"
                )
            buffer += received
        kind, piece = bytes(buffer[:1]), bytes(buffer[1:end])
        del buffer[: end + 1]
        if kind == ERROR:
            raise _error(piece)
        if kind == LAST:
            return piece
        await tell(piece)


def _error(piece: bytes) -> ErrorReply:
    said = json.loads(piece)
    error: ErrorReply = schema.from_dict(schema.ERRORS[said["error"]], said["parameters"])
    return error
