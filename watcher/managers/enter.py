# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that runs a command as a service would: enters namespaces, becomes like the service, executes.

A program with threads cannot join a user namespace, systemd has no setting for an existing mount namespace, and
nsenter(1) does not know a service's capabilities. What to do is read from a file that only root can open: the
service's environment may hold secrets, and what is in a command line everybody can read. Standard library only, so
that it starts at once.

In a transient unit of systemd's it becomes the command. Without systemd it is the daemon's child and stays where the
daemon is: a child of its own enters and becomes the command, and it ends when nothing of that is left. It has a socket
to the daemon as its standard input, and ends everything when the daemon closes that, or is killed.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from watcher.managers.become import become
from watcher.mounts import syscalls

TYPE_CHECKING = False  # typing's own costs more than all that is done here
if TYPE_CHECKING:
    from typing import NoReturn

    from watcher.managers.exec_context import ExecOrder

EXIT_EXEC = 203
"""The command could not be executed, as systemd.exec(5) has it."""

KINDS = {
    "mnt": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "user": syscalls.CLONE_NEWUSER,
}
"""The namespaces that are entered, by their names in /proc/PID/ns. The user namespace comes last: nothing else could be
entered from there, and from then on capabilities count only in it."""

_AGAIN_MAX_SEC = 1.0


def main(path: str) -> NoReturn:
    """Does what the order in a file says."""
    # The service may have the rights to trace what stands in its user namespace.
    syscalls.prctl_not_dumpable()
    with open(path, "rb") as file:
        told = marshal.load(file)
    told["context"] = SimpleNamespace(**told["context"])
    order: ExecOrder = SimpleNamespace(**told)  # type: ignore[assignment]
    if order.contained:
        _contain(order)
    else:
        _execute(
            order, _opened(order), lambda _, error: print(f"{order.words[0]}: {error.strerror}", flush=True)
        )


def _opened(order: ExecOrder) -> list[tuple[int, int]]:
    """Kinds and descriptors of namespaces, whose paths mean nothing any more inside.

    Without those that we are in: to enter one's own user namespace is an error, a sandbox may forbid the others.
    """
    found = []
    for kind, flag in KINDS.items():
        fd = os.open(order.namespaces[kind], os.O_RDONLY | os.O_CLOEXEC)
        if not os.path.sameopenfile(fd, os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)):
            found.append((flag, fd))
    return found


def _execute(
    order: ExecOrder, namespaces: Sequence[tuple[int, int]], failed: Callable[[str, OSError], object]
) -> NoReturn:
    """Become the command; `failed` is told in what it failed, "become" or "exec"."""
    who, doing = order.context, "become"
    # In a user namespace of one user there is nothing to change to, and setgroups() is not allowed.
    other = (who.user, who.group) != (os.geteuid(), os.getegid())
    # From here on an import would find the service's files.
    sys.meta_path.clear()
    try:
        if other:
            # First of all: the user namespace may not allow it (PrivateUsers= does not).
            os.setgroups(who.groups)
        for flag, fd in namespaces:
            syscalls.setns(fd, flag)
        become(who, other=other)
        doing = "exec"
        _search(order)
    except OSError as error:
        failed(doing, error)
    os._exit(EXIT_EXEC)


def _search(order: ExecOrder) -> None:
    """execvpe(3); Python's own imports something first."""
    words, environment = list(order.words), order.context.environment
    failure: OSError | None = None
    for directory in environment.get("PATH", os.defpath).split(":") if "/" not in words[0] else [""]:
        try:
            os.execve(os.path.join(directory, words[0]), words, environment)
        except (FileNotFoundError, NotADirectoryError) as error:
            failure = failure or error
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


# --- without systemd ---


def _contain(order: ExecOrder) -> NoReturn:
    # What ends the daemon may signal all of its processes; this one has to end the command first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    group = ""
    try:
        syscalls.prctl_child_subreaper()
        namespaces = _opened(order)
        group = _make_group(order.group)
        apart = order.private_pids and not group and _leave_pids()
        joined = group or order.context.cgroup
        child = _as_init(order, namespaces, joined) if apart else _start(order, namespaces, joined)
        if _ended(child) and not apart:
            _tell("status", os.waitpid(child, 0)[1])
    except OSError as error:
        _tell("become", error.errno)
    _end_all(group)
    sys.exit()


def _tell(what: str, number: int | None) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(0, f"{what} {number}\n".encode())


def _start(order: ExecOrder, namespaces: Sequence[tuple[int, int]], group: str) -> int:
    """Start the command; its PID."""
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    joining = os.open(f"{group}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) if group else -1
    child = os.fork()
    if child:
        os.close(null)
        return child
    talk = os.dup(0)

    def failed(what: str, error: OSError) -> None:
        os.write(talk, f"{what} {error.errno}\n".encode())

    try:
        os.dup2(null, 0)
        os.setsid()
        # Python ignores the last two, and what is ignored stays so.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if group:
            os.write(joining, b"0")
    except OSError as error:
        failed("become", error)
        os._exit(EXIT_EXEC)
    _execute(order, namespaces, failed)


def _leave_pids() -> bool:
    """Whether the children from now on are in a PID namespace of their own, which a sandbox may forbid."""
    with contextlib.suppress(OSError):
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return True
    return False


def _as_init(order: ExecOrder, namespaces: Sequence[tuple[int, int]], group: str) -> int:
    """Start the first process of a PID namespace, which starts the command; with it the kernel ends all others."""
    init = os.fork()
    if init:
        return init
    try:
        child = _start(order, namespaces, group)
        while True:
            pid, status = os.wait()
            if pid == child:
                _tell("status", status)
                break
    except OSError as error:
        _tell("become", error.errno)
    os._exit(0)


def _ended(child: int) -> bool:
    """Wait for the end of a child; False: the daemon does not want to know any more."""
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    return pidfd in dict(poll.poll())


def _end_all(group: str) -> None:
    """Kill what is left, and wait for that: what has lost its parent has become our child."""
    pause = 0.0
    while True:
        if group:
            with contextlib.suppress(OSError), open(f"{group}/cgroup.kill", "wb", buffering=0) as kill:
                kill.write(b"1")
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pause = 0.0
        except ChildProcessError:
            if not group or _remove_group(group):
                return
        for pid in _children():
            os.kill(pid, signal.SIGKILL)  # a child's number is not given to another before it is waited for
        time.sleep(pause)
        pause = min(2 * pause + 0.0001, _AGAIN_MAX_SEC)


def _children() -> list[int]:
    # At once: one that does nothing but start the next and end is not met by who takes longer than that.
    with (
        contextlib.suppress(FileNotFoundError),
        open(f"/proc/self/task/{os.getpid()}/children", "rb") as file,
    ):
        return [int(child) for child in file.read().split()]
    found = []  # a kernel without CONFIG_PROC_CHILDREN
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # comm, field 2, may hold spaces and parentheses; the parent is field 4.
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def _make_group(parent: str) -> str:
    """A control group of the command's own, "" where none can be had."""
    if not parent:
        return ""
    group = f"{parent}/confext-watcher-{os.getpid()}"
    try:
        os.mkdir(group)
        with open(f"{group}/cgroup.type", encoding="ascii") as file:
            if file.read().strip() == "domain" and os.path.exists(f"{group}/cgroup.kill"):
                return group
        os.rmdir(group)
    except OSError:
        pass  # read-only, or full, or gone
    return ""


def _remove_group(group: str) -> bool:
    """Whether it is gone, with what a command of root's has made below it."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not os.path.exists(group)
