# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that runs a command as a service would: it enters the service's namespaces, takes on its user and rights,
and executes the command.

A program with threads cannot join a user namespace. systemd has no setting for a mount namespace that exists already.
nsenter(1) does not know a service's capabilities. The order comes in a file that only root can open: the environment in
it may hold secrets, and everybody can read a command line. Standard library only, so that it starts at once.

In a transient unit of systemd this program becomes the command. Without systemd it is a child of the daemon, and stays
where the daemon is: a child of its own enters and becomes the command. It ends when no process of the command is left.
Its standard input is a socket to the daemon. When the daemon closes that, or is killed, it kills the command.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from watcher.mounts import syscalls

TYPE_CHECKING = False  # importing `typing` takes longer than all the rest here
if TYPE_CHECKING:
    from typing import NoReturn

    from watcher.managers.exec_context import ExecContext, ExecOrder

EXIT_EXEC = 203
"""The command could not be executed, as systemd.exec(5) has it."""

KINDS = {
    "mnt": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "user": syscalls.CLONE_NEWUSER,
}
"""The namespaces that are entered, by their names in /proc/PID/ns. The user namespace comes last: from inside it no
other could be entered, because capabilities then count only there."""

_AGAIN_MAX_SEC = 1.0

with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as _file:
    _CAPABILITIES = range(int(_file.read()) + 1)


def main(path: str) -> NoReturn:
    """Carry out the order in a file (`ExecOrder.dump()`)."""
    # A service that may trace what is in its user namespace must not trace this program there.
    syscalls.prctl_not_dumpable()
    with open(path, "rb") as file:
        fields = marshal.load(file)
    fields["context"] = SimpleNamespace(**fields["context"])
    order: ExecOrder = SimpleNamespace(**fields)  # type: ignore[assignment]
    if order.contained:
        _contain(order)
    else:

        def failed(what: str, error: OSError) -> None:
            print(f"{order.words[0]}: {error.strerror}", flush=True)

        _execute(order, _open_namespaces(order), failed)


def _open_namespaces(order: ExecOrder) -> list[tuple[int, int]]:
    """Flags and descriptors of the namespaces to enter; inside, their paths mean nothing any more.

    Those that this process is in already are left out: entering one's own user namespace is an error, and a sandbox may
    forbid the others.
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
    """Become the command; `failed` is called with the step that failed, "become" or "exec"."""
    context, doing = order.context, "become"
    # A user namespace of one user has no other user, and setgroups() is not allowed there.
    other = (context.user, context.group) != (os.geteuid(), os.getegid())
    # From here on an import would find the service's files.
    sys.meta_path.clear()
    try:
        if other:
            # Outside, because the user namespace may not allow it (PrivateUsers= does not).
            os.setgroups(context.groups)
        for flag, fd in namespaces:
            syscalls.setns(fd, flag)
        _become(context, other=other)
        doing = "exec"
        _execvpe(order)
    except OSError as error:
        failed(doing, error)
    os._exit(EXIT_EXEC)


def _become(context: ExecContext, *, other: bool) -> None:
    """In the service's namespaces: take on its root directory, user and capabilities. The groups are set already.

    Args:
        other: whether user and group are to be changed at all.

    Raises:
        OSError: nothing must be executed then.
    """
    _enter_root(context)
    for capability in _CAPABILITIES:
        if not context.bounding >> capability & 1:
            syscalls.prctl_capbset_drop(capability)
    if other:
        syscalls.prctl_keepcaps()
        os.setresgid(context.group, context.group, context.group)
        os.setresuid(context.user, context.user, context.user)
    if other or context.user != 0:
        # A program of root gets what is in the bounding set, one of another user what is ambient.
        syscalls.capset(context.ambient, context.ambient, context.ambient)
        for capability in _CAPABILITIES:
            if context.ambient >> capability & 1:
                syscalls.prctl_cap_ambient_raise(capability)
    if context.no_new_privs:
        syscalls.prctl_no_new_privs()


def _enter_root(context: ExecContext) -> None:
    """Enter the service's root directory, and no other: the owner of a directory above may have exchanged it.

    A descriptor would not do: in a shadow of the mount namespace it leads to the original.
    """
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if context.root != "/":
        fd = syscalls.openat2(
            fd, context.root.lstrip("/"), os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_INSIDE
        )
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != tuple(context.root_id):
        raise OSError(errno.ESTALE, "its root directory is not where it was")
    os.fchdir(fd)
    if context.root != "/":
        os.chroot(".")


def _execvpe(order: ExecOrder) -> None:
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
    # Who stops the daemon may signal all of its processes. This one has to kill the command first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    group = ""
    try:
        syscalls.prctl_child_subreaper()
        namespaces = _open_namespaces(order)
        group = _make_group(order.group)
        apart = order.private_pids and not group and _unshare_pids()
        start = _start_below_init if apart else _start
        child = start(order, namespaces, group or order.context.cgroup)
        if _wait(child) and not apart:
            _report("status", os.waitpid(child, 0)[1])
    except OSError as error:
        _report("become", error.errno)
    _kill_all(group)
    sys.exit()


def _report(what: str, number: int | None) -> None:
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
        # Python ignores the last two, and an ignored signal stays ignored after execve(2).
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if group:
            os.write(joining, b"0")
    except OSError as error:
        failed("become", error)
        os._exit(EXIT_EXEC)
    _execute(order, namespaces, failed)


def _unshare_pids() -> bool:
    """Have a PID namespace for the children from now on; False: a sandbox forbids it."""
    with contextlib.suppress(OSError):
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return True
    return False


def _start_below_init(order: ExecOrder, namespaces: Sequence[tuple[int, int]], group: str) -> int:
    """Start the init of a PID namespace, which starts the command; its PID. When it ends, the kernel kills the rest."""
    init = os.fork()
    if init:
        return init
    try:
        child = _start(order, namespaces, group)
        while True:
            pid, status = os.wait()
            if pid == child:
                _report("status", status)
                break
    except OSError as error:
        _report("become", error.errno)
    os._exit(0)


def _wait(child: int) -> bool:
    """Wait for the end of a child; False: the daemon has hung up first."""
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    return pidfd in dict(poll.poll())


def _kill_all(group: str) -> None:
    """Kill what is left of the command, and wait for it. A process that has lost its parent is our child now."""
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
            os.kill(pid, signal.SIGKILL)  # the PID of a child is not used again before we wait for it
        time.sleep(pause)
        pause = min(2 * pause + 0.0001, _AGAIN_MAX_SEC)


def _children() -> list[int]:
    # One read, because a process may do nothing but start the next one and end: a slower look would never meet it.
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
    """A control group for the command; "" where none can be had."""
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
        pass  # the parent is read-only, full, or gone
    return ""


def _remove_group(group: str) -> bool:
    """Remove the group, with the groups that a command of root may have made below it; whether it is gone."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not os.path.exists(group)
