# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whom a service trusts with its configuration, and what to mend where others have a hand in it.

Root is trusted, and so are the users and groups that the service names. Names of users may come from LDAP: not on an
event loop. Standard library only, because the generator imports it at boot.

The owner of `/` is root, whatever his number: in a user namespace the host's root has the number of all users who are
not known there. A stranger may have the same number, so it counts only for what a path passes, and never in a sticky
directory.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from watcher.model import Remark, Unsafe, shown
from watcher.resolve.permissions import Permissions, Who

IN_UNIT = "in [X-Confext] of the unit"
BY_EXEC = "with exec --set"


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
        if not (like_root and found.owner == self._above_all) and not self._is_trusted(
            Who("user", found.owner)
        ):
            name = name_of(Who("user", found.owner))
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
        name = name_of(who)
        text = f"{shown(path)} is writable by {who.kind} {name}"
        setting = f"{who.kind.capitalize()}s={name}"
        if found.acl and (who.kind == "user" or who.number != found.group):
            return self._told(f"{text} (ACL)", f"setfacl -x {who.kind[0]}:{name}", path, setting)
        # Where there is a list, chmod changes its mask, and no user or group in it may write any more.
        return self._told(f"{text} ({stat.S_IMODE(found.mode):04o})", "chmod g-w", path, setting)

    def _told(self, what: str, mend: str, path: str, setting: str) -> Unsafe:
        return Unsafe(f'{what}: "{mend} {shown(path)}", or Trusted{setting} {self._where}', path)


def name_of(who: Who) -> str:
    """The name of a user or a group; its number where it has no name."""
    try:
        return pwd.getpwuid(who.number)[0] if who.kind == "user" else grp.getgrgid(who.number)[0]
    except KeyError:
        return str(who.number)
