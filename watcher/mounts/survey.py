# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a service's mount namespace: what is on its `/etc`, and clones of what a new stack is made of."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Etc, Moved, clone, hold
from watcher.mounts.mountinfo import Mount
from watcher.mounts.table import Table
from watcher.mounts.workers import MountWorkers


@dataclass(slots=True)
class Survey:
    """What the first look found; descriptors, -1 where there is none.

    Attributes:
        table: the mount table.
        mountinfo: the file that `table` was read from; poll(2) tells when the mount table has changed since.
        etc: `/etc`; None if only the table was looked at.
        old: a clone of `/etc` with all on it, if anything can be.
        root: a clone of `/etc`, if that is the base; else of `/`, whose `etc` is the base.
        peel: the overlays that hide the base in `root`, uppermost first.
    """

    table: Table
    mountinfo: int
    etc: Etc | None = None
    old: int = -1
    root: int = -1
    peel: Sequence[Mount] = ()

    def require(self) -> None:
        """In the service: nothing on `/etc` and below it has changed since.

        Raises:
            Moved: it has.
            Refused: `/etc` is no directory any more.
        """
        poll = select.poll()
        poll.register(self.mountinfo, select.POLLPRI)
        if poll.poll(0) and not self.table.same_etc(Table(_read_all(self.mountinfo))):
            raise Moved
        if self.etc is not None and not self.etc.is_there():
            raise Moved


def read_namespace(workers: MountWorkers, namespace: int, size_max: int | None = None) -> str:
    """The mountinfo of a namespace. Runs inside `MountWorkers.call()`.

    It is read inside the namespace: the mountinfo of a process that has called chroot(2) shows nothing.

    Raises:
        TooLong: it has more than `size_max` bytes.
    """
    with workers.entered(namespace):
        return read_own(workers, size_max)


def read_own(workers: MountWorkers, size_max: int | None = None) -> str:
    """The mountinfo of the namespace that this worker is in. Raises TooLong."""
    mountinfo = workers.open_mountinfo()
    try:
        return _read_all(mountinfo, size_max)
    finally:
        os.close(mountinfo)


def survey(
    fds: Descriptors, workers: MountWorkers, namespace: int, needed: Callable[[Table], bool]
) -> Survey:
    """The first look at a namespace; with the clones if they are `needed()`. Runs inside `MountWorkers.call()`.

    Args:
        fds: closes the descriptors.
        needed: decides by the mount table. Called inside the service's namespace: nothing but computing.

    Raises:
        Moved: `/etc` was something else when it was opened.
        Refused: it is no directory.
    """
    with workers.entered(namespace):
        mountinfo = fds.add(workers.open_mountinfo())
        found = Survey(Table(_read_all(mountinfo)), mountinfo)
        table = found.table
        if needed(table):
            etc = found.etc = hold(fds, table.top)
            if table.on(table.top) or not table.chain:
                found.old, _ = private_clone(fds, etc.fd, whole=True)
            if not table.stacks:
                found.root, _ = private_clone(fds, etc.fd, whole=False)
            else:
                clone_base(fds, found)
    return found


def clone_base(fds: Descriptors, found: Survey) -> None:
    """In the service, which shows a stack: set `root` and `peel`."""
    table = found.table
    root = fds.add(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    found.root, whole = private_clone(fds, root, whole=not table.base_on_root)
    found.peel = table.stacks[::-1] if whole else ()


def private_clone(fds: Descriptors, directory: int, *, whole: bool) -> tuple[int, bool]:
    """In the service: `clone()`; what is then done to the clone does not reach the service."""
    tree, whole = clone(fds, directory, whole=whole)
    flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if whole else 0)
    syscalls.mount_setattr(tree, "", flags, propagation=syscalls.MS_PRIVATE)
    return tree, whole


class TooLong(Exception):
    """A mount table is longer than is read."""


def _read_all(mountinfo: int, size_max: int | None = None) -> str:
    """All of a mountinfo file, from its beginning. Raises TooLong."""
    os.lseek(mountinfo, 0, os.SEEK_SET)
    parts, size = [], 0
    while part := os.read(mountinfo, 1 << 16):
        parts.append(part)
        size += len(part)
        if size_max is not None and size > size_max:
            raise TooLong
    return os.fsdecode(b"".join(parts))
