# SPDX-License-Identifier: LGPL-2.1-or-later
"""In which mount namespace a thread is, and how it gets to another one."""

from __future__ import annotations

import enum
import os
import threading
from typing import NamedTuple

from watcher.mounts import syscalls


class WorkerLost(Exception):
    """A worker could not come back from a namespace. It does nothing more (`is_lost()`)."""


class Place(enum.Enum):
    """Where a thread is."""

    ELSEWHERE = enum.auto()  # it is no worker
    HOME = enum.auto()
    WORKERS = enum.auto()  # in the workers' namespace, or from there in a service's


class _Here(threading.local):
    """Of one thread: where it is, a descriptor of its directory in /proc, and whether it could not come back."""

    place = Place.ELSEWHERE
    task = -1
    lost = False


here = _Here()


def is_lost() -> bool:
    """Whether this thread could not come back from a namespace, and so must not do anything more."""
    return here.lost


def name_it(name: str) -> None:
    """Call this thread so (proc_pid_comm(5)), 15 bytes at most. Raises OSError."""
    with open(os.open("comm", os.O_WRONLY | os.O_CLOEXEC, dir_fd=here.task), "w", encoding="ascii") as file:
        file.write(name)


def go(namespace: int) -> None:
    """Go to a mount namespace; root and working directory are its root."""
    # A thread that this one has started, also one that is just ending, shares both with it.
    syscalls.unshare(syscalls.CLONE_FS)
    syscalls.setns(namespace, syscalls.CLONE_NEWNS)


def root() -> int:
    """A descriptor of the root directory."""
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def is_root(fd: int) -> bool:
    """Whether a descriptor is of what is the root directory of this thread."""
    same = os.path.samestat(os.stat("/"), os.fstat(fd))
    return same and syscalls.mount_id("/", syscalls.AT_FDCWD) == syscalls.mount_id("", fd)


class Ours(NamedTuple):
    """A mount namespace of ours: descriptors of it, and of our root in it, -1 if chroot(2) has not changed that."""

    fd: int = -1
    root: int = -1

    def go(self) -> None:
        """Go there. Raises OSError."""
        go(self.fd)
        if self.root >= 0:
            os.fchdir(self.root)
            os.chroot(".")

    def without_root(self) -> Ours:
        """The same, where the root is that of the namespace."""
        os.close(self.root)
        return Ours(self.fd)

    def close(self) -> None:
        """Close the descriptors, if there are any."""
        for fd in self:
            if fd >= 0:
                os.close(fd)


def come_back(ours: Ours) -> None:
    """Go to a namespace of ours. Raises WorkerLost."""
    try:
        ours.go()
    except OSError as error:
        here.lost = True
        raise WorkerLost(f"no way back from a mount namespace: {error}") from error
