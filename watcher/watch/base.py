# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches the `/etc` that stacks have as their base, below every directory: one set of watches for each base.

What is written to a file in place shows by itself (mounts/refresh.py). So only names count: they come, go, are
replaced, or their mode or owner changes. All bases share one inotify instance; the kernel's limit on these is 128 for
all programs of root.

A directory is watched before it is listed. What was in it already when it was watched is not told name by name: of a
new directory it is unknown what has changed in it.
"""

from __future__ import annotations

import errno
import os
from itertools import islice

from inotify_simple import INotify, flags

from watcher.model import DEPTH_MAX, ENTRIES_MAX, Remark
from watcher.mounts import syscalls
from watcher.mounts.refresh import Changes
from watcher.watch.watched_trees import watches_max
from watcher.watch.watcher import RETRY_SEC

_REPLACED: int = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
_MASK: int = _REPLACED | flags.ATTRIB | flags.ONLYDIR | flags.DONT_FOLLOW | flags.EXCL_UNLINK
_RARE: int = flags.Q_OVERFLOW | flags.IGNORED | flags.ISDIR
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_RESOLVE = syscalls.RESOLVE_INSIDE | syscalls.RESOLVE_NO_XDEV

# It has gone, which is an event; or not even we may read it, as root of a user namespace.
_LEFT_OUT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)

LOCAL = frozenset(
    "ext2 ext3 ext4 xfs btrfs bcachefs f2fs zfs tmpfs ramfs jfs nilfs2 reiserfs ubifs jffs2".split()
)
"""Others may be changed from elsewhere, of which inotify does not tell, or may not answer, and this thread waits for
nobody. An overlay may lie on anything; only that of the host itself is watched."""

FIXED = frozenset(("squashfs", "erofs", "iso9660", "cramfs", "romfs"))
"""File systems that nobody can write to."""

DIRECTORIES_MAX = 10_000
"""Directories of one base that are watched: a service may be able to make any number in a root of its own."""


class Base:
    """One base, and the watches on its directories.

    Attributes:
        fd: O_PATH descriptor; its user closes it.
        gap: why a part of it cannot be watched, as an errno; 0: all is watched.
        watches: watch descriptors, by directory.
    """

    def __init__(self, fd: int, fstype: str) -> None:
        self.fd = fd
        self.fixed = fstype in FIXED
        own = {os.stat("/").st_dev, os.stat("/etc").st_dev}
        self.gap = 0 if fstype in LOCAL or self.fixed or os.fstat(fd).st_dev in own else errno.EREMOTE
        self.watches: dict[str, int] = {}
        self._below: dict[str, set[str]] = {}

    def watched(self, directory: str, wd: int) -> None:
        """A directory is watched from now on."""
        self.watches[directory] = wd
        if directory:
            self._below.setdefault(directory.rpartition("/")[0], set()).add(directory)

    def lost(self, directory: str) -> int | None:
        """It is not watched any more; its watch descriptor."""
        self._below.get(directory.rpartition("/")[0], set()).discard(directory)
        if not self._below.get(directory, True):
            del self._below[directory]
        return self.watches.pop(directory, None)

    def tree(self, top: str) -> list[str]:
        """A directory that is watched, and those below it."""
        found = [top] if top in self.watches else []
        for directory in found:
            found += self._below.get(directory, ())
        return found


class BaseWatches:
    """The watches of all bases. For one thread.

    Raises OSError: no inotify instance.
    """

    def __init__(self, inotify: INotify) -> None:
        self._inotify = inotify
        self._limit = watches_max() // 2  # the rest is for drop directories
        self._at: dict[int, dict[Base, str]] = {}

    def add(self, base: Base) -> None:
        """Watch a base, or what of it could not be watched before."""
        if base.fixed or base.gap in (errno.EREMOTE, errno.E2BIG):
            return
        base.gap = 0
        self._watch_below(base, "")

    def remove(self, base: Base) -> None:
        """Watch it no more."""
        for directory in list(base.watches):
            self._forget(base, directory)

    def read(self) -> dict[Base, Changes]:
        """What has changed since the last call, by base. Does not wait."""
        found: dict[Base, Changes] = {}
        # By watch: where the names go. An upgrade of a package makes thousands of events.
        names_of: dict[int, list[dict[str, bool]]] = {}
        for wd, mask, _, name in self._inotify.read(timeout=0):
            if mask & _RARE or not name:
                names_of.clear()
                self._rare(wd, mask, name, found)
                continue
            if wd not in names_of:
                names_of[wd] = [
                    found.setdefault(base, Changes()).names.setdefault(directory, {})
                    for base, directory in self._at.get(wd, {}).items()
                ]
            for names in names_of[wd]:
                if mask & _REPLACED:
                    names[name] = True
                else:
                    names.setdefault(name, False)
        return found

    def _rare(self, wd: int, mask: int, name: str, found: dict[Base, Changes]) -> None:
        """An event that is about a directory, or about the queue."""
        if mask & flags.Q_OVERFLOW:
            self._lost(found)
        elif mask & flags.IGNORED:
            for base, directory in self._at.pop(wd, {}).items():
                if base.watches.get(directory) == wd:
                    base.lost(directory)
        elif name:
            for base, directory in tuple(self._at.get(wd, {}).items()):
                self._changed(base, directory, name, mask, found.setdefault(base, Changes()))

    def _changed(self, base: Base, directory: str, name: str, mask: int, changes: Changes) -> None:
        """A subdirectory came, went, or has another mode."""
        changes.add(directory, name, replaced=bool(mask & _REPLACED))
        if not mask & _REPLACED:
            return
        path = f"{directory}/{name}" if directory else name
        for one in base.tree(path):
            self._forget(base, one)
        if mask & (flags.CREATE | flags.MOVED_TO):
            self._watch_below(base, path)
            changes.unknown.update(base.tree(path))

    def _lost(self, found: dict[Base, Changes]) -> None:
        """Events were lost: new directories among them, perhaps."""
        for base in {base for watched in self._at.values() for base in watched}:
            self.remove(base)
            self.add(base)
            found[base] = Changes(anything=True)

    def _watch_below(self, base: Base, top: str) -> None:
        todo = [top]
        while todo:
            directory = todo.pop()
            try:
                todo += self._watch(base, directory)
            except OSError as error:
                if error.errno == errno.EXDEV and directory:
                    continue  # another file system: an overlay does not show it
                if error.errno in _LEFT_OUT:
                    continue
                base.gap = error.errno or errno.EIO
                if base.gap in (errno.ENOSPC, errno.E2BIG):
                    return

    def _watch(self, base: Base, directory: str) -> list[str]:
        """Watch one directory. Returns its subdirectories."""
        if len(self._at) >= self._limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if len(base.watches) >= DIRECTORIES_MAX and directory not in base.watches:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        fd = syscalls.openat2(base.fd, directory or ".", _OPEN, _RESOLVE)
        try:
            wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", _MASK & ~flags.DONT_FOLLOW)
            self._at.setdefault(wd, {})[base] = directory
            base.watched(directory, wd)
            if directory.count("/") >= DEPTH_MAX:
                return []
            with os.scandir(fd) as entries:
                some = islice(entries, ENTRIES_MAX)  # of ten million, perhaps
                names = [entry.name for entry in some if entry.is_dir(follow_symlinks=False)]
        finally:
            os.close(fd)
        return [f"{directory}/{name}" if directory else name for name in names]

    def _forget(self, base: Base, directory: str) -> None:
        wd = base.lost(directory)
        if wd is None:
            return
        others = self._at.get(wd, {})
        if others.get(base) == directory:
            del others[base]
        if not others and self._at.pop(wd, None) is not None:
            try:
                self._inotify.rm_watch(wd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the kernel has dropped it: the directory is gone
                    raise


def reason(error: int) -> str:
    """Words for `Base.gap`."""
    if error == errno.ENOSPC:
        return "the limit fs.inotify.max_user_watches is reached, raise it with sysctl"
    if error == errno.E2BIG:
        return f"more than {DIRECTORIES_MAX} directories in it"
    if error == errno.EREMOTE:
        return "its file system does not tell of changes"
    return os.strerror(error)


def gap_remark(why: str) -> Remark:
    """What to tell the administrator."""
    late = f"within {RETRY_SEC:.0f} s"
    text = f"not watched as a whole: {why}. Until then a service on a stack sees what the host replaces there {late}"
    return Remark("warning", "/etc", text)
