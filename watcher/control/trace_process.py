# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Trace` and `Compare` of the control socket: the look is made by a process of its own (trace_program.py).

What it reads are images of strangers, as large as these like, perhaps on a file system that does not answer. Here it
would keep the event loop from the interpreter for most of a second, and leave its memory with the daemon. A process has
limits, can be killed when its client goes away, and takes nobody with it.

It writes one piece after the other into memory, ready to be sent. It has ended when the first is sent: nobody waits for
its place because a client takes his time, or takes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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

    async def look(self, settings: Settings, asked: Asked) -> BinaryIO:
        """The whole answer, for `pieces()`, in memory until the caller closes it.

        Raises:
            Failed: why there is none.
        """
        async with self._members if asked.user else self._privileged:
            with trio.move_on_after(LOOK_SEC), ExitStack() as held:
                answer = held.enter_context(open(_memory(), "rb"))
                async with _process(settings, asked, answer) as process:
                    status = await process.wait()
                if status:
                    why = f"the process that looked {reason_of(status)}; the watcher's log may say more"
                    raise Failed(f"{shown(asked.service)}: {why}")
                answer.seek(0)
                held.pop_all()
                return answer
        raise Failed(f"{shown(asked.service)}: the look was ended, it took longer than {LOOK_SEC} s")


def pieces(answer: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Each piece, as JSON of the method's results, and whether it is the last.

    Raises:
        ErrorReply: what the look has found wrong.
    """
    for line in answer:
        kind, piece = line[:1], line[1:-1]
        if kind == ERROR:
            raise _error(piece)
        if len(piece) > schema.MESSAGE_MAX:
            raise Failed("more than one reply may hold")
        yield piece, kind == LAST


def _memory() -> int:
    return os.memfd_create("confext-watcher", os.MFD_CLOEXEC)


@asynccontextmanager
async def _process(settings: Settings, asked: Asked, answer: BinaryIO) -> AsyncIterator[trio.Process]:
    # Only what the daemon itself imports from: not its working directory, nor what its environment says.
    paths = [_LIBRARY, *(path for path in sys.path if os.path.isabs(path) and path != _LIBRARY)]
    program = f"import sys; sys.path[:] = {paths!r}; from watcher.control.trace_program import main; main()"
    where = {name: getattr(settings, name) for name in ("runtime_directory", "state_directory")}
    text = json.dumps({"asked": dataclasses.asdict(asked), "settings": where}, default=sorted)
    order = _memory()
    try:
        os.write(order, text.encode())
        os.lseek(order, 0, os.SEEK_SET)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-IBc", program],
            stdin=order,
            stdout=answer,
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
    if process._proc.returncode is not None:  # it was waited for: its PID may be another's by now
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(_DYING_SEC, shield=True):
        await process.wait()
        return
    with suppress(RuntimeError):  # no thread can be had: it stays a zombie until the next child is made
        threading.Thread(target=process._proc.wait, name="reaper", daemon=True).start()


def _error(piece: bytes) -> ErrorReply:
    said = json.loads(piece)
    error: ErrorReply = schema.from_dict(schema.ERRORS[said["error"]], said["parameters"])
    return error
