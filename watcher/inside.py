# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command where a service is: in its mount namespace, as its user, with its environment.

A worker that stands in a service's namespace can start an ordinary subprocess, which inherits that. The rest
(descriptors, numbers of user and groups, words) is made ready before: inside, every path and every name would resolve
in the service's files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import trio

from watcher.mounts.workshop import Workshop
from watcher.process import Process

OUTPUT_MAX = 64 * 1024
"""Bytes of a command's output that are kept."""


@dataclass(frozen=True, slots=True)
class Like:
    """Whose user, groups and environment a command gets.

    Attributes:
        user, group, groups: numbers; the file system's and the real ones are set alike.
        environment: of the process when it was started, and what is added to it.
    """

    user: int
    group: int
    groups: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: `reason` is "" for exit status 0, else words that follow its name; the output is cut."""

    reason: str
    output: str


def like(process: Process, extra: Mapping[str, str]) -> Like:
    """The credentials and the environment of a process, with `extra` added to the latter.

    Raises:
        Gone: it has ended.
    """
    fields = dict(line.partition(":")[::2] for line in process.read("status").splitlines())
    pairs = (pair.partition("=") for pair in process.read("environ").split("\0"))
    environment = {name: value for name, _, value in pairs if name}
    groups = tuple(int(group) for group in fields["Groups"].split())
    # Uid: and Gid: list real, effective, saved and file system's.
    user, group = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
    return Like(user, group, groups, {**environment, **extra})


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
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        child = await shop.run(_start, place, who, tuple(words), null, writing)
    except BaseException as error:
        os.close(reading)
        if isinstance(error, OSError):
            return Ended(f"cannot be started: {error.strerror}", "")
        raise
    finally:
        os.close(writing)
        os.close(null)
    return await _follow(child, reading, timeout_sec)


def _start(
    place: Callable[[], AbstractContextManager[None]],
    who: Like,
    words: Sequence[str],
    stdin: int,
    stdout: int,
) -> subprocess.Popen[bytes]:
    # All three, or a command of an unprivileged service would keep root's groups. In a user namespace of one user
    # there is nothing to change to, and setgroups() is not allowed.
    other = (who.user, who.group) != (os.geteuid(), os.getegid())
    user, group, groups = (who.user, who.group, who.groups) if other else (None, None, None)
    with place():
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=who.environment,
            user=user,
            group=group,
            extra_groups=groups,
            start_new_session=True,
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
        child.wait()
        os.close(pidfd)
    text = output.decode(errors="replace")
    if scope.cancelled_caught:
        return Ended(f"was killed: it took longer than {timeout_sec:g} s", text)
    return Ended(_reason(child.returncode), text)


async def _gather(stream: trio.abc.ReceiveStream, output: bytearray) -> None:
    async for chunk in stream:
        output += chunk[: OUTPUT_MAX - len(output)]


def _reason(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"failed with exit status {status}" if status else ""
