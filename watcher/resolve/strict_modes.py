# SPDX-License-Identifier: LGPL-2.1-or-later
"""Walks a path, and judges who could change what it leads to: StrictModes of sshd_config(5), CHASE_SAFE of systemd.

Who may write to a drop directory decides what root reads, copies and gives to a service. So we walk a path from `/`
component by component, read and follow links by hand, and judge each step by what `fstat` says of the descriptor that
the walk goes on with. No name is looked up twice: what was judged is what is opened.

- Everything on the way is owned by root or by a user whom the service trusts, and only these can write to it. In a
  sticky directory others can make names, but not touch names that are not theirs: a path may pass it, not end in it.
- A user who is not root decides where the way goes on if he owns a link, or may write to a directory. Then he must be
  able to make each further step himself, and to read the end of the way. That is asked before the step is made. What
  he cannot see is refused in the same words, whatever it is.
- On a file system that a user serves (FUSE) everything is that user's, whatever it says.

We still find what is on an unsafe way, as far as those who make it unsafe can see it: it is there, and refused.

Standard library only, because the generator imports it at boot. Not on an event loop, see trust.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from watcher.model import Unsafe, shown
from watcher.resolve.trust import READ, ROOT_ALONE, SEARCH, Permissions, Trust, Trusted, Who, served_by

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
LINKS_MAX = 40
"""Links followed in one path, path_resolution(7)."""
_PLACES_MAX = 64  # directories that stay open during one look


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory on the way, open.

    Attributes:
        setters: those who are not root, and decide what its names lead to, or may have brought us here.
        sticky: strangers may make names in it, but not touch the names of others.
        closed: only its owner may enter it, or a directory above it.
        unsafe: what is wrong with it.
    """

    fd: int
    path: str
    setters: frozenset[Who]
    sticky: bool
    closed: bool
    unsafe: Unsafe | None


@dataclass(slots=True)
class Way:
    """How far a walk came; the caller has it also when the walk raises.

    Attributes:
        path: without any link in it, as far as it exists; behind that as it was written.
        links: each link on the way, as (directory without links, name in it).
        unsafe: the first thing on it that is wrong.
    """

    path: str = "/"
    links: list[tuple[str, str]] = field(default_factory=list)
    unsafe: Unsafe | None = None
    _setters: frozenset[Who] = frozenset()
    """Those who are not root, and decide where it goes on."""
    _link_setters: frozenset[Who] = frozenset()
    """Those who could have made the latest link, besides its owner."""


Guard = Callable[[os.stat_result, int, str, str], None]
"""Judges an entry of a tree: what `stat` says of it, the directory that it is in, its name there, and its path below
the root of the tree. Raises Unsafe."""


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a way.

    Attributes:
        fd: O_PATH; the caller closes it.
        path: without any link in it.
        status: `fstat` of it.
        unsafe: why it must not be used.
        guard: for `tree.signature()`; None where only its owner can enter the tree.
    """

    fd: int
    path: str
    status: os.stat_result
    unsafe: Unsafe | None
    guard: Guard | None


class StrictModes:
    """For one look of one service; a context manager, which closes the directories that were passed.

    Attributes:
        remarks: names in `trust` that no user or group has.
    """

    def __init__(self, trust: Trust = ROOT_ALONE) -> None:
        self._trusted = Trusted(trust)
        self.remarks = self._trusted.remarks
        self._servers: dict[int, int | None] = {}
        self._places: dict[tuple[str, frozenset[Who]], _Place] = {}

    def __enter__(self) -> StrictModes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_places()

    def _close_places(self) -> None:
        for place in self._places.values():
            os.close(place.fd)
        self._places.clear()

    def open(self, path: str, way: Way | None = None) -> Found:
        """What an absolute path leads to, links followed.

        Args:
            way: gets what was met on the way.

        Raises:
            Unsafe: a user who is not root leads us there, and could not see it himself.
            OSError: it is not there, or cannot be reached; ELOOP for links that lead in a circle.
        """
        way = way if way is not None else Way()
        if len(self._places) > _PLACES_MAX:
            self._close_places()
        todo = components(path)[::-1]
        try:
            return self._walk(todo, way)
        except OSError:
            while todo:
                way.path = _joined(way.path, todo.pop())
            raise

    def _walk(self, todo: list[str], way: Way) -> Found:
        place = self._top(way)
        while todo:
            name = todo.pop()
            if way._setters:
                there = self._permissions(os.fstat(place.fd), place.fd, listed=True)
                self._require_sight(way, there, SEARCH, place.path)
            way.path = _joined(place.path, name)
            if todo and (known := self._places.get((way.path, way._setters))):
                place = self._entered(known, way)
                continue
            fd = os.open(name, _PATH, dir_fd=place.fd)
            try:
                status = os.fstat(fd)
                if stat.S_ISLNK(status.st_mode):
                    target = os.readlink("", dir_fd=fd)
                    self._cross(way, place, name, fd, status)
                    todo += reversed(components(target))
                    place = self._top(way) if target.startswith("/") else place
                elif not todo:
                    return self._found(way, place, os.dup(fd), status)
                elif stat.S_ISDIR(status.st_mode):
                    place = self._place(way, place, way.path, fd, status)
                else:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), way.path)
            finally:
                os.close(fd)
        way.path = place.path  # a link to a directory above, or "/" itself
        return self._found(way, place, os.dup(place.fd), os.fstat(place.fd))

    def _top(self, way: Way) -> _Place:
        known = self._places.get(("/", way._setters))
        if known is None:
            fd = os.open("/", _PATH | os.O_DIRECTORY)
            try:
                return self._place(way, None, "/", fd, os.fstat(fd))
            finally:
                os.close(fd)
        return self._entered(known, way)

    def _entered(self, place: _Place, way: Way) -> _Place:
        """Go on from a directory that is judged."""
        way.unsafe = way.unsafe or place.unsafe
        way._setters = place.setters
        return place

    def _place(self, way: Way, above: _Place | None, path: str, fd: int, status: os.stat_result) -> _Place:
        """A directory that is passed: a copy of `fd` stays open with it."""
        found = self._permissions(status, fd)
        sticky = bool(status.st_mode & stat.S_ISVTX)
        writers = [] if sticky else found.writers()
        place = _Place(
            os.dup(fd),
            path,
            way._setters | self._trusted.not_root(found.owner, writers),
            sticky=sticky and bool(found.writers()),
            closed=not found.mode & 0o011 or (above is not None and above.closed),
            unsafe=self._trusted.unsafe(path, found, writers, like_root=above is None or not above.sticky),
        )
        self._places[path, way._setters] = place
        return self._entered(place, way)

    def _cross(self, way: Way, place: _Place, name: str, fd: int, status: os.stat_result) -> None:
        """Follow a link. It is as safe as its owner is, and the directory that it lies in."""
        if len(way.links) == LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), way.path)
        link = self._permissions(status, fd)
        way.links.append((place.path, name))
        way.unsafe = way.unsafe or self._trusted.unsafe(way.path, link, [], like_root=not place.sticky)
        if way.unsafe is None:
            way.unsafe = _hard_link(way.path, place, status)
        way._link_setters = way._setters
        way._setters |= self._trusted.not_root(link.owner)

    def _found(self, way: Way, place: _Place, fd: int, status: os.stat_result) -> Found:
        try:
            found = self._permissions(status, fd, listed=bool(way._setters))
            directory = stat.S_ISDIR(status.st_mode)
            self._require_sight(way, found, READ | SEARCH if directory else READ, way.path)
            unsafe = way.unsafe
            if unsafe is None and (directory or stat.S_ISREG(status.st_mode)):
                unsafe = self._trusted.unsafe(way.path, found, found.writers())
            if unsafe is None and not directory:
                unsafe = _hard_link(way.path, place, status)
        except BaseException:
            os.close(fd)
            raise
        way.unsafe = unsafe
        closed = place.closed or not status.st_mode & 0o011
        guarded = not closed or bool(way._setters)
        return Found(fd, way.path, status, unsafe, self._guard(way) if guarded else None)

    def _permissions(self, status: os.stat_result, fd: int, *, listed: bool = False) -> Permissions:
        """Of what is open as `fd`.

        Args:
            listed: whether it matters who may read: then the access control list counts. Who may write besides the
                owner is in it only where the group bits of the mode, which are its mask, have that right.
        """
        if listed or status.st_mode & stat.S_IWGRP:
            found = Permissions.of_descriptor(status, fd)
        else:
            found = Permissions(status.st_uid, status.st_gid, status.st_mode)
        if status.st_dev not in self._servers:
            self._servers[status.st_dev] = served_by(status.st_dev)
        server = self._servers[status.st_dev]
        return found if server is None or self._trusted.is_root(server) else replace(found, owner=server)

    def _require_sight(self, way: Way, found: Permissions, need: int, path: str) -> None:
        """Raise Unsafe unless all who set the way, and are not root, could make this step themselves."""
        for who in sorted(way._setters, key=lambda one: (one.kind, one.number)):
            if not found.allow(who, need):
                # Say what was wrong before, whatever lies behind it.
                unsafe = way.unsafe or self._out_of_sight(way, who, path)
                raise Unsafe(str(unsafe), unsafe.path, hidden=True)

    def _out_of_sight(self, way: Way, who: Who, path: str) -> Unsafe:
        name = "everybody" if who.kind == "everybody" else f"{who.kind} {who.name}"
        if not way.links:
            mend = f"chown {who.name}" if who.kind == "user" else "chmod +r"
            text = f"{shown(path)} cannot be read by {name}, who may have put it there"
            return Unsafe(f'{text}; if they may read it: "{mend} {shown(path)}"', path)
        link = _joined(*way.links[-1])
        text = f"{shown(link)} is a link that {name} can set, to what {name} cannot read"
        if who in way._link_setters:
            return Unsafe(f"{text}: put there what it leads to, or link it in a directory of root's", link)
        return Unsafe(f'{text}: "chown -h root {shown(link)}"', link)

    def _guard(self, way: Way) -> Guard:
        """Judges a tree. Its owners and modes are content, so only two things count: strangers could write to it, or
        those who have led here could not read all of it."""

        def guard(status: os.stat_result, directory: int, name: str, where: str) -> None:
            path = f"{way.path}/{where}"
            link = stat.S_ISLNK(status.st_mode)  # is not followed
            owners = {who.number for who in way._setters if who.kind == "user"}
            in_sight = link or (len(owners) == len(way._setters) and owners <= {status.st_uid})
            safe = status.st_uid in self._trusted.uids and not status.st_mode & 0o022
            if in_sight and safe:
                return
            found = Permissions.of_entry(status, directory, name)
            if not in_sight:
                need = READ | SEARCH if stat.S_ISDIR(status.st_mode) else READ
                self._require_sight(way, found, need, path)
            unsafe = None if safe else self._trusted.unsafe(path, found, [] if link else found.writers())
            if unsafe is not None:
                raise unsafe

        return guard


def _hard_link(path: str, place: _Place, status: os.stat_result) -> Unsafe | None:
    """In a sticky directory any user can have made this name, as a hard link to a file of root's."""
    if not place.sticky or status.st_nlink < 2:
        return None
    text = f"{shown(path)} has other names, and anybody may have made this one"
    return Unsafe(f"{text}: copy it, or move it to a directory that only root may write to", path)


def components(path: str) -> list[str]:
    """The names in a path, with `..` as it stands there."""
    return [part for part in path.split("/") if part not in ("", ".")]


def _joined(directory: str, name: str) -> str:
    if name == "..":
        return directory.rpartition("/")[0] or "/"
    return f"{directory.rstrip('/')}/{name}"
