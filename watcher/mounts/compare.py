# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does a service show a stack already, although its mount table does not say so?

A stack that systemd mounted when it started the service carries no identity. What it shows is compared with what the
wanted stack would show, name by name and byte by byte. If all of it is the same, the service is taken over as it is,
without a swap and without a reload. A tree that is larger than any `/etc` counts as different.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from itertools import islice

from watcher.model import DEPTH_MAX, ENTRIES_MAX, Copy, Stack
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import look_up
from watcher.mounts.refresh import view_of
from watcher.mounts.swap import build
from watcher.mounts.workers import MountWorkers

_BYTES_MAX = 256 << 20
_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A service may put any file there: never wait for one, never follow a link.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# open(2) and read(2) fail so when a name is no longer what stat(2) saw.
_CHANGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK})


def shows(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> bool:
    """Whether `/etc` in a mount namespace (a descriptor) is what a stack would make it.

    Runs inside `MountWorkers.call()`. Types, modes, owners, link targets and contents count; times and extended
    attributes do not.

    Raises:
        Whatever `swap()` does.
    """
    view = view_of(workers, namespace)
    if view is not None:  # what the host has replaced since is no difference
        with contextlib.closing(view):
            view.drop_unused()
    with build(workers, namespace, stack, copies) as tree, Descriptors() as fds:
        with workers.entered(namespace):
            shown = fds.add(os.open(".", _DIRECTORY, dir_fd=fds.add(look_up())))
        wanted = fds.add(os.open(".", _DIRECTORY, dir_fd=tree))
        try:
            alike = _visible(os.fstat(shown)) == _visible(os.fstat(wanted))
            return alike and _Comparison().same_directory(shown, wanted)
        except OSError as error:
            if error.errno in _CHANGED:  # it is being edited
                return False
            raise


class _Comparison:
    """Compares two directory trees, which other processes may change meanwhile."""

    def __init__(self) -> None:
        self._entries = 0
        self._bytes = 0

    def same_directory(self, one: int, other: int, depth: int = 1) -> bool:
        names = self._names(one)
        too_large = depth > DEPTH_MAX or self._entries + len(names) > ENTRIES_MAX
        if too_large or names != self._names(other):
            return False
        self._entries += len(names)
        return all(self._same(one, other, name, depth) for name in names)

    def _names(self, directory: int) -> list[str]:
        with os.scandir(directory) as entries:  # of which there may be ten million
            return sorted(islice((entry.name for entry in entries), ENTRIES_MAX - self._entries + 1))

    def _same(self, one: int, other: int, name: str, depth: int) -> bool:
        first = os.stat(name, dir_fd=one, follow_symlinks=False)
        second = os.stat(name, dir_fd=other, follow_symlinks=False)
        if _visible(first) != _visible(second):
            return False
        if stat.S_ISLNK(first.st_mode):
            return os.readlink(name, dir_fd=one) == os.readlink(name, dir_fd=other)
        if stat.S_ISDIR(first.st_mode):
            with Descriptors() as fds:
                return self.same_directory(*_open_both(fds, one, other, name, _DIRECTORY), depth + 1)
        if stat.S_ISREG(first.st_mode) and not os.path.samestat(first, second):
            with Descriptors() as fds:
                return self._same_content(*_open_both(fds, one, other, name, _FILE))
        return True

    def _same_content(self, one: int, other: int) -> bool:
        while self._bytes <= _BYTES_MAX:
            first, second = os.read(one, _CHUNK), os.read(other, _CHUNK)
            if first != second:
                return False
            if not first:
                return True
            self._bytes += len(first)
        return False


def _visible(status: os.stat_result) -> tuple[int, ...]:
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, size)


def _open_both(fds: Descriptors, one: int, other: int, name: str, flags: int) -> tuple[int, int]:
    return fds.add(os.open(name, flags, dir_fd=one)), fds.add(os.open(name, flags, dir_fd=other))
