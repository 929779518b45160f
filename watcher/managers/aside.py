# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a program that is about a service and not of it (`Notify=`): as the watcher's user, outside of all services.

With systemd it is a unit (`systemd/aside.py`), so that it has the network and the rights which the watcher's own unit
gave away. Without, it is a child of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence

import trio

from watcher.managers.base import Ended
from watcher.managers.command import gather, too_long
from watcher.model import Event
from watcher.settings.signals import reason_of
from watcher.settings.unit_names import is_template
from watcher.settings.values import split

RunAside = Callable[[Event, str, bytes, float], Awaitable[Ended]]
"""Runs a command line, or starts an instance of a template unit, and waits for its end.

    run(event, command, text, timeout_sec) -> Ended

Args:
    event: what it is about: a command gets CONFEXT_SERVICE and CONFEXT_OUTCOME in its environment.
    command: as `Notify=` has it.
    text: what it reads on standard input.

Raises:
    Later: the machine could not run it now.
"""


def environment(event: Event) -> list[str]:
    """What a command learns without reading its standard input, "NAME=VALUE". Nothing that is not for everybody."""
    return [f"CONFEXT_SERVICE={event.service}", f"CONFEXT_OUTCOME={event.outcome.value}"]


async def run_as_child(event: Event, command: str, text: bytes, timeout_sec: float) -> Ended:
    """`RunAside` without systemd. What a command has started in its process group is killed when its time is over."""
    if is_template(command):
        return Ended("cannot be started: there is no systemd", "")
    output = bytearray()
    status = None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    stream = trio.lowlevel.FdStream(reading)
    with contextlib.closing(stream), open(writing, "wb", buffering=0) as printed:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gather, stream, output)
            try:
                with trio.move_on_after(timeout_sec):
                    status = await _run(event, split(command), text, writing)
            except OSError as error:
                nursery.cancel_scope.cancel()
                return Ended(f"cannot be started: {os.strerror(error.errno or 0)}", "")
            printed.close()
            # A process that the command has left running may hold the pipe open.
            nursery.cancel_scope.deadline = trio.current_time() + 0.1
    reason = too_long(timeout_sec) if status is None else reason_of(status)
    return Ended(reason, output.decode(errors="replace"))


async def _run(event: Event, words: Sequence[str], text: bytes, output: int) -> int:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    ended = await trio.run_process(
        words,
        stdin=text,
        stdout=output,
        stderr=subprocess.STDOUT,
        check=False,
        deliver_cancel=_kill_group,
        cwd="/",
        env=inherited | dict(variable.split("=", 1) for variable in environment(event)),
        start_new_session=True,
    )
    return ended.returncode


async def _kill_group(process: trio.Process) -> None:
    # Nobody has reaped it yet, so its number is still the group's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
