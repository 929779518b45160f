# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read or write a file, by its owner, its mode and its access control list (acl(5)), and who may fake these.

Standard library only, because the generator imports it at boot.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from typing import Literal

READ, WRITE, SEARCH = 4, 2, 1

_ACL = "system.posix_acl_access"
_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # e_tag, e_perm, e_id: linux/posix_acl_xattr.h
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_ABSENT = frozenset((errno.ENODATA, errno.EOPNOTSUPP))


@dataclass(frozen=True, slots=True)
class Who:
    """A user, all members of a group, or everybody.

    Attributes:
        number: uid or gid; 0 for everybody.
        groups: those that a user is in.
    """

    kind: Literal["user", "group", "everybody"]
    number: int = 0
    groups: frozenset[int] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class Permissions:
    """Of one file or directory.

    Attributes:
        owner: uid.
        group: gid.
        mode: `st_mode`.
        acl: (tag, permissions, id), empty where the mode says it all.
    """

    owner: int
    group: int
    mode: int
    acl: tuple[tuple[int, int, int], ...] = ()

    def writers(self) -> list[Who]:
        """Who may write besides the owner. A list grants no more than the group bits of the mode."""
        found = []
        if self.mode & stat.S_IWOTH:
            found.append(Who("everybody"))
        if not self.mode & stat.S_IWGRP:
            return found
        if not self.acl:
            return [*found, Who("group", self.group)]
        for tag, granted, number in self.acl:
            if tag == _USER and granted & WRITE:
                found.append(Who("user", number))
            elif tag in (_GROUP_OBJ, _GROUP) and granted & WRITE:
                found.append(Who("group", self.group if tag == _GROUP_OBJ else number))
        return found

    def allow(self, who: Who, need: int) -> bool:
        """Whether `who` has all of `need` (READ, WRITE, SEARCH), by the access check algorithm of acl(5).

        An owner has everything: he can change the mode.
        """
        if who.kind == "user" and who.number == self.owner:
            return True
        groups = frozenset((who.number,)) if who.kind == "group" else who.groups
        mask = self.mode >> 3 & 7
        in_class = False
        for tag, granted, number in self.acl or ((_GROUP_OBJ, 7, self.group),):
            if tag == _USER and who.kind == "user" and number == who.number:
                return granted & mask & need == need
            if tag in (_GROUP_OBJ, _GROUP) and (self.group if tag == _GROUP_OBJ else number) in groups:
                in_class = True
                if granted & mask & need == need:
                    return True
        return not in_class and self.mode & need == need


def served_by(device: int) -> int | None:
    """uid of the user whose program serves a file system, fuse(4): he decides what it says of owners and modes.

    Args:
        device: `st_dev`.

    Returns:
        None for one of the kernel's.

    Raises:
        OSError: the mount table cannot be read.
    """
    if os.major(device):
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as table:
        for row in table:
            fields, _, rest = row.partition(" - ")
            if fields.split(" ", 3)[2] == number:
                fuse = re.fullmatch(r"fuse(?:\.\S*)? .*[ ,]user_id=([0-9]+)(?:,.*)?", rest.rstrip("\n"))
                return int(fuse[1]) if fuse else None
    return None


def of_descriptor(status: os.stat_result, fd: int) -> Permissions:
    """Of what is open as `fd`, which may be O_PATH. Raises OSError."""
    return _of(status, f"/proc/self/fd/{fd}", follow=True)


def of_entry(status: os.stat_result, directory: int, name: str) -> Permissions:
    """Of a name in the directory that is open as `directory`. Raises OSError."""
    return _of(status, f"/proc/self/fd/{directory}/{name}", follow=False)


def _of(status: os.stat_result, path: str, *, follow: bool) -> Permissions:
    acl: tuple[tuple[int, int, int], ...] = ()
    if not stat.S_ISLNK(status.st_mode):  # a link has none of its own
        try:
            value = os.getxattr(path, _ACL, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        else:
            entries = tuple(_ENTRY.iter_unpack(value[_VERSION.size :]))
            acl = entries if any(tag in (_USER, _GROUP) for tag, _, _ in entries) else ()
    return Permissions(status.st_uid, status.st_gid, status.st_mode, acl)
