# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of our own, and the files and trees in them, which no other user can reach: make, sync, remove."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# Of threads, and of entries for each thread.
_THREADS = 16
_ENTRIES = 8

# So many paths cost more than a file system does.
_PATHS_MAX = 16
# KiB that may wait for the disks of the machine, so that a file system is on its own in a moment.
_DIRTY_MAX = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


def make(path: str, mode: int = 0o755) -> None:
    """Make a directory of ours, with those above it; one that is there will do if no other user can change it.

    Raises:
        PermissionError: another user can.
        OSError: it cannot be made.
    """
    os.makedirs(path, mode, exist_ok=True)
    found = os.stat(path)
    group = found.st_mode & stat.S_IWGRP and found.st_gid not in (0, os.getegid())
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH or group:
        owner = "root" if os.geteuid() == 0 else "yourself"
        raise PermissionError(
            errno.EPERM, f"others can change it: chown it to {owner}, and chmod go-w, or name another", path
        )


def fsync_tree(root: int, entries: int) -> None:
    """fsync(2) of `root` and of all below it, about `entries` files and directories."""
    _fsync(_descriptors(root), min(_THREADS, entries // _ENTRIES))


def fsync(*paths: str) -> None:
    """fsync(2) of files and directories; a directory's gets its entries on the disk, not what they name.

    Raises OSError: one is not on the disk, or not known to be.
    """
    # For half a dozen paths no other thread: the flush that the first one waits for takes the others along.
    _fsync((os.open(path, _FILE) for path in paths), min(_THREADS, len(paths) // _ENTRIES))


def fsync_all(groups: Sequence[Sequence[str]]) -> None:
    """`fsync()` for several who wait for that.

    For many paths syncfs(2) is faster: one commit, one flush. But it waits for what others have written there, too. So
    it is for a machine that has written little: `fsync()` waits for our own files, however much that is.
    """
    paths = tuple(dict.fromkeys(chain.from_iterable(groups)))
    if len(paths) <= _PATHS_MAX or _dirty() > _DIRTY_MAX:
        fsync(*paths)
        return
    for path in {os.stat(path, follow_symlinks=False).st_dev: path for path in paths}.values():
        fd = os.open(path, _FILE)
        try:
            if _libc.syncfs(fd):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        finally:
            os.close(fd)


def _dirty() -> int:
    """KiB that are to be written, or are just being written, to all disks (proc_meminfo(5))."""
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = (line.split() for line in file)
        return sum(int(row[1]) for row in rows if row[0] in ("Dirty:", "Writeback:"))


def _fsync(descriptors: Generator[int, None, None], helpers: int) -> None:
    """fsync(2) and close each descriptor.

    An fsync waits for a flush of the disk's cache. The kernel makes one flush for all that wait at the same time. So
    sixteen threads are several times as fast as one.
    """
    taking = threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        try:
            while True:
                with taking:
                    fd = next(descriptors, None)
                if fd is None:
                    return
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as error:
            errors.append(error)

    started: list[threading.Thread] = []
    with closing(descriptors):
        for _ in range(helpers):
            thread = threading.Thread(target=work, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break  # the limit of threads: fewer will do
            started.append(thread)
        work()
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]


def _descriptors(root: int) -> Generator[int, None, None]:
    """One for each file and directory; the caller closes it."""
    for name in os.listdir(root):
        mode = os.stat(name, dir_fd=root, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            yield os.open(name, _FILE, dir_fd=root)
        elif stat.S_ISDIR(mode):
            directory = os.open(name, _DIRECTORY, dir_fd=root)
            try:
                yield from _descriptors(directory)
            finally:
                os.close(directory)
    yield os.dup(root)


def remove(name: str, parent: int) -> None:
    """Remove the tree (or file) `name` of the directory `parent`, if it is there."""
    try:
        os.unlink(name, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    # A directory's own mode may forbid its owner to empty it. No other user can reach this copy meanwhile.
    os.chmod(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        for child in os.listdir(fd):
            remove(child, fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
