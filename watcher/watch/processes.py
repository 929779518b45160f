# SPDX-License-Identifier: LGPL-2.1-or-later
"""What /proc tells of other processes: who they are, and whether they have a file open for writing.

Each may end at any moment. That is no error: nothing is known of it then.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Iterator

import psutil

from watcher.text import shown

_KTHREADD = 2
# It is gone; or we have no descriptor left to ask by.
_UNKNOWN = (psutil.Error, OSError)


def name(pid: int) -> str | None:
    """What a process is called, "" if it is gone; None for a thread of the kernel, which writes for somebody else."""
    try:
        process = psutil.Process(pid)
        return None if pid == _KTHREADD or process.ppid() == _KTHREADD else process.name()
    except _UNKNOWN:
        return ""


def ancestors(pid: int) -> frozenset[int]:
    """The PIDs of a process's parent, and of that one's, and so on; none if it is gone."""
    try:
        return frozenset(one.pid for one in psutil.Process(pid).parents())
    except _UNKNOWN:
        return frozenset()


def waited_for(pid: int) -> int:
    """Grows whenever a process has waited for a child of its own (wait(2)): the page faults of these; 0: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[8])  # cminflt of proc(5)
    except (OSError, ValueError, IndexError):
        return 0


def others(until: float) -> Iterator[int]:
    """The PIDs of other processes, the youngest first, until that time."""
    try:
        pids = psutil.pids()
    except _UNKNOWN:
        return
    for pid in reversed(pids):
        if time.monotonic() > until:
            return
        if pid != os.getpid():
            yield pid


def has_open(pid: int, name: str) -> bool:
    """Whether a process has a file of that name open, in whichever way."""
    links = []
    with contextlib.suppress(OSError):  # it has ended
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # it has just closed that
                links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return any(os.path.basename(link) == name for link in links)


def is_writing(pid: int, name: str, found: os.stat_result) -> bool:
    """Whether a process has a file open for writing.

    Not by `psutil.Process.open_files()`: it asks for each file of the process, and one may be on a file system that
    does not answer. To read a link asks for nothing.

    Args:
        name: how its path ends; the rest of that is another one in other mount namespaces.
    """
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            if not os.readlink(f"/proc/{pid}/fd/{number}").endswith(name):
                continue
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
                flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
            if not flags & (os.O_WRONLY | os.O_RDWR):
                continue
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), found):
                return True
    except (OSError, ValueError, StopIteration):
        pass  # it has just ended, or closed it
    return False


def introduced(pid: int) -> str:
    """A process in words, "" if it is gone."""
    try:
        process = psutil.Process(pid)
        name, uid = process.name(), process.uids().effective
    except _UNKNOWN:
        return ""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return f"{shown(name)} (pid {pid}, user {shown(user)})"
