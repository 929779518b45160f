# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the directories a service's layers come from, and says what must be watched so that no change is missed.

Every look starts from nothing and trusts only what it reads: the watcher is level-triggered. We read a directory
through one descriptor, so that a rename under it cannot mix two directories. We ask what a name is of its target, and
follow links step by step: the answer can change in each directory in which a link lies.

A thing that is not there is an answer ("removed"); a thing that cannot be read is not. It marks the entry, or the whole
look, as `unknown`: no service loses anything because a permission changed or a disk failed.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice

from watcher.model import Candidate, Declared, Entry, Interest, Kind, Look, Picks, Remark, Scope, Unsafe
from watcher.resolve import content, sidecars, sources, vpick
from watcher.resolve.strict_modes import Found, StrictModes, Way
from watcher.resolve.vpick import Dirent

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

LACKS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""What this process lacks just now says nothing of what is on the disk: the look is tried again."""
# What somebody does to end these, an event tells of.
_MENDED = frozenset({errno.EACCES, errno.EPERM, errno.E2BIG})
_TYPES: dict[int, vpick.Type] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFBLK: "block"}
_NAMES_MAX = 10_000
_NULL = os.makedev(1, 3)
_NOTHING = r"(?!)"
"""A pattern that no name matches: what counts is the directory itself."""


@dataclass(slots=True)
class _Notes:
    """What one look gathers; interests keep the order in which they were found."""

    modes: StrictModes
    interests: dict[Interest, None] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    failed: bool = False

    def watch(self, path: str, pattern: str | None = None, scope: Scope = Scope.CHILDREN) -> None:
        self.interests[Interest(path, scope, pattern)] = None

    def watch_name(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        self.watch(parent or "/", re.escape(name) if name else _NOTHING)

    def say(self, level: str, path: str, text: str) -> None:
        self.remarks.append(Remark(level, path, text))

    @contextmanager
    def followed(self, path: str) -> Iterator[Found]:
        """Where a path leads. Watched are each link on the way, what they lead to, and what is to be mended."""
        way = Way()
        try:
            found = self.modes.open(path, way)
        except Unsafe as unsafe:  # we must not watch anything behind the last link
            self._watch_way(way, unsafe.path, unsafe)
            raise
        except OSError:
            self._watch_way(way, way.path, None)
            raise
        try:
            self._watch_way(way, found.path, found.unsafe)
            yield found
        finally:
            os.close(found.fd)

    def _watch_way(self, way: Way, end: str, unsafe: Unsafe | None) -> None:
        for directory, name in way.links:
            self.watch(directory, re.escape(name))
        if way.links:
            self.watch_name(end)
        if unsafe is not None:
            self.watch_name(unsafe.path)


def look(declared: Declared, architecture: str | None = None, modes: StrictModes | None = None) -> Look:
    """What the disk has for a service now.

    Args:
        declared: paths must be absolute.
        architecture: systemd's name of the native one; None: this host's.
        modes: whom the service trusts; None: root alone.

    Raises:
        OSError: no memory, no descriptors. Nothing for what lies on the disk: that is in `Look.remarks`.
    """
    with nullcontext(modes) if modes is not None else StrictModes() as own:
        notes = _Notes(own)
        listings, unknown, unsafe = _listings(declared.confext_dirs, notes)
        resolved = sources.resolve(declared, listings)
        notes.remarks.extend(resolved.remarks)
        picks = tuple(_picks(entry, architecture, notes) for entry in resolved.entries)
    return Look(picks, tuple(notes.interests), tuple(notes.remarks), unknown, unsafe, notes.failed)


def entries(declared: Declared) -> tuple[Entry, ...]:
    """The entries of `look()` alone, without a look at what they lead to."""
    with StrictModes() as modes:
        listings, _, _ = _listings(declared.confext_dirs, _Notes(modes))
    return sources.resolve(declared, listings).entries


def present(declared: Declared, modes: StrictModes) -> tuple[Declared, tuple[Interest, ...]]:
    """The same without each `.confext.d/` that is not there; and what tells when one comes.

    Each unit has its own, of which hardly any is there: without them, units of one image have one look. `look()` finds
    the same in either.

    Raises:
        OSError: as `look()`.
    """
    there, notes = [], _Notes(modes)
    for path in declared.confext_dirs:
        try:
            os.close(modes.open(path).fd)
        except FileNotFoundError:
            notes.watch(path, sources.ENTRY_NAME)
            continue
        except Unsafe:
            pass  # the look says so
        except OSError as error:
            _require_all(error, notes)
        there.append(path)
    return replace(declared, confext_dirs=tuple(there)), tuple(notes.interests)


def _listings(paths: Iterable[str], notes: _Notes) -> tuple[list[sources.Listing], bool, bool]:
    """The `.confext.d/` directories that are there; whether one could not be read; whether one is unsafe."""
    listings = []
    unknown = unsafe = False
    for path in paths:
        try:
            found = notes.modes.open(path)
            try:
                notes.watch(path, sources.ENTRY_NAME)
                unsafe = unsafe or found.unsafe is not None
                listings.append(sources.Listing(path, _read(found.fd, notes, path)))
            finally:
                os.close(found.fd)
        except Unsafe as error:
            unknown = True
            notes.watch_name(error.path)
            notes.say("warning", path, f"not looked at, all stays as it is: {error}")
        except OSError as error:
            unknown = _no_listing(path, error, notes) or unknown
    return listings, unknown, unsafe


def _no_listing(path: str, error: OSError, notes: _Notes) -> bool:
    """Say why a `.confext.d/` has no listing; whether there may be something in it all the same."""
    notes.watch(path, sources.ENTRY_NAME)
    _require_all(error, notes)
    if error.errno not in _ABSENT:
        notes.say("warning", path, f"cannot be read, all stays as it is: {error.strerror}")
        return True
    # A whole `.confext.d` may be a link to /dev/null: nothing there, and meant so.
    if error.errno != errno.ENOENT and _linked(path, notes, None).type != "null":
        notes.say("warning", path, f"ignored: {error.strerror}")
    return False


def _picks(entry: Entry, architecture: str | None, notes: _Notes) -> Picks:
    spec = vpick.parse_path(entry.path, entry.kind)
    if spec is None:
        return _direct(entry, notes)
    wanted = vpick.pattern(spec)
    try:
        with notes.followed(spec.directory) as found:
            notes.watch(spec.directory, wanted)
            unsafe = found.unsafe
            dirents = _read(found.fd, notes, spec.directory, wanted, entry.kind, by_stat=False)
            best = vpick.pick(spec, dirents, architecture)[:1]
            if best and not _answers(best[0].filename, found.fd):
                dirents = _read(found.fd, notes, spec.directory, wanted, entry.kind)
    except OSError as error:
        notes.watch(spec.directory, wanted)
        return _unread(entry, spec.directory, error, notes)
    except Unsafe as error:
        return _out_of_sight(entry, spec.basename, error)
    unseen = {dirent.name for dirent in dirents if dirent.problem and dirent.type == "other"}
    for passed in vpick.passed_over(spec, dirents, architecture):
        stays = "cannot be read, what was accepted stays until something newer comes"
        what = stays if passed.name in unseen else "passed over"
        notes.say(passed.level, f"{spec.directory}/{passed.name}", f"{what}: {passed.reason}")
    candidates = vpick.pick(spec, dirents, architecture)
    if candidates and (meant := vpick.misnamed(candidates[0])):
        words = f"counts on every machine, since systemd does not know that architecture: it calls it {meant}"
        notes.say("warning", candidates[0].path, words)
    if not candidates:
        notes.say("info", spec.directory, f"nothing in it yet that is called {vpick.called(spec)} and fits")
    if entry.kind is Kind.DIRECTORY and unsafe is None:
        for candidate in candidates:
            _watch_tree(candidate.path, notes)
    return Picks(entry, candidates, bool(unseen), unsafe)


def _watch_tree(path: str, notes: _Notes) -> None:
    """A tree changes anywhere below its `etc`; of an image, its directory's watch sees all that matters."""
    try:
        with notes.followed(path) as found:
            if found.unsafe is not None:
                return
            notes.watch(found.path, content.TOP)
            if stat.S_ISDIR(os.stat("etc", dir_fd=found.fd, follow_symlinks=False).st_mode):
                notes.watch(f"{found.path}/etc", scope=Scope.TREE)
    except (OSError, Unsafe):
        pass  # admission opens it, and says so


def _out_of_sight(entry: Entry, name: str, unsafe: Unsafe) -> Picks:
    """An entry that leads to what must not be looked at: refused as it is."""
    candidate = Candidate(entry.path, entry.path.rpartition("/")[2], name, "", entry.kind)
    return Picks(entry, (candidate,), unsafe=unsafe)


def _direct(entry: Entry, notes: _Notes) -> Picks:
    """An entry that names its one file or directory."""
    directory, _, name = entry.path.rpartition("/")
    beside = sidecars.names(name) if entry.kind is Kind.IMAGE else ()
    if entry.declared:
        notes.watch(directory or "/", "|".join(map(re.escape, (name, *beside))))
    extension, version = vpick.split(name, entry.kind)
    try:
        with notes.followed(entry.path) as found:
            path, status, unsafe = found.path, found.status, found.unsafe
    except OSError as error:
        return _unread(entry, entry.path, error, notes)
    except Unsafe as error:
        return _out_of_sight(entry, extension, error)
    wanted = (stat.S_ISDIR,) if entry.kind is Kind.DIRECTORY else (stat.S_ISREG, stat.S_ISBLK)
    if not any(test(status.st_mode) for test in wanted):
        what = "a directory" if entry.kind is Kind.DIRECTORY else "a regular file"
        notes.say("warning", entry.path, f"passed over: not {what}")
        return Picks(entry, ())
    if not version:  # "web.raw" as a link to "web_1.4.raw": the target tells
        version = vpick.split(path.rpartition("/")[2], entry.kind)[1]
    if entry.kind is Kind.DIRECTORY and unsafe is None:
        _watch_tree(path, notes)
    there = tuple(one for one in beside if os.path.lexists(f"{directory}/{one}"))
    for link in (one for one in there if os.path.islink(f"{directory}/{one}")):
        _linked(f"{directory}/{link}", notes, entry.kind)  # what it leads to may come last, or be replaced
    candidate = Candidate(entry.path, name, extension, version, entry.kind, sidecars=there)
    return Picks(entry, (candidate,), unsafe=unsafe)


def _unread(entry: Entry, path: str, error: OSError, notes: _Notes) -> Picks:
    """No answer for an entry: removed, or only out of reach."""
    _require_all(error, notes)
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


def _read(
    place: int,
    notes: _Notes,
    path: str,
    wanted: str | None = None,
    kind: Kind | None = None,
    *,
    by_stat: bool = True,
) -> tuple[Dirent, ...]:
    """The names in a directory, each with what it leads to, in the order of the names.

    Args:
        place: O_PATH descriptor of it, `path` the path that it was found by.
        wanted: pattern; leave out names that do not match.
        kind: what they are to be, in a directory of versions: where their links lead is watched.
        by_stat: look at each file; else the directory's own word that it is one will do.

    Raises:
        OSError: the directory itself cannot be read, or there are too many.
    """
    descriptor = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:  # which may be ten million
            listed = list(islice(entries, _NAMES_MAX + 1))
        if len(listed) > _NAMES_MAX:
            raise OSError(errno.E2BIG, f"more than {_NAMES_MAX} names in it, remove some", path)
        others = [entry for entry in listed if by_stat or not entry.is_file(follow_symlinks=False)]
        names = {entry.name for entry in others}
        files = _files(wanted, tuple(entry.name for entry in listed if entry.name not in names))
        if not others:
            return files
        found = (
            _linked(f"{path}/{entry.name}", notes, kind)
            if entry.is_symlink()
            else _dirent(entry.name, descriptor, notes)
            for entry in sorted(others, key=lambda entry: entry.name)
            if wanted is None or re.fullmatch(wanted, entry.name)
        )
        return tuple(sorted((*files, *(dirent for dirent in found if dirent))))
    finally:
        os.close(descriptor)


@functools.lru_cache(8)
def _files(wanted: str | None, names: tuple[str, ...]) -> tuple[Dirent, ...]:
    """Plain files, in the order of their names. Of a large directory, several services ask for the same."""
    fits = re.compile(wanted or "(?s:.*)").fullmatch
    return tuple([Dirent(name, "file") for name in sorted(names) if fits(name)])


def _dirent(name: str, directory: int, notes: _Notes) -> Dirent | None:
    """None: it went away meanwhile."""
    try:
        return Dirent(name, _type(os.stat(name, dir_fd=directory, follow_symlinks=False), False))
    except OSError as error:
        _require_all(error, notes)
        return None if error.errno == errno.ENOENT else Dirent(name, "other", False, _reason(error))


def _answers(name: str, directory: int) -> bool:
    """Whether a name can be looked at: a directory that is listed need not let us, and a disk may fail."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _linked(path: str, notes: _Notes, kind: Kind | None) -> Dirent:
    """A link, by what it leads to. One that must not be followed is still a candidate, which is then refused."""
    name = path.rpartition("/")[2]
    # Without a kind: the look at the entry watches this link.
    watching = _Notes(notes.modes) if kind is None else notes
    try:
        with watching.followed(path) as found:
            return Dirent(name, _type(found.status, True), True)
    except Unsafe as unsafe:
        if kind is None:
            return Dirent(name, "other", True, str(unsafe))
        return Dirent(name, "directory" if kind is Kind.DIRECTORY else "file", True)
    except OSError as error:
        _require_all(error, notes)
        return Dirent(name, "missing" if error.errno in _ABSENT else "other", True, _reason(error))


def _require_all(error: OSError, notes: _Notes) -> None:
    """Raise an error again that says nothing of what is on the disk; note one that may end without an event."""
    if error.errno in LACKS:
        raise error
    notes.failed = notes.failed or error.errno not in _ABSENT | _MENDED


def _type(status: os.stat_result, link: bool) -> vpick.Type:
    if link and stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL:
        return "null"
    return _TYPES.get(stat.S_IFMT(status.st_mode), "other")


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "the link leads nowhere"
    if error.errno == errno.ELOOP:
        return "the link leads in a circle"
    return error.strerror or str(error)
