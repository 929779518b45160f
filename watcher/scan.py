# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the directories a service's layers come from, and says what must be watched so that no change is missed.

Every look starts from nothing and trusts only what it reads: the watcher is level-triggered. A directory is read
through one descriptor, so that a rename under it cannot mix two directories. What a name is, is asked of its target;
links are then followed step by step, because each directory in which one lies is a place where the answer can
change.

A thing that is not there is an answer ("removed"); a thing that cannot be read is not. The latter marks the entry, or
the whole look, as `unknown`: nothing is taken from a service because a permission changed or a disk failed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import resolve, vpick
from .model import Candidate, Declared, Entry, Interest, Kind, Look, Picks, Remark, Scope
from .vpick import Dirent

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_LINKS_MAX = 40  # as the kernel's MAXSYMLINKS
_NULL = os.makedev(1, 3)


@dataclass(frozen=True, slots=True)
class Chased:
    """Where a path leads.

    Attributes:
        path: without any link in it, as far as it exists.
        links: each link on the way, as (directory without links, name in it).
    """

    path: str
    links: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Notes:
    """What one look gathers on its way; interests keep the order in which they were found."""

    interests: dict[Interest, None] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def watch(self, path: str, pattern: str | None = None, scope: Scope = Scope.CHILDREN) -> None:
        self.interests[Interest(path, scope, pattern)] = None

    def say(self, level: str, path: str, text: str) -> None:
        self.remarks.append(Remark(level, path, text))


def look(declared: Declared, architecture: str | None = None) -> Look:
    """What the disk has for a service now.

    Args:
        declared: paths must be absolute.
        architecture: systemd's name of the native one; None: this host's.

    Raises:
        Nothing for what lies on the disk: that is in `Look.remarks`.
    """
    notes = _Notes()
    listings, unknown = _listings(declared.confext_dirs, notes)
    resolved = resolve.resolve(declared, listings)
    notes.remarks.extend(resolved.remarks)
    picks = tuple(_picks(entry, architecture, notes) for entry in resolved.entries)
    return Look(picks, tuple(notes.interests), tuple(notes.remarks), unknown)


def entries(declared: Declared) -> tuple[Entry, ...]:
    """The entries of `look()` alone, without a look at what they lead to."""
    listings, _ = _listings(declared.confext_dirs, _Notes())
    return resolve.resolve(declared, listings).entries


def chase(path: str) -> Chased:
    """`path` followed link by link; a loop ends after 40 links, a missing component ends in its would-be path."""
    todo = [part for part in reversed(path.split("/")) if part]
    links: list[tuple[str, str]] = []
    here = ""
    while todo:
        part = todo.pop()
        if part == ".":
            continue
        if part == "..":
            here = here.rpartition("/")[0]
            continue
        target = _readlink(f"{here}/{part}")
        if target is None or len(links) == _LINKS_MAX:
            here = f"{here}/{part}"
            continue
        links.append((here or "/", part))
        todo.extend(part for part in reversed(target.split("/")) if part)
        if target.startswith("/"):
            here = ""
    return Chased(here or "/", tuple(links))


def _readlink(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None  # no link, or out of reach: the path ends here either way, and stat() says which it is


def _listings(paths: Iterable[str], notes: _Notes) -> tuple[list[resolve.Listing], bool]:
    """The `.confext.d/` directories that are there, and whether one could not be read."""
    listings = []
    unknown = False
    for path in paths:
        notes.watch(path, resolve.ENTRY_NAME)
        try:
            listings.append(resolve.Listing(path, _read(path)))
        except OSError as error:
            if error.errno not in _ABSENT:
                unknown = True
                notes.say("warning", path, f"cannot be read, all stays as it is: {error.strerror}")
            elif error.errno != errno.ENOENT and not _is_null(path):
                notes.say("warning", path, f"ignored: {error.strerror}")
    return listings, unknown


def _picks(entry: Entry, architecture: str | None, notes: _Notes) -> Picks:
    spec = vpick.parse_path(entry.path, entry.kind)
    if spec is None:
        return _direct(entry, notes)
    _watch_links(spec.directory, notes)
    notes.watch(spec.directory, vpick.pattern(spec))
    try:
        dirents = _read(spec.directory, re.compile(vpick.pattern(spec)))
    except OSError as error:
        return _unread(entry, spec.directory, error, notes)
    unseen = {dirent.name for dirent in dirents if dirent.problem and dirent.type == "other"}
    for passed in vpick.passed_over(spec, dirents, architecture):
        stays = "cannot be read, what was accepted stays until something newer comes"
        what = stays if passed.name in unseen else "passed over"
        notes.say(passed.level, f"{spec.directory}/{passed.name}", f"{what}: {passed.reason}")
    candidates = vpick.pick(spec, dirents, architecture)
    if not candidates:
        notes.say("info", spec.directory, f"nothing in it yet that is called {vpick.called(spec)} and fits")
    for dirent in dirents:
        if dirent.link:
            _watch_links(f"{spec.directory}/{dirent.name}", notes)
    if entry.kind is Kind.DIRECTORY:
        # A tree changes anywhere below; of an image, its directory's watch sees all that matters.
        for candidate in candidates:
            notes.watch(chase(candidate.path).path, scope=Scope.TREE)
    return Picks(entry, candidates, bool(unseen))


def _direct(entry: Entry, notes: _Notes) -> Picks:
    """An entry that names its one file or directory."""
    parent, _, name = entry.path.rpartition("/")
    if entry.declared:
        notes.watch(parent or "/", re.escape(name))
    chased = _watch_links(entry.path, notes)
    try:
        status = os.stat(entry.path)
    except OSError as error:
        return _unread(entry, entry.path, error, notes)
    wanted = (stat.S_ISDIR,) if entry.kind is Kind.DIRECTORY else (stat.S_ISREG, stat.S_ISBLK)
    if not any(test(status.st_mode) for test in wanted):
        what = "a directory" if entry.kind is Kind.DIRECTORY else "a regular file"
        notes.say("warning", entry.path, f"passed over: not {what}")
        return Picks(entry, ())
    extension, version = vpick.split(name, entry.kind)
    if not version:  # "web.raw" as a link to "web_1.4.raw": the target tells
        version = vpick.split(chased.path.rpartition("/")[2], entry.kind)[1]
    if entry.kind is Kind.DIRECTORY:
        notes.watch(chased.path, scope=Scope.TREE)
    return Picks(entry, (Candidate(entry.path, name, extension, version, entry.kind),))


def _unread(entry: Entry, path: str, error: OSError, notes: _Notes) -> Picks:
    """No answer for an entry: removed, or only out of reach."""
    unknown = error.errno not in _ABSENT
    if unknown:
        notes.say("warning", path, f"cannot be read, what was accepted stays: {error.strerror}")
    elif error.errno != errno.ENOENT:
        notes.say("warning", path, f"passed over: {error.strerror}")
    elif os.path.lexists(path):
        notes.say("warning", path, "passed over: the link leads nowhere")
    elif not entry.optional:
        notes.say("warning", path, "does not exist")
    return Picks(entry, (), unknown)


def _watch_links(path: str, notes: _Notes) -> Chased:
    """If there are links in `path`: the directory of each, by its name, and that of what they lead to."""
    chased = chase(path)
    for directory, name in chased.links:
        notes.watch(directory, re.escape(name))
    if chased.links:
        parent, _, name = chased.path.rpartition("/")
        notes.watch(parent or "/", re.escape(name))
    return chased


def _read(path: str, wanted: re.Pattern[str] | None = None) -> tuple[Dirent, ...]:
    """The names in a directory, each with what it leads to, in the order of the names.

    Args:
        wanted: leave out names that do not match.

    Raises:
        OSError: the directory itself cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:
            names = [entry for entry in entries if wanted is None or wanted.fullmatch(entry.name)]
        found = (_dirent(entry, descriptor) for entry in sorted(names, key=lambda entry: entry.name))
        return tuple(dirent for dirent in found if dirent)
    finally:
        os.close(descriptor)


def _dirent(entry: os.DirEntry[str], directory: int) -> Dirent | None:
    """None: it went away meanwhile."""
    link = entry.is_symlink()
    try:
        status = os.stat(entry.name, dir_fd=directory)
    except OSError as error:
        if not link:
            return None if error.errno == errno.ENOENT else Dirent(entry.name, "other", False, _reason(error))
        kind: vpick.Type = "missing" if error.errno in _ABSENT else "other"
        return Dirent(entry.name, kind, True, _reason(error))
    return Dirent(entry.name, _type(status, link), link)


def _type(status: os.stat_result, link: bool) -> vpick.Type:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    if stat.S_ISBLK(status.st_mode):
        return "block"
    if link and stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL:
        return "null"
    return "other"


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "the link leads nowhere"
    if error.errno == errno.ELOOP:
        return "the link leads in a circle"
    return error.strerror or str(error)


def _is_null(path: str) -> bool:
    """A whole `.confext.d` that is a link to /dev/null: nothing there, and meant so."""
    try:
        return _type(os.stat(path), True) == "null"
    except OSError:
        return False
