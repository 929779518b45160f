# SPDX-License-Identifier: LGPL-2.1-or-later
"""`/etc` of a service, held by descriptor.

A service that may write to its own root can make any path in it lead elsewhere at the next look: to another directory,
or through a link to a path that in our own namespace is the host's. So `/etc` is looked up without following any link,
all later steps work on the descriptor, and the last step first looks `/etc` up again: it must be the same directory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass

from watcher.model import Refused
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.mountinfo import Mount

_NO_LINK = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS

# openat2(2) fails so where there is nothing, or a link is on the way.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Moved(Exception):
    """`/etc` of the service changed while a stack was put together for it: look again."""


@dataclass(frozen=True, slots=True)
class Etc:
    """What a look at `/etc` found.

    Attributes:
        fd: O_PATH descriptor of the directory, or of the root of the uppermost mount on it.
        mount: ID of its mount, as in mountinfo.
    """

    fd: int
    mount: int

    def is_there(self) -> bool:
        """In the service: whether `/etc` is still the same directory of the same mount."""
        with Descriptors() as fds:
            now = hold(fds)
            return now.mount == self.mount and os.path.samestat(os.fstat(now.fd), os.fstat(self.fd))


def look_up() -> int:
    """In the service: an O_PATH descriptor of its `/etc`, or of the root of the uppermost mount on it.

    Raises Refused: it is no directory.
    """
    try:
        return syscalls.openat2(syscalls.AT_FDCWD, "/etc", os.O_PATH | os.O_DIRECTORY, _NO_LINK)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise Refused("the service's root has no /etc: make it a directory") from None
        if error.errno not in _NOTHING_THERE:
            raise
        what = "a symbolic link" if error.errno == errno.ELOOP else "no directory"
        raise Refused(f"/etc in the service's root is {what}: only a directory can carry a stack") from None


def hold(fds: Descriptors, mount: Mount | None = None) -> Etc:
    """In the service: its `/etc` as it is now.

    Raises:
        Moved: it does not belong to `mount`.
        Refused: see `look_up()`.
    """
    fd = fds.add(look_up())
    etc = Etc(fd, syscalls.mount_id("", fd))
    if mount is not None and etc.mount != mount.id:
        raise Moved
    return etc


def lift(mounts: Iterable[Mount]) -> None:
    """In the service: unmount these from `/etc`, the uppermost first.

    Raises Moved: another mount is the uppermost; it stays.
    """
    for mount in mounts:
        with Descriptors() as fds:
            unmount(hold(fds, mount).fd)


def mount_on(tree: int, directory: int, flags: int = 0) -> None:
    """Mount a detached tree on a directory; both are descriptors, `flags` more MOVE_MOUNT_ flags of move_mount(2)."""
    empty = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
    syscalls.move_mount(tree, "", directory, "", empty | flags)


def unmount(root: int) -> None:
    """Lazily unmount the mount behind a descriptor of its root, or the uppermost mount on that.

    The working directory is in an unmounted mount afterwards.
    """
    os.fchdir(root)
    syscalls.umount2(".", syscalls.MNT_DETACH)


def clone(fds: Descriptors, directory: int, *, whole: bool) -> tuple[int, bool]:
    """A descriptor of a detached clone of the mount of a directory, and whether the mounts on it came with it.

    They come if they are asked for (`whole`), or if they came from a more privileged namespace together with it and
    cannot be left out (mount_namespaces(7)).
    """
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
    if not whole:
        try:
            return fds.add(syscalls.open_tree(directory, "", flags)), False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return fds.add(syscalls.open_tree(directory, "", flags | syscalls.AT_RECURSIVE)), True


def open_inside(directory: int, path: str, flags: int = os.O_PATH, resolve: int = 0) -> int | None:
    """A descriptor of what is at a path in a directory; None if that is nothing, or a link is on the way.

    Args:
        resolve: more RESOLVE_ flags of openat2(2).
    """
    try:
        return syscalls.openat2(directory, path, flags, syscalls.RESOLVE_INSIDE | resolve)
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise


def open_etc(fds: Descriptors, root: int, resolve: int = 0) -> int:
    """An O_PATH descriptor of the directory `etc` in another directory, as `open_inside()` finds it.

    Raises NotADirectoryError: there is none.
    """
    fd = open_inside(root, "etc", os.O_PATH | os.O_DIRECTORY, resolve)
    if fd is None:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "etc")
    return fds.add(fd)
