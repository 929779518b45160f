# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling a service's main process something by a signal, or by a command that runs as the service would run it.

The command has the service's namespaces, user and environment, and no more rights than its main process
(`ExecContext`). A small program enters them (`enter.py`): with systemd in a transient unit (`transient.py`), without
it as a child of ours (`run_as_child`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import trio

import watcher
from watcher.managers import cgroup
from watcher.managers.base import Ended, Reloaded
from watcher.managers.enter import KINDS
from watcher.managers.exec_context import ExecContext, ExecOrder
from watcher.model import Later
from watcher.mounts.process import Process, namespace_id
from watcher.settings.signals import reason_of, signal_name
from watcher.text import reason_in

P = ParamSpec("P")
T = TypeVar("T")

OUTPUT_MAX = 64 * 1024
"""Bytes of a command's output that are kept."""

_LIBRARY: Final = str(Path(watcher.__file__).resolve().parents[1])
PROGRAM: Final = (
    sys.executable,
    "-ISBc",
    f"import sys; sys.path.insert(0, {_LIBRARY!r}); from watcher.managers.enter import main; main(sys.argv[1])",
)
"""The program that enters; its argument is the path of an order."""

# How long a killed child is waited for here. One that the kernel does not let go of is left to a thread.
_DYING_SEC = 5.0

# How long a new process may take to install its handler of a signal.
_HANDLER_SEC = 5.0

# The machine is short of something, which says nothing about the command.
_SHORT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC})


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that may block on a service's file system or memory.

    It has a thread of its own, not one of trio's forty: a service that does not answer holds up itself alone.
    """
    alone = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(
        lambda: function(*args, **kwargs), abandon_on_cancel=True, limiter=alone
    )


async def send_signal(main: Process, number: int) -> Reloaded:
    """Send a signal that asks for a reload, but not to a process that it would end.

    A process that was started just now is given the time to install its handler.

    Raises:
        Gone: it has ended.
    """
    deadline = trio.current_time() + _HANDLER_SEC
    while (sent := signal_now(main, number)) is None:
        if trio.current_time() > deadline:
            reason = f"{signal_name(number)} was not sent, it has no handler and would be ended by it"
            return Reloaded(ok=True, reason=reason)
        await trio.sleep(0.02)
    return sent


def signal_now(main: Process, number: int) -> Reloaded | None:
    """Send a signal that asks for a reload; None: it would end the process. Raises Gone."""
    if not main.survives(number):
        return None
    main.signal(number)
    return Reloaded(ok=True, told=signal_name(number))


# --- commands ---


def path_of(fd: int) -> str:
    """The path by which root can open one of our descriptors."""
    return f"/proc/{os.getpid()}/fd/{fd}"


@contextlib.contextmanager
def namespaces(main: Process, mount: int) -> Iterator[dict[str, str]]:
    """Paths of a mount namespace (a descriptor) and of the other namespaces of a service, by their kinds.

    Raises:
        Gone: its main process has ended.
    """
    with contextlib.ExitStack() as held:
        paths = {"mnt": path_of(mount)}
        for kind in KINDS.keys() - paths.keys():
            fd = main.namespace(kind)
            held.callback(os.close, fd)
            paths[kind] = path_of(fd)
        yield paths


@contextlib.contextmanager
def file_of(order: ExecOrder) -> Iterator[str]:
    """The path of a file with an order in it, for `PROGRAM`."""
    with open(os.memfd_create("confext-watcher-order", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(order.dump())
        yield path_of(file.fileno())


Run = Callable[[str, Process, int, ExecContext, Sequence[str], float], Awaitable[Ended]]
"""Runs a command (`words`) for a service, in a mount namespace (a descriptor) and the other namespaces of its main
process, for `timeout_sec` at most. Nothing that the command has started survives.

    run(service, main, namespace, context, words, timeout_sec) -> Ended

Raises:
    Gone: the main process has ended.
    Later: the machine could not run it now.
"""


async def run_as_child(
    service: str,
    main: Process,
    namespace: int,
    context: ExecContext,
    words: Sequence[str],
    timeout_sec: float,
) -> Ended:
    """`Run` without systemd."""
    own = main.namespace()
    try:
        # A check in a shadow has no use for the PIDs of the service; a reload command has.
        shadowed = namespace_id(namespace) != namespace_id(own)
    finally:
        os.close(own)
    with namespaces(main, namespace) as paths:
        group = _group_for(context)
        order = ExecOrder(paths, context, words, contained=True, group=group, private_pids=shadowed)
        return await run(order, timeout_sec=timeout_sec)


def _group_for(context: ExecContext) -> str:
    """The control group below which a command gets one of its own, "" if none will do.

    It is the service's, so that the service's limits hold. If it is not ours, it is delegated: its owner could move the
    command out.
    """
    path = context.cgroup or cgroup.own_directory()
    try:
        return path if path and os.stat(path).st_uid == os.geteuid() else ""
    except OSError:
        return ""


async def run(order: ExecOrder, *, timeout_sec: float) -> Ended:
    """Run a command as a child of ours and wait for its end.

    Args:
        order: one that is `contained`.
        timeout_sec: seconds after which the command is killed.

    Raises:
        Later: the machine could not start it now.
    """
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    stream = trio.lowlevel.FdStream(reading)
    with (
        contextlib.closing(stream),
        open(writing, "wb", buffering=0) as printed,
        ours,
        theirs,
        file_of(order) as path,
    ):
        try:
            child = await trio.to_thread.run_sync(_start, path, theirs, writing)
        except OSError as error:
            raise Later(f"could not be run: {error.strerror}") from error
        theirs.close()
        printed.close()
        return await _follow(child, ours, stream, timeout_sec)


def _start(path: str, talk: socket.socket, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, path],
        stdin=talk.fileno(),
        stdout=output,
        stderr=output,
        cwd="/",
        env={},
        start_new_session=True,
    )


async def _follow(
    child: subprocess.Popen[bytes], talk: socket.socket, stream: trio.abc.ReceiveStream, timeout_sec: float
) -> Ended:
    output = bytearray()
    said = b""
    pidfd = os.pidfd_open(child.pid)
    try:
        with trio.move_on_after(timeout_sec) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gather, stream, output)
                await trio.lowlevel.wait_readable(talk)
                said = talk.recv(256)
                # The processes that still hold the pipe open are about to be killed.
                nursery.cancel_scope.deadline = trio.current_time() + 0.1
    finally:
        talk.close()
        await _reap(child, pidfd)
        os.close(pidfd)
    text = output.decode(errors="replace")
    if scope.cancelled_caught:
        return Ended(too_long(timeout_sec), text)
    return Ended(_reason(said.decode(), text), text)


def _reason(said: str, output: str) -> str:
    """What `enter.py` reported, in words that follow the name of a command; "" for success.

    Raises:
        Later: the report says nothing about the command.
    """
    if not said:
        raise Later(f"could not be run: what was to run it has failed{reason_in(output)}")
    what, number = said.split()[:2]
    if what == "status":
        return reason_of(os.waitstatus_to_exitcode(int(number)))
    if int(number) in _SHORT:
        raise Later(f"could not be run: {os.strerror(int(number))}")
    if what == "exec":
        return f"cannot be started: {os.strerror(int(number))}"
    return "cannot be started: it cannot be given the service's namespaces, user, root or capabilities"


async def _reap(child: subprocess.Popen[bytes], pidfd: int) -> None:
    with trio.move_on_after(_DYING_SEC, shield=True):
        await trio.lowlevel.wait_readable(pidfd)
        child.wait()
        return
    with contextlib.suppress(
        RuntimeError
    ):  # no thread can be had: it stays a zombie until the next child is made
        threading.Thread(target=child.wait, name="reaper", daemon=True).start()


async def gather(stream: trio.abc.ReceiveStream, output: bytearray) -> None:
    """Read what a command prints to its end, and keep the first OUTPUT_MAX bytes."""
    async for chunk in stream:
        output += chunk[: OUTPUT_MAX - len(output)]


def too_long(timeout_sec: float) -> str:
    """`Ended.reason` of a command that was killed after so many seconds."""
    return f"was killed: it took longer than {timeout_sec:g} s"
