# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command where a service is: in its namespaces, as its user, with its environment, and no more rights.

What the command is and may do is what the main process is and may do at the moment, as the kernel tells it in one
piece, if that counts: rights of a user namespace that the service has made itself are none of the host's, and those of
a set-user-ID program that it has executed (`su`, asking for a password) are not its own.

A small program enters (`enter.py`), with systemd as a transient unit (`transient.py`), without it as a child
of ours (`run_as_child`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import trio

import watcher
from watcher.managers import cgroup
from watcher.managers.enter import KINDS
from watcher.managers.exec_context import ExecContext, ExecOrder
from watcher.model import Later, shown
from watcher.mounts.process import Gone, Process, namespace_id
from watcher.settings.signals import reason_of

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
"""The program that enters; it is given the path of its order."""

# Seconds that killed processes are waited for; those that the kernel does not let go of are left to `enter.py`.
_DYING_SEC = 5.0

# How often one that executes another program is looked at again, and after how many seconds.
_TRIES, _EXECUTING_SEC = 20, 0.005

# What the machine is short of, which says nothing about the command.
_SHORT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC})

# Keys of the auxiliary vector (getauxval(3)): what a process had when it executed its program.
_AT_PAGESZ, _AT_UID, _AT_EUID, _AT_GID, _AT_EGID, _AT_SECURE = 6, 11, 12, 13, 14, 23


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: `reason` is "" for exit status 0, else words that follow its name; the output is cut."""

    reason: str
    output: str


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what may block on a service's file system or memory, away from the event loop, while it is wanted.

    In a thread of its own, not one of trio's forty: a service that does not answer waits for itself alone.
    """
    alone = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(
        lambda: function(*args, **kwargs), abandon_on_cancel=True, limiter=alone
    )


# --- who ---


def context_of(main: Process, environment: Mapping[str, str] | None = None) -> ExecContext:
    """What a service's main process has and is limited to. Blocks.

    Args:
        environment: what it was started with; None: what it has, which whoever controls it can choose.

    Raises:
        Gone: it has ended.
        Later: its rights are not its own.
    """
    executed, status, environ = _of_one_execution(main, with_environment=environment is None)
    fields = dict(line.partition(":")[::2] for line in status.split("\n"))
    # Uid: and Gid: list real, effective, saved and file system's.
    users, groups = (tuple(map(int, fields[key].split())) for key in ("Uid", "Gid"))
    _check_own(main, executed, users, groups)
    if environment is None:
        pairs = (pair.partition("=") for pair in environ.split("\0"))
        environment = {name: value for name, _, value in pairs if name}
    bounding = int(fields["CapBnd"], 16)
    root, root_id = _root(main)
    return ExecContext(
        users[1],
        groups[1],
        tuple(int(group) for group in fields["Groups"].split()),
        {**environment, "MAINPID": str(main.pid)},
        # A program that root executes gets all that is in the bounding set, one that dropped some must not see it get
        # them back.
        bounding=bounding & int(fields["CapPrm"], 16) if users[1] == 0 else bounding,
        ambient=int(fields["CapAmb"], 16),
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
        root=root,
        root_id=root_id,
        cgroup=_cgroup(main),
    )


def _of_one_execution(main: Process, *, with_environment: bool) -> tuple[dict[int, int], str, str]:
    """The auxiliary vector, the status and the environment of a process that executes nothing else meanwhile.

    Its user may have written another vector into his own program (PR_SET_MM_MAP), and execute a set-user-ID one next.
    """
    for _ in range(_TRIES):
        executed = _executed(main)
        status, environ = main.read("status"), main.read("environ") if with_environment else ""
        if executed and executed == _executed(main):
            return executed, status, environ
        time.sleep(_EXECUTING_SEC)
    raise Later("could not be run: it is not known as whom its main process was executed")


def _executed(main: Process) -> dict[int, int]:
    """The auxiliary vector; {} while another program takes over."""
    vector = main.read_bytes("auxv")
    for pair in (struct.Struct("=QQ"), struct.Struct("=II")):  # of a 64-bit program, of a 32-bit one
        found = dict(pair.iter_unpack(vector[: len(vector) // pair.size * pair.size]))
        if found.get(_AT_PAGESZ) == os.sysconf("SC_PAGESIZE"):
            return found
    return {}


def _check_own(
    main: Process, executed: Mapping[int, int], users: Sequence[int], groups: Sequence[int]
) -> None:
    """Refuse rights that the main process was lent.

    A program that another user than root has executed can only become somebody else if it is set-user-ID or
    set-group-ID, or has a capability for it. In another user namespace than ours numbers mean something else; but that
    is entered.
    """
    # What the kernel says; anybody can make his own program's vector say something else, before he executes another.
    lent = users[0] != 0 and (len(set(users)) > 1 or len(set(groups)) > 1)
    user = executed[_AT_UID]
    before, after = (user, executed[_AT_GID]), (executed[_AT_EUID], executed[_AT_EGID])
    ours = namespace_id(f"/proc/{main.pid}/ns/user") == namespace_id("/proc/self/ns/user")
    if lent or (executed[_AT_SECURE] and before != after) or (ours and user != 0 and set(users) != {user}):
        raise Later(
            "could not be run: its main process runs a program with rights that are not its own;"
            " start it as the user that it is to be"
        )


def _root(main: Process) -> tuple[str, tuple[int, int]]:
    try:
        path = f"/proc/{main.pid}/root"
        found = os.readlink(path), namespace_id(path)
    except FileNotFoundError:
        raise Gone(f"process {main.pid} has ended") from None
    if not main.alive():
        raise Gone(f"process {main.pid} has ended")
    return found


def _cgroup(main: Process) -> str:
    """Directory of a process's control group, "" if it is ours too, or cannot be seen from here."""
    path = cgroup.directory(main.read("cgroup"))
    other = path not in ("", cgroup.own_directory())
    return path if other and os.access(f"{path}/cgroup.procs", os.W_OK) else ""


def group_for(who: ExecContext) -> str:
    """The control group below which a command gets one of its own, "" if none will do.

    The service's, so that its limits hold. One that is not ours is delegated: its owner could move the command out.
    """
    path = who.cgroup or cgroup.own_directory()
    try:
        return path if path and os.stat(path).st_uid == os.geteuid() else ""
    except OSError:
        return ""


# --- how ---


def path_of(fd: int) -> str:
    """How root finds one of our descriptors."""
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
def told(order: ExecOrder) -> Iterator[str]:
    """The path of an order, for `PROGRAM`."""
    fd = os.memfd_create("confext-watcher-order", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(order.dump())
        yield path_of(fd)
    finally:
        os.close(fd)


Run = Callable[[str, Process, int, ExecContext, Sequence[str], float], Awaitable[Ended]]
"""Runs a command (`words`) for a service, like somebody, in a mount namespace (a descriptor) and in the other
namespaces of its main process, for so many seconds at most; nothing of it survives.

    run(service, main, namespace, context, words, timeout_sec) -> Ended

Raises:
    Gone: the main process has ended.
    Later: the machine could not run it now.
"""


async def run_as_child(
    service: str, main: Process, namespace: int, who: ExecContext, words: Sequence[str], timeout_sec: float
) -> Ended:
    """`Run` without systemd."""
    own = main.namespace()
    try:
        # In a shadow it can have nothing to do with the service itself, whose PID would mean nothing to it.
        shadowed = namespace_id(namespace) != namespace_id(own)
    finally:
        os.close(own)
    with namespaces(main, namespace) as paths:
        order = ExecOrder(paths, who, words, contained=True, group=group_for(who), private_pids=shadowed)
        return await run(order, timeout_sec=timeout_sec)


async def run(order: ExecOrder, *, timeout_sec: float) -> Ended:
    """Run a command as a child of ours and wait for its end; nothing of it survives.

    Args:
        order: one that is `contained`.
        timeout_sec: seconds after which it is killed.

    Raises:
        Later: the machine could not start it now.
    """
    with contextlib.ExitStack() as held:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stream = trio.lowlevel.FdStream(reading)
        held.callback(stream.close)
        try:
            with ours, told(order) as path:
                try:
                    child = await trio.to_thread.run_sync(_start, path, theirs, writing)
                except OSError as error:
                    raise Later(f"could not be run: {error.strerror}") from error
                finally:
                    theirs.close()
                    os.close(writing)
                return await _follow(child, ours, stream, timeout_sec)
        finally:
            theirs.close()


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
                # What holds the pipe open is about to be killed.
                nursery.cancel_scope.deadline = trio.current_time() + 0.1
    finally:
        talk.close()
        await _reap(child, pidfd)
        os.close(pidfd)
    text = output.decode(errors="replace")
    if scope.cancelled_caught:
        return Ended(f"was killed: it took longer than {timeout_sec:g} s", text)
    return Ended(_reason(said.decode(), text), text)


def _reason(said: str, output: str) -> str:
    """What `enter.py` said in words that follow the name of a command; "" for success.

    Raises:
        Later: it says nothing about the command.
    """
    if not said:
        raise Later(f"could not be run: what was to run it has failed{last_line(output)}")
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
    threading.Thread(target=child.wait, name="reaper", daemon=True).start()


async def gather(stream: trio.abc.ReceiveStream, output: bytearray) -> None:
    """Read what a command prints to its end, and keep the first OUTPUT_MAX bytes."""
    async for chunk in stream:
        output += chunk[: OUTPUT_MAX - len(output)]


def last_line(output: str) -> str:
    """The end of what was printed, which mostly says what is wrong: " (LINE)", or ""."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f" ({shown(lines[-1][:200])})" if lines else ""
