# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first version of a service's image: what it has of the host's /etc now, with owners, modes and times.

A directory in /etc may be another user's, and changed meanwhile: the walk goes by descriptor and follows no link.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from watcher.images.errors import require_size
from watcher.images.walk import DIRECTORY, Path, Walk
from watcher.model import Refused, shown
from watcher.records.schema import Failed
from watcher.resolve.content import is_content

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DPKG = "/var/lib/dpkg/info"


@dataclass(slots=True)
class Taken:
    """What of the host is taken. Paths are absolute.

    Attributes:
        files: regular files and links.
        size: bytes of all files.
        private: files that not everybody may read, with their modes.
        excluded: what must not be in an image.
        unusable: what no image can have, with the reason.
        missing: sources that are not there.
    """

    files: list[str] = field(default_factory=list)
    size: int = 0
    private: list[tuple[str, int]] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def take(
    sources: Iterable[str],
    excludes: Callable[[str], bool],
    size_max: int,
    target: str = "",
    root: str = "/",
) -> Taken:
    """Look at what would be taken, or copy it.

    Args:
        sources: absolute paths below /etc.
        excludes: whether a path must not be in an image.
        size_max: bytes of all files (`ImageMax=`).
        target: an empty directory, which then has an `etc`; "": only look.
        root: that the paths are below.

    Raises:
        Failed: a source is a link, or there is too much.
        OSError: something cannot be read or written.
    """
    taking = _Taking(excludes, size_max, target)
    start = os.open(root, DIRECTORY)
    try:
        for source in sources:
            taking.source(start, source)
    except Refused as error:
        raise Failed(f"what is to be taken is too much: {error}") from error
    finally:
        os.close(start)
    return taking.taken


def of_packages(files: Iterable[str], info: str = _DPKG) -> dict[str, int]:
    """How many of these files are conffiles of a Debian package, by package; nothing where there is no dpkg."""
    found: dict[str, int] = {}
    wanted = set(files)
    try:
        names = sorted(name for name in os.listdir(info) if name.endswith(".conffiles"))
    except OSError:
        return {}
    for name in names:
        with open(f"{info}/{name}", encoding="utf-8", errors="surrogateescape") as file:
            # "remove-on-upgrade" may stand in front of the path (deb-conffiles(5)).
            count = sum(1 for line in file if line.strip().rpartition(" ")[2] in wanted)
        if count:
            package = name.removesuffix(".conffiles").partition(":")[0]
            found[package] = found.get(package, 0) + count
    return found


class _Taking(Walk):
    def __init__(self, excludes: Callable[[str], bool], size_max: int, target: str) -> None:
        super().__init__()
        self._excludes = excludes
        self._size_max = size_max
        self._target = target
        self._done: set[str] = set()
        self.taken = Taken()

    def source(self, root: int, source: str) -> None:
        """One source, with the directories above it, which have the host's modes in the image, too."""
        parts = tuple(source.strip("/").split("/"))
        above = os.dup(root)
        try:
            for depth, name in enumerate(parts[:-1], 1):
                inner = os.open(name, DIRECTORY, dir_fd=above)
                os.close(above)
                above = inner
                self._made(above, parts[:depth])
            st = os.stat(parts[-1], dir_fd=above, follow_symlinks=False)
            if stat.S_ISLNK(st.st_mode):
                to = os.readlink(parts[-1], dir_fd=above)
                raise Failed(
                    f"{shown(source)} is a link to {shown(to)}: name with --from what is to be taken"
                )
            self._node(above, parts, st, private=False)
        except FileNotFoundError:
            self.taken.missing.append(source)
        finally:
            os.close(above)

    def _node(self, above: int, path: Path, st: os.stat_result, *, private: bool) -> None:
        name, whole = path[-1], "/" + "/".join(path)
        if whole in self._done:
            return
        if not is_content(path) or self._excludes(whole):
            self.taken.excluded.append(whole)
            return
        self._done.add(whole)
        if stat.S_ISDIR(st.st_mode):
            self._directory(above, path, private=private)
        elif stat.S_ISLNK(st.st_mode):
            self.taken.files.append(whole)
            if self._target:
                os.symlink(os.readlink(name, dir_fd=above), self._target + whole)
                os.chown(self._target + whole, st.st_uid, st.st_gid, follow_symlinks=False)
        elif stat.S_ISREG(st.st_mode):
            self._file(above, path, private=private)
        else:
            self.taken.unusable.append((whole, "a socket, a FIFO or a device"))

    def _directory(self, above: int, path: Path, *, private: bool) -> None:
        directory = os.open(path[-1], DIRECTORY, dir_fd=above)
        try:
            status = self._made(directory, path)
            for name in self.names(directory, path):
                st = os.stat(name, dir_fd=directory, follow_symlinks=False)
                self._node(directory, (*path, name), st, private=private or not status.st_mode & 0o001)
            self._finish(directory, path)
        finally:
            os.close(directory)

    def _file(self, above: int, path: Path, *, private: bool) -> None:
        whole = "/" + "/".join(path)
        source = os.open(path[-1], _FILE, dir_fd=above)
        try:
            st = os.fstat(source)
            if not stat.S_ISREG(st.st_mode):
                raise Failed(f"{shown(whole)} has just become something else: once more")
            self.taken.files.append(whole)
            self.taken.size += st.st_size
            require_size(self.taken.size, self._size_max, "ImageMax=")
            if private or not st.st_mode & 0o004:
                self.taken.private.append((whole, stat.S_IMODE(st.st_mode)))
            if self._target:
                self._copy(source, st, whole)
        finally:
            os.close(source)

    def _copy(self, source: int, st: os.stat_result, whole: str) -> None:
        target = os.open(self._target + whole, _NEW, 0o600)
        with open(source, "rb", closefd=False) as reading, open(target, "wb") as writing:
            shutil.copyfileobj(reading, writing)
            writing.flush()
            _like(target, st)

    def _made(self, directory: int, path: Path) -> os.stat_result:
        """A directory of the copy, which has the host's mode at once: nothing below it is open to more users."""
        st = os.fstat(directory)
        there = "/".join((self._target, *path))
        if self._target and not os.path.isdir(there):
            os.mkdir(there, 0o700)
            self._finish(directory, path)
        return st

    def _finish(self, directory: int, path: Path) -> None:
        if self._target:
            made = os.open("/".join((self._target, *path)), DIRECTORY)
            try:
                _like(made, os.fstat(directory))
            finally:
                os.close(made)


def _like(fd: int, st: os.stat_result) -> None:
    os.fchown(fd, st.st_uid, st.st_gid)
    os.fchmod(fd, stat.S_IMODE(st.st_mode))
    os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
