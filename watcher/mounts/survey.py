# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a service's mount namespace: what is on its `/etc`, and clones of what a new stack is made with."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Etc, Moved, hold
from watcher.mounts.mountinfo import Mount
from watcher.mounts.table import Table
from watcher.mounts.workers import MountWorkers


@dataclass(slots=True)
class Survey:
    """What was found at the first look.

    Attributes:
        table: the mount table.
        mountinfo: descriptor of it, which tells when it has changed.
        etc: `/etc`; None if only the table was looked at.
        old: descriptor of a clone of `/etc` with all on it, -1 if that is certainly nothing.
        root: descriptor of a clone of `/etc`, where that is the base itself; else of `/`, whose `etc` is.
        peel: the overlays that hide the base in that, uppermost first.
    """

    table: Table
    mountinfo: int
    etc: Etc | None = None
    old: int = -1
    root: int = -1
    peel: Sequence[Mount] = ()
    poll: select.poll = field(default_factory=select.poll)

    def __post_init__(self) -> None:
        self.poll.register(self.mountinfo, select.POLLPRI)

    def require(self) -> None:
        """In the service: nothing on `/etc` and below it has changed since.

        Raises:
            Moved: it has.
            Refused: `/etc` is no directory any more.
        """
        if self.poll.poll(0) and not self.table.same_etc(Table(read_rows(self.mountinfo))):
            raise Moved
        if self.etc is not None and not self.etc.is_there():
            raise Moved


def read_namespace(workers: MountWorkers, namespace: int, size_max: int | None = None) -> str:
    """The mountinfo of a namespace, from inside: that of a process that has changed its root shows nothing. Runs on a
    worker.

    Raises:
        TooLong: it has more than `size_max` bytes.
    """
    with workers.entered(namespace):
        mountinfo = workers.open_mountinfo()
        try:
            return read_rows(mountinfo, size_max)
        finally:
            os.close(mountinfo)


def survey(
    fds: Descriptors, workers: MountWorkers, namespace: int, needed: Callable[[Table], bool]
) -> Survey:
    """The first look at a namespace; with the clones if `needed()` by its mount table. Runs on a worker.

    Args:
        fds: closes what stays open.

    Raises:
        Moved: `/etc` was something else when it was opened.
        Refused: it is no directory.
    """
    with workers.entered(namespace):
        mountinfo = fds.add(workers.open_mountinfo())
        found = Survey(Table(read_rows(mountinfo)), mountinfo)
        table = found.table
        if needed(table):
            etc = found.etc = hold(fds)
            if etc.mount != table.top.id:
                raise Moved
            if table.on(table.top) or not table.chain:
                found.old = _clone(fds, etc.fd, syscalls.AT_RECURSIVE)
            _find_base(fds, found, etc)
    return found


def _find_base(fds: Descriptors, survey: Survey, etc: Etc) -> None:
    table = survey.table
    if not table.stacks:
        try:
            survey.root = _clone(fds, etc.fd, 0)
        except _Locked:
            survey.root = _clone(fds, etc.fd, syscalls.AT_RECURSIVE)
        return
    root = fds.add(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    if table.base_on_root:
        with contextlib.suppress(_Locked):
            survey.root = _clone(fds, root, 0)
            return
    survey.root = _clone(fds, root, syscalls.AT_RECURSIVE)
    survey.peel = table.stacks[::-1]


class _Locked(Exception):
    """What is mounted on it came with it from a more privileged namespace, and cannot be left out of a clone."""


def _clone(fds: Descriptors, directory: int, recursive: int) -> int:
    """In the service: a private clone of the mount of a directory, from that on."""
    try:
        flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | recursive
        tree = syscalls.open_tree(directory, "", flags)
    except OSError as error:
        if not recursive and error.errno == errno.EINVAL:  # mount_namespaces(7)
            raise _Locked from error
        raise
    fds.add(tree)
    syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH | recursive, propagation=syscalls.MS_PRIVATE)
    return tree


class TooLong(Exception):
    """A mount table is longer than we read."""


def read_rows(mountinfo: int, size_max: int | None = None) -> str:
    """The whole of a mountinfo file, again. Raises TooLong."""
    os.lseek(mountinfo, 0, os.SEEK_SET)
    parts, size = [], 0
    while part := os.read(mountinfo, 1 << 16):
        parts.append(part)
        size += len(part)
        if size_max is not None and size > size_max:
            raise TooLong
    return os.fsdecode(b"".join(parts))
