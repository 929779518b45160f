# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command where a service is: in its mount namespace, as its user, with its environment, and no more rights.

A worker that stands in a service's namespace can start an ordinary subprocess, which inherits that. The rest
(descriptors, numbers of user and groups, words) is made ready before: inside, every path and every name would resolve
in the service's files. What only the child itself can do to itself (control group, root directory, capabilities) it
does between fork and exec: system calls on what was made ready, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import trio

from watcher.become import Like, become
from watcher.config import signal_name
from watcher.managers import cgroup
from watcher.model import Later
from watcher.mounts.workshop import Workshop
from watcher.process import Gone, Process

OUTPUT_MAX = 64 * 1024
"""Bytes of a command's output that are kept."""

# Seconds that a killed command is waited for; one that the kernel does not let go of is left to it.
_DYING_SEC = 5.0

# What the machine is short of, which says nothing about the command.
_SHORT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC})


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: `reason` is "" for exit status 0, else words that follow its name; the output is cut."""

    reason: str
    output: str


def like(process: Process, extra: Mapping[str, str]) -> Like:
    """What a process has and is limited to, with `extra` added to its environment.

    Raises:
        Gone: it has ended.
    """
    fields = dict(line.partition(":")[::2] for line in process.read("status").splitlines())
    pairs = (pair.partition("=") for pair in process.read("environ").split("\0"))
    environment = {name: value for name, _, value in pairs if name}
    groups = tuple(int(group) for group in fields["Groups"].split())
    # Uid: and Gid: list real, effective, saved and file system's.
    user, group = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
    bounding = int(fields["CapBnd"], 16)
    return Like(
        user,
        group,
        groups,
        {**environment, **extra},
        # A program that root executes gets all that is in the bounding set, one that dropped some must not see it get
        # them back.
        bounding=bounding & int(fields["CapPrm"], 16) if user == 0 else bounding,
        ambient=int(fields["CapAmb"], 16),
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
        root=_root(process),
        cgroup=_cgroup(process),
    )


def _root(process: Process) -> str:
    try:
        root = os.readlink(f"/proc/{process.pid}/root")
    except FileNotFoundError:
        raise Gone(f"process {process.pid} has ended") from None
    if not process.alive():
        raise Gone(f"process {process.pid} has ended")
    return root


def _cgroup(process: Process) -> str:
    """`cgroup.procs` of a process's control group, "" if it is ours too, or cannot be seen from here."""
    group = _unified(process.read("cgroup"))
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        own = _unified(file.read())
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mount = cgroup.mount_point(file.read())
    path = f"{mount}{group}/cgroup.procs"
    return path if mount and group not in ("", own) and os.access(path, os.W_OK) else ""


def _unified(text: str) -> str:
    """The path in the line "0::/path" of cgroups(7), "" if there is none, or one outside of our cgroup namespace."""
    rows = (line.removeprefix("0::") for line in text.splitlines() if line.startswith("0::"))
    path = next(rows, "")
    return "" if path.startswith("/..") else path


async def run(
    shop: Workshop,
    place: Callable[[], AbstractContextManager[None]],
    who: Like,
    words: Sequence[str],
    *,
    timeout_sec: float,
) -> Ended:
    """Run a command and wait for its end; what it leaves running in its session is killed.

    Args:
        place: enters where it is to run, on a worker (`Workshop.entered`).
        timeout_sec: seconds after which it is killed.

    Raises:
        HostNamespace: the namespace is the host's.
        Later: the machine could not start it now.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        # Here: where a worker stands there are neither devices nor control groups.
        with open("/dev/null", "rb") as null, _opened(who.cgroup) as group:
            child = await shop.run(_start, place, who, tuple(words), null.fileno(), writing, group)
    except BaseException as error:
        os.close(reading)
        if isinstance(error, OSError) and error.errno in _SHORT:
            raise Later(f"could not be run: {error.strerror}") from error
        if isinstance(error, OSError):
            return Ended(f"cannot be started: {error.strerror}", "")
        if isinstance(error, subprocess.SubprocessError):
            return Ended("cannot be started: it cannot be given the service's user, root or capabilities", "")
        raise
    finally:
        os.close(writing)
    return await _follow(child, reading, timeout_sec)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path else -1
    try:
        yield fd
    finally:
        if path:
            os.close(fd)


def _start(
    place: Callable[[], AbstractContextManager[None]],
    who: Like,
    words: Sequence[str],
    stdin: int,
    stdout: int,
    group: int,
) -> subprocess.Popen[bytes]:
    # In a user namespace of one user there is nothing to change to, and setgroups() is not allowed.
    other = (who.user, who.group) != (os.geteuid(), os.getegid())
    prepare = functools.partial(become, who, group, other=other)
    with place():
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=who.environment,
            start_new_session=True,
            preexec_fn=prepare,  # noqa: PLW1509 -- makes system calls and takes no lock
        )


async def _follow(child: subprocess.Popen[bytes], reading: int, timeout_sec: float) -> Ended:
    output = bytearray()
    pidfd = os.pidfd_open(child.pid)
    try:
        async with trio.lowlevel.FdStream(reading) as stream:
            with trio.move_on_after(timeout_sec) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_gather, stream, output)
                    await trio.lowlevel.wait_readable(pidfd)
                    # What it left running may hold the pipe open for ever.
                    nursery.cancel_scope.deadline = trio.current_time() + 0.1
    finally:
        # The session is killed before its leader is waited for: until then its number is not given to another.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await _reap(child, pidfd)
        os.close(pidfd)
    text = output.decode(errors="replace")
    if scope.cancelled_caught or child.returncode is None:
        return Ended(f"was killed: it took longer than {timeout_sec:g} s", text)
    return Ended(reason_of(child.returncode), text)


async def _reap(child: subprocess.Popen[bytes], pidfd: int) -> None:
    with trio.move_on_after(_DYING_SEC, shield=True):
        await trio.lowlevel.wait_readable(pidfd)
        child.wait()
        return
    threading.Thread(target=child.wait, name="reaper", daemon=True).start()


async def _gather(stream: trio.abc.ReceiveStream, output: bytearray) -> None:
    async for chunk in stream:
        output += chunk[: OUTPUT_MAX - len(output)]


def reason_of(status: int) -> str:
    """An exit status, negative for a signal, in words that follow the name of a command; "" for success."""
    if status < 0:
        return f"was ended by {signal_name(-status)}"
    return f"failed with exit status {status}" if status else ""
