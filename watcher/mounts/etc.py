# SPDX-License-Identifier: LGPL-2.1-or-later
"""`/etc` of a service, held by descriptor.

A service may be able to write to its own root. Then a path in it leads elsewhere at the next look: to another
directory, or through a link to a path that in the workshop is the host's. So `/etc` is looked up without following any
link, all later steps work on what was found then, and before the last step it is looked up again: it must still be the
same.
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

_NOT_A_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Moved(Exception):
    """`/etc` of the service kept changing while a stack was put together for it: look again."""


@dataclass(frozen=True, slots=True)
class Etc:
    """What was found at `/etc` once.

    Attributes:
        fd: O_PATH descriptor of the directory, or of the root of the uppermost mount on it.
        mount: ID of the mount that it belongs to, as in mountinfo.
    """

    fd: int
    mount: int

    def is_there(self) -> bool:
        """In the service: whether `/etc` is still the same directory of the same mount."""
        with Descriptors() as fds:
            now = hold(fds)
            return now.mount == self.mount and os.path.samestat(os.fstat(now.fd), os.fstat(self.fd))


def look_up() -> int:
    """In the service: an O_PATH descriptor of its `/etc`, or of what is mounted uppermost on that.

    Raises:
        Refused: it is no directory.
    """
    try:
        return syscalls.openat2(syscalls.AT_FDCWD, "/etc", os.O_PATH | os.O_DIRECTORY, _NO_LINK)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise Refused("the service's root has no /etc: make it a directory") from None
        if error.errno not in _NOT_A_DIRECTORY:
            raise
        what = "a symbolic link" if error.errno == errno.ELOOP else "no directory"
        raise Refused(f"/etc in the service's root is {what}: only a directory can carry a stack") from None


def hold(fds: Descriptors) -> Etc:
    """In the service: its `/etc` as it is now. Raises as `look_up()` does."""
    fd = fds.add(look_up())
    return Etc(fd, syscalls.mount_id("", fd))


def lift(mounts: Iterable[Mount]) -> None:
    """In the service: unmount these from `/etc`, the uppermost first.

    Raises:
        Moved: another one is the uppermost there; it stays.
    """
    for mount in mounts:
        with Descriptors() as fds:
            etc = hold(fds)
            if etc.mount != mount.id:
                raise Moved
            unmount(etc.fd)


def unmount(root: int) -> None:
    """Lazily unmount a mount by a descriptor of its root, or what lies uppermost on that.

    The working directory is lost with it.
    """
    os.fchdir(root)
    syscalls.umount2(".", syscalls.MNT_DETACH)


def open_etc(fds: Descriptors, root: int, resolve: int = 0) -> int:
    """An O_PATH descriptor of the directory `etc` right below another, wherever links in there would lead.

    Args:
        resolve: more RESOLVE_ flags of openat2(2).

    Raises:
        NotADirectoryError: there is none.
    """
    try:
        return fds.add(
            syscalls.openat2(root, "etc", os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_INSIDE | resolve)
        )
    except OSError as error:
        if error.errno not in _NOT_A_DIRECTORY:
            raise
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "etc") from None
