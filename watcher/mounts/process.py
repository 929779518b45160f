# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes, held by pidfd, so that a recycled PID is never mistaken for the process that was meant.

A PID from a file or from D-Bus is only a hint. `Process` opens a pidfd for it. What is then read from `/proc/PID`
counts only if the pidfd says afterwards that the process has not ended: until then the kernel cannot have given the
PID to another one.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
from collections.abc import Callable, Collection

# The default action for these is to ignore them, or to continue (signal(7)).
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
        home: the mount namespace that it must be in (`namespace_id`); None where none is recorded.

    Raises:
        Gone: no such process, or another one by now.
    """

    def __init__(self, pid: int, started: int | None = None, home: tuple[int, int] | None = None) -> None:
        self.pid, self.home = pid, home
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise self._gone() from None
        try:
            self.started = start_time(pid)
            self._require_alive()
            if started not in (None, self.started):
                raise self._gone()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process; may be called twice."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def alive(self) -> bool:
        """Whether it has not ended; a zombie has. False after `close()`."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def _require_alive(self) -> None:
        if not self.alive():
            raise self._gone()

    def _gone(self) -> Gone:
        return Gone(f"process {self.pid} has ended")

    def hold(self) -> Process:
        """Another hold on the same process; the caller closes it. Raises Gone: this one is closed."""
        if self.pidfd < 0:
            raise self._gone()
        other = Process.__new__(Process)
        other.pid, other.started, other.home = self.pid, self.started, self.home
        other.pidfd = os.dup(self.pidfd)
        return other

    def read(self, name: str) -> str:
        """A file of its directory in /proc; "mountinfo" shows nothing for a process that has called chroot(2).

        Raises:
            Gone: it has ended.
            PermissionError: we may not look at it.
        """
        return os.fsdecode(self.read_bytes(name))

    def read_bytes(self, name: str) -> bytes:
        """See `read`."""
        content = _read(f"/proc/{self.pid}/{name}")
        self._require_alive()
        return content

    def namespace(self, kind: str = "mnt") -> int:
        """A descriptor of one of its namespaces, which keeps that namespace whatever the process does next.

        Raises:
            Gone: it has ended.
            Elsewhere: it has left its mount namespace for another one.
            PermissionError: we may not enter it.
        """
        try:
            fd = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise self._gone() from None
        try:
            self._require_alive()
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
            PermissionError: we may not look at it.
        """
        return self.home in (None, namespace_id(f"/proc/{self.pid}/ns/mnt"))

    def survives(self, number: int) -> bool:
        """Whether it catches, ignores or blocks a signal, or the signal does nothing by default.

        A program that has just been started may not have come to that yet. Raises Gone.
        """
        if number in _HARMLESS:
            return True
        masks = re.findall(r"^Sig(?:Blk|Ign|Cgt):\t(\w+)$", self.read("status"), re.MULTILINE)
        if any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
            return True
        # While a thread is in sigwait(3), the kernel takes the signals that it waits for off its mask.
        return "sigtimedwait" in self.read("wchan")

    def signal(self, number: int) -> None:
        """Send a signal. Raises Gone: it has ended."""
        if self.pidfd < 0:
            raise Gone(f"process {self.pid} has been let go of")
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            raise self._gone() from None


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22).

    Raises Gone: there is no such process.
    """
    # Field 2, the name, may hold blanks and parentheses: count the fields from the last ")".
    return int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])


def descendants(pid: int, apart: Callable[[], Collection[int]] = tuple) -> list[int]:
    """PIDs of the children of a process, of theirs, and so on; hints, like every PID.

    Args:
        apart: gives PIDs that are left out, with their own children. Most processes have none.
    """
    found: list[int] = []
    todo = [pid]
    others: Collection[int] | None = None
    while todo:
        children = _children(todo.pop())
        if children:
            others = apart() if others is None else others
            children = [child for child in children if child not in others]
        found += children
        todo += children
    return found


def _children(pid: int) -> list[int]:
    # psutil would read the parent of every process of the host: 4 ms with 300 of them, in each round.
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    except (Gone, FileNotFoundError, ProcessLookupError):
        if os.path.exists(f"/proc/{pid}/task/{pid}/children") or not os.path.exists(f"/proc/{pid}"):
            return []
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]  # a kernel without CONFIG_PROC_CHILDREN


def may_mount() -> bool:
    """Whether we may mount images: as root of the host, not of a user namespace.

    The first user namespace maps every ID to itself (user_namespaces(7)).
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
        PermissionError: we may not look at it.
    """
    own = namespace_id(f"/proc/{pid}/ns/mnt")
    try:
        return own == namespace_id("/proc/1/ns/mnt")
    except PermissionError:  # in a user namespace: what is PID 1's cannot be ours
        return False


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"{path}: the process has ended") from None
    except OSError as error:
        # A mount table of a process that is ending and has left its namespaces already (fs/proc_namespace.c).
        if error.errno == errno.EINVAL:
            raise Gone(f"{path}: the process is ending") from None
        raise
