# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every format of an image can do: recognise a file, say whether it is complete, verify it, mount it.

Any value may be in any field of a file: strangers wrote it. A format checks what tells "not all here yet" from "will
never do", and what the kernel would answer with a bare EINVAL. The kernel checks the rest when it mounts the file.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from watcher.model import Busy, Incomplete, Later, Refused
from watcher.mounts import syscalls

_MOUNT_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
)

# How file systems say that an image is not well-formed, or uses what this kernel does not know.
_BROKEN_IMAGE = {
    errno.EINVAL,
    errno.EIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.EOPNOTSUPP,
    errno.ENOENT,
    errno.E2BIG,
}


HEAD = (1 << 16) + 4096
"""Bytes at the start of a file system that a format gets to see.

There is the largest block of an erofs, which a checksum covers, and at the end of these the superblock of a btrfs.
"""


def read_all(fd: int, size: int, offset: int) -> bytes:
    """All of these bytes of a file.

    Raises:
        Busy: it has become shorter since its size was looked at.
        OSError: it could not be read.
    """
    found = os.pread(fd, size, offset)
    if len(found) < size:
        raise Busy("it is shorter than a moment ago")
    return found


class Extent(NamedTuple):
    """A part of an open file.

    Attributes:
        offset, size: bytes.
    """

    fd: int
    offset: int
    size: int

    def read(self, size: int, offset: int = 0) -> bytes:
        """All of these bytes of the part, which has so many. Raises as `read_all()`."""
        return read_all(self.fd, size, self.offset + offset)


class Format(ABC):
    """A file system in a file. For one that `recognises()` has taken comes `complete()`, then `verify()`.

    `head` is always the first HEAD bytes of the file system, or all that there are. It begins with the file, or is in
    a partition, which is then all that a format knows of the file.

    Attributes:
        name: for people, and for fsopen(2): "squashfs".
        options: to mount it with, None for one without a value.
    """

    name: str
    options: Mapping[str, str | None] = MappingProxyType({})

    @abstractmethod
    def recognises(self, head: bytes) -> bool:
        """Whether a file with these first bytes is of this format."""

    @abstractmethod
    def complete(self, head: bytes, size: int) -> int:
        """The number of bytes from its start that belong to the image; what follows is padding.

        Args:
            size: of the file or partition, bytes.

        Raises:
            Incomplete: bytes are missing; says how many there are and how many it takes.
            Refused: the superblock is broken, or asks for what no kernel can do.
        """

    @abstractmethod
    def verify(self, head: bytes) -> None:
        """Check a complete image, as far as that goes without mounting it.

        Raises:
            Refused: it contradicts itself.
        """

    def unpack_command(self, image: str, target: str, path: str) -> list[str]:
        """A command that unpacks `path` of an image, and perhaps more, into the new directory `target`.

        Unlike mounting, that needs no privilege.

        Raises:
            Later: there is none.
        """
        # What debugfs(8) and btrfs-restore(8) write, and where, is for the maker of the image to say.
        raise Later(f"not root, and no tool unpacks {self.name} safely: check it as root")

    def fsmount(self, backing: int, label: str, offset: int = 0, size: int = 0) -> int:
        """A detached mount of a file system in the file `backing`: read-only, nosuid, nodev, noexec.

        Args:
            label: of the loop device (lo_file_name): losetup(8) shows it.
            offset: where in the file it begins, bytes.
            size: of its partition, bytes; 0: up to the end of the file.

        Raises:
            Refused: the kernel cannot mount it.
            Later: no loop device is free.
            OSError: anything else, such as no memory.
        """
        device, path = loop_device(backing, label, offset, size)
        try:
            return self.fsmount_device(path)
        finally:
            os.close(device)

    def fsmount_device(self, path: str) -> int:
        """As `fsmount()`, of a block device."""
        try:
            return self._fsmount(path)
        except OSError as error:
            if error.errno in _BROKEN_IMAGE:
                raise Refused(f"the kernel cannot mount it as {self.name}: {error.strerror}") from error
            raise

    def _fsmount(self, source: str, **options: str) -> int:
        """`fsmount()` of a block device, or of a file where the file system needs no device. Raises OSError."""
        context = syscalls.fsopen(self.name)
        try:
            syscalls.fsconfig_set_string(context, "source", source)
            for option, value in (*self.options.items(), *options.items()):
                if value is None:
                    syscalls.fsconfig_set_flag(context, option)
                else:
                    syscalls.fsconfig_set_string(context, option, value)
            syscalls.fsconfig_set_flag(context, "ro")
            syscalls.fsconfig_cmd_create(context, source)
            return syscalls.fsmount(context, _MOUNT_ATTRIBUTES)
        finally:
            os.close(context)


def require_superblock(size: int, end: int) -> None:
    """Raise Incomplete where a file of `size` bytes ends before its superblock does."""
    if size < end:
        raise Incomplete(f"incomplete: {size} bytes are here, the superblock alone takes {end}")


def require_claimed(size: int, claimed: int, end: int) -> None:
    """Raise Incomplete where a file has fewer bytes than it claims, Refused where it claims fewer than `end`."""
    if claimed < end:
        raise Refused(f"lies about its size: it claims {claimed} bytes, its superblock alone takes {end}")
    if size < claimed:
        raise Incomplete(f"incomplete: {size} of {claimed} bytes are here")


def loop_device(backing: int, label: str, offset: int, size: int) -> tuple[int, str]:
    """As `syscalls.loop_attach()`. Raises Later: there is none."""
    try:
        return syscalls.loop_attach(backing, label, offset, size)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Later(f"no loop device is to be had: {where}{error.strerror}") from error
