# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes, held so that a recycled PID can never be mistaken for the one that was meant.

A PID read from a file or from D-Bus is only a hint. It becomes a `Process` by opening a pidfd; whatever is then read
from `/proc/PID` counts only if the pidfd says afterwards that the process still had not ended, because until then the
number could not have been given to another.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
from collections.abc import Collection
from types import TracebackType

import psutil

# signal(7): those whose default action is to be ignored, or to continue.
_HARMLESS = frozenset({signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT})


class Gone(Exception):
    """The process has ended (or never was the one that was meant)."""


class Elsewhere(Exception):
    """A process is in a namespace that is not proved to be its service's: nothing is mounted or run there."""


class Process:
    """A process held by pidfd.

    Args:
        pid: as the manager told it.
        started: start time that the process must have (field 22 of `/proc/PID/stat`, clock ticks since boot), or
            None where the manager vouches for the PID itself.
        home: the mount namespace that it must be in (`namespace_id`); None where nobody has recorded one.

    Raises:
        Gone: no such process, or another one by now.
    """

    def __init__(self, pid: int, started: int | None = None, home: tuple[int, int] | None = None) -> None:
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise Gone(f"process {pid} has ended") from None
        self.pid, self.home = pid, home
        try:
            self.started = start_time(pid)
            if not self.alive() or started not in (None, self.started):
                raise Gone(f"process {pid} has ended")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process; may be called twice."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def alive(self) -> bool:
        """Whether it has not ended (a zombie has); not known any more of one that has been let go of: False."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def hold(self) -> Process:
        """Another hold on the same process, to be closed by whoever asked for it.

        Raises:
            Gone: this one has been let go of.
        """
        if self.pidfd < 0:
            raise Gone(f"process {self.pid} has ended")
        other = Process.__new__(Process)
        other.pid, other.started, other.home = self.pid, self.started, self.home
        other.pidfd = os.dup(self.pidfd)
        return other

    def comm(self) -> str:
        """Its name as the kernel has it; systemd's executor calls itself "(name)" until it becomes the service."""
        return self.read("comm").rstrip("\n")

    def mountinfo(self) -> str:
        """Its mount table; empty for a process that has chrooted itself away."""
        return self.read("mountinfo")

    def read(self, name: str) -> str:
        """A file of its directory in /proc.

        Raises:
            Gone: it has ended.
            PermissionError: not ours to look at.
        """
        return _text(self.read_bytes(name))

    def read_bytes(self, name: str) -> bytes:
        """See `read`."""
        found = _read_bytes(f"/proc/{self.pid}/{name}")
        if not self.alive():
            raise Gone(f"process {self.pid} has ended")
        return found

    def namespace(self, kind: str = "mnt") -> int:
        """A descriptor of one of its namespaces, which keeps that namespace whatever the process does next.

        Raises:
            Gone: it has ended.
            Elsewhere: it has left its mount namespace for another one.
            PermissionError: not ours to enter.
        """
        try:
            fd = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"process {self.pid} has ended") from None
        try:
            if not self.alive():
                raise Gone(f"process {self.pid} has ended")
            if kind == "mnt" and self.home not in (None, namespace_id(fd)):
                raise Elsewhere("has left the mount namespace that it was started in")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def at_home(self) -> bool:
        """Whether it is in the mount namespace that it must be in.

        Raises:
            FileNotFoundError: it has ended.
            PermissionError: not ours to look at.
        """
        return self.home in (None, namespace_id(f"/proc/{self.pid}/ns/mnt"))

    def survives(self, number: int) -> bool:
        """Whether it catches, ignores or blocks a signal, rather than being ended by it.

        A program that has only just been started has not got that far. Raises Gone.
        """
        if number in _HARMLESS:
            return True
        masks = re.findall(r"^Sig(?:Blk|Ign|Cgt):\t(\w+)$", self.read("status"), re.MULTILINE)
        # While a thread is in sigwait(3) the kernel takes what it waits for off its mask.
        return any(int(mask, 16) >> (number - 1) & 1 for mask in masks) or "sigtimedwait" in self.read(
            "wchan"
        )

    def signal(self, number: int) -> None:
        """Send a signal.

        Raises:
            Gone: it has ended.
        """
        if self.pidfd < 0:
            raise Gone(f"process {self.pid} has been let go of")
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            raise Gone(f"process {self.pid} has ended") from None


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22).

    Raises:
        Gone: there is no such process.
    """
    # comm, field 2, may hold spaces and parentheses: fields are counted from its last ")".
    return int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])


def descendants(pid: int, apart: Collection[int] = ()) -> list[int]:
    """PIDs of the children of a process, of theirs, and so on; hints, like every PID.

    Args:
        apart: PIDs that are left out, with their own children.
    """
    found: list[int] = []
    todo = [pid]
    while todo:
        children = [child for child in _children(todo.pop()) if child not in apart]
        found += children
        todo += children
    return found


def _children(pid: int) -> list[int]:
    # psutil reads the parent of every process on the machine for this: 4 ms with 300 of them, on the way of each drop.
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    except (Gone, FileNotFoundError, ProcessLookupError):
        if os.path.exists(f"/proc/{pid}/task/{pid}/children") or not os.path.exists(f"/proc/{pid}"):
            return []
        return [
            child.pid for child in psutil.Process(pid).children()
        ]  # a kernel without CONFIG_PROC_CHILDREN


def may_mount() -> bool:
    """Whether we are root of the host, who may mount images, and not of a user namespace alone.

    user_namespaces(7): the first one maps every ID to itself.
    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def namespace_id(fd_or_path: int | str) -> tuple[int, int]:
    """Identity of a namespace: device and inode of its file in nsfs (namespaces(7))."""
    status = os.stat(fd_or_path)
    return status.st_dev, status.st_ino


def shares_host(pid: int | str) -> bool:
    """Whether a process ("self" for our own) is in the mount namespace of PID 1.

    Raises:
        FileNotFoundError: it has ended.
        PermissionError: not ours to look at.
    """
    own = namespace_id(f"/proc/{pid}/ns/mnt")
    try:
        return own == namespace_id("/proc/1/ns/mnt")
    except PermissionError:  # in a user namespace: what is PID 1's cannot be ours
        return False


def _text(found: bytes) -> str:
    return found.decode("utf-8", "surrogateescape")


def _read(path: str) -> str:
    return _text(_read_bytes(path))


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"{path}: the process has ended") from None
    except OSError as error:
        # Tables of mounts: it is ending, and has left its namespaces already (fs/proc_namespace.c).
        if error.errno == errno.EINVAL:
            raise Gone(f"{path}: the process is ending") from None
        raise
