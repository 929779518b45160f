# SPDX-License-Identifier: LGPL-2.1-or-later
"""In which mount namespace a thread is, and how it gets to another one."""

from __future__ import annotations

import enum
import os
import threading

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


def come_back(namespace: int) -> None:
    """Go to a namespace of ours. Raises WorkerLost."""
    try:
        go(namespace)
    except OSError as error:
        here.lost = True
        raise WorkerLost(f"no way back from a mount namespace: {error}") from error
