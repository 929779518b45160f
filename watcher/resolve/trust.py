# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read or write a file, which of them a service trusts, and what to mend where others have a hand in it.

Who may is said by the owner, the mode and the access control list (acl(5)). Root is trusted, and so are the users and
groups that the service names. Names of users may come from LDAP: not on an event loop. Standard library only, because
the generator imports it at boot.

The owner of `/` is root, whatever his number: in a user namespace the host's root has the number of all users who are
not known there. A stranger may have the same number, so it counts only for what a path passes, and never in a sticky
directory.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from watcher.model import Remark, Unsafe, shown

READ, WRITE, SEARCH = 4, 2, 1

_ACL = "system.posix_acl_access"
_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # e_tag, e_perm, e_id: linux/posix_acl_xattr.h
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_ABSENT = frozenset((errno.ENODATA, errno.EOPNOTSUPP))

IN_UNIT = "in [X-Confext] of the unit"
BY_EXEC = "with exec --set"


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

    @property
    def name(self) -> str:
        """The name of a user or a group; its number where it has no name."""
        try:
            return pwd.getpwuid(self.number)[0] if self.kind == "user" else grp.getgrgid(self.number)[0]
        except KeyError:
            return str(self.number)


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

    @classmethod
    def of_descriptor(cls, status: os.stat_result, fd: int) -> Permissions:
        """Of what is open as `fd`, which may be O_PATH. Raises OSError."""
        return cls._of(status, f"/proc/self/fd/{fd}", follow=True)

    @classmethod
    def of_entry(cls, status: os.stat_result, directory: int, name: str) -> Permissions:
        """Of a name in the directory that is open as `directory`. Raises OSError."""
        return cls._of(status, f"/proc/self/fd/{directory}/{name}", follow=False)

    @classmethod
    def _of(cls, status: os.stat_result, path: str, *, follow: bool) -> Permissions:
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
        return cls(status.st_uid, status.st_gid, status.st_mode, acl)

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

    def let_everybody(self, need: int) -> bool:
        """Whether all have all of `need` (READ, WRITE, SEARCH), whoever they are."""
        mask = self.mode >> 3 & 7
        named = [granted & mask for tag, granted, _ in self.acl if tag in (_USER, _GROUP_OBJ, _GROUP)]
        return all(granted & need == need for granted in (*(named or [mask]), self.mode & 7))

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


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a service trusts with what it gets, besides root: `TrustedUsers=` and `TrustedGroups=`.

    Attributes:
        users, groups: names or numbers.
        where: IN_UNIT or BY_EXEC, where that is set.
    """

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    where: str = IN_UNIT


ROOT_ALONE = Trust()


class Trusted:
    """A `Trust` with its names looked up.

    Attributes:
        uids: of root, of this process, and of the users who are trusted.
        remarks: names that no user or group has.
    """

    def __init__(self, trust: Trust) -> None:
        self.remarks: list[Remark] = []
        self._where = trust.where
        own = frozenset((0, os.geteuid()))
        self.uids = own | self._numbers("TrustedUsers", trust.users, lambda name: pwd.getpwnam(name).pw_uid)
        self._gids = self._numbers("TrustedGroups", trust.groups, lambda name: grp.getgrnam(name).gr_gid)
        self._above_all = os.stat("/").st_uid
        self._roots = own | {self._above_all}
        self._users: dict[int, Who] = {}

    def _numbers(self, key: str, names: Iterable[str], number: Callable[[str], int]) -> frozenset[int]:
        found = set()
        for name in names:
            try:
                found.add(int(name) if name.isdecimal() else number(name))
            except KeyError:
                who = "user" if key == "TrustedUsers" else "group"
                words = f"no {who} is called {shown(name)}: nobody is trusted for that"
                self.remarks.append(Remark("warning", f"{key}=", words))
        return frozenset(found)

    def is_root(self, uid: int) -> bool:
        return uid in self._roots

    def not_root(self, owner: int, writers: Iterable[Who] = ()) -> frozenset[Who]:
        """Those of the owner (uid) and the writers of something who are not root."""
        found = set() if self.is_root(owner) else {self._user(owner)}
        for who in writers:
            if who.kind == "user" and not self.is_root(who.number):
                found.add(self._user(who.number))
            elif who.kind == "everybody" or (who.kind == "group" and who.number):
                found.add(who)
        return frozenset(found)

    def _user(self, uid: int) -> Who:
        if uid not in self._users:
            groups: Iterable[int] = ()
            try:
                known = pwd.getpwuid(uid)
                groups = os.getgrouplist(known.pw_name, known.pw_gid)
            except KeyError:
                pass  # the groups of a user without a name are not known
            self._users[uid] = Who("user", uid, frozenset(groups))
        return self._users[uid]

    def _is_trusted(self, who: Who) -> bool:
        if who.kind == "user":
            return who.number in self.uids or bool(self._user(who.number).groups & (self._gids - {0}))
        return who.kind == "group" and (who.number == 0 or who.number in self._gids)

    def unsafe(
        self, path: str, found: Permissions, writers: Iterable[Who], *, like_root: bool = False
    ) -> Unsafe | None:
        """Who has a hand in `path` without being trusted, and what mends it.

        Args:
            like_root: the owner of `/` counts as root.
        """
        owner = Who("user", found.owner)
        if not (like_root and found.owner == self._above_all) and not self._is_trusted(owner):
            name = owner.name
            if found.owner == self._above_all:
                text = f"{shown(path)} is owned by somebody whom this user namespace does not know"
                return Unsafe(f"{text}: use a copy of it, or TrustedUsers={name} {self._where}", path)
            link = "-h " if stat.S_ISLNK(found.mode) else ""
            return self._told(f"{shown(path)} is owned by {name}", f"chown {link}root", path, f"Users={name}")
        return next((self._writable(path, found, who) for who in writers if not self._is_trusted(who)), None)

    def _writable(self, path: str, found: Permissions, who: Who) -> Unsafe:
        if who.kind == "everybody":
            text = f"{shown(path)} is writable by everybody ({stat.S_IMODE(found.mode):04o})"
            return Unsafe(f'{text}: "chmod o-w {shown(path)}"', path)
        name = who.name
        text = f"{shown(path)} is writable by {who.kind} {name}"
        setting = f"{who.kind.capitalize()}s={name}"
        if found.acl and (who.kind == "user" or who.number != found.group):
            return self._told(f"{text} (ACL)", f"setfacl -x {who.kind[0]}:{name}", path, setting)
        # Where there is a list, chmod changes its mask, and no user or group in it may write any more.
        return self._told(f"{text} ({stat.S_IMODE(found.mode):04o})", "chmod g-w", path, setting)

    def _told(self, what: str, mend: str, path: str, setting: str) -> Unsafe:
        return Unsafe(f'{what}: "{mend} {shown(path)}", or Trusted{setting} {self._where}', path)
