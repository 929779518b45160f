# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree that an image is made of: a private copy of what goes in, with the same modes whoever builds it.

What a tool would read by itself may change while it reads, and has the build machine's modes and owners. So everything
is copied first. A copy has a file's content, and of its mode whether it may be executed and whether all may read it;
nothing else: no owner, time, extended attribute, hard link or hole. These differ between two checkouts of one
repository, and the same content is to be the same image.

The owner of what goes in may change it meanwhile: the walk goes by descriptor, and follows no link.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

from watcher.images import attributes
from watcher.images.build_sources import Source
from watcher.images.errors import require_size
from watcher.images.files import copy_file
from watcher.images.walk import DIRECTORY, Path, Walk
from watcher.model import Busy, Refused, shown
from watcher.mounts.descriptors import Descriptors
from watcher.resolve.content import is_content
from watcher.watch.lease import Lease

# O_NONBLOCK: another process's lease (Samba's) makes this fail instead of wait.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What open(2) says of a node that is no longer what stat(2) saw, or on which another process holds a write lease.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK})
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
_NAMED_MAX = 5

T = TypeVar("T")


class Stage(Walk):
    """Puts one source after the other into an empty directory.

    Attributes:
        private: some file in it is for root alone.
    """

    def __init__(self, root: int, size_max: int) -> None:
        super().__init__()
        self._root = root
        self._left = size_max
        self._size_max = size_max
        self._from: dict[Path, str] = {}
        """Where each file and link came from."""
        self._leftovers: list[str] = []
        self._private: list[str] = []
        self._opened: list[str] = []
        self._set_id: list[str] = []

    @property
    def private(self) -> bool:
        return bool(self._private)

    def add(self, source: Source) -> None:
        """Copy what a source has.

        Raises:
            Refused: it has what no image can have, two sources have the same file, or it is too large.
            Busy: it changes, or is being written.
            OSError: it cannot be read, or not be written here.
        """
        with Descriptors() as fds:
            if not source.place:
                top = fds.add(os.open(source.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                self._node(top, "etc", self._root, ("etc",), os.path.join(source.path, "etc"), follow=False)
                return
            parent = self._root
            for depth in range(1, len(source.place)):
                parent = fds.add(self._made(parent, source.place[:depth], source.path))
            self._note_parents(source)
            # A slash at the end would have the link followed.
            path = source.path if source.follow else source.path.rstrip("/")
            self._node(None, path, parent, source.place, source.path, follow=source.follow)

    def write(self, place: Path, text: str) -> None:
        """Make a file that no source has."""
        with Descriptors() as fds:
            parent = self._root
            for depth in range(1, len(place)):
                parent = fds.add(self._made(parent, place[:depth], ""))
            try:
                made = fds.add(os.open(place[-1], _NEW, 0o600, dir_fd=parent))
            except FileExistsError:
                raise Refused(f"{shown('/'.join(place))} is a directory, and must be a file") from None
            os.write(made, text.encode())
            os.fchmod(made, 0o644)

    def has(self, place: Path) -> bool:
        return place in self._from

    def notes(self) -> tuple[str, ...]:
        """What is in the image otherwise than it was, one line for each kind."""
        return tuple(
            f"{said}: {_some(found)}"
            for said, found in (
                ("left out, as editors and package managers leave such files behind", self._leftovers),
                ("for root alone, as not all may read it here", self._private),
                ("open to all in the image, and not here", self._opened),
                ("without its set-user-ID or set-group-ID bit", self._set_id),
            )
            if found
        )

    def _note_parents(self, source: Source) -> None:
        """Of a file that is named by its place on this host: which directories above it are closed there."""
        if not source.follow and source.path.startswith("/"):
            for depth in range(2, len(source.place)):
                path = source.place[:depth]
                self._note_directory(os.stat("/" + "/".join(path)), path)

    def _note_directory(self, st: os.stat_result, path: Path) -> None:
        if not st.st_mode & stat.S_IXOTH:
            self._opened.append("/".join(path))

    def _made(self, parent: int, path: Path, origin: str) -> int:
        """A directory of the stage, made or there already; the caller closes it."""
        try:
            os.mkdir(path[-1], 0o755, dir_fd=parent)
            os.chmod(path[-1], 0o755, dir_fd=parent)
        except FileExistsError:
            pass
        try:
            return os.open(path[-1], DIRECTORY, dir_fd=parent)
        except NotADirectoryError:
            raise self._both(path, origin) from None

    def _both(self, path: Path, origin: str) -> Refused:
        first = self._from.get(path)
        sources = f"from {shown(first)}" if first else "as a directory"
        return Refused(f"{shown('/'.join(path))} comes {sources} and from {shown(origin)}: leave out one")

    def _node(
        self, parent: int | None, name: str, target: int, path: Path, origin: str, *, follow: bool
    ) -> None:
        """Copy one node, and what is below it.

        Args:
            name: of the node in the directory `parent`, or a path.
            target: the directory of the stage that gets it, as `path[-1]`.
            origin: where it is, for messages.
        """
        with _explained(origin):
            st = os.stat(name, dir_fd=parent, follow_symlinks=follow)
            to = os.readlink(name, dir_fd=parent) if stat.S_ISLNK(st.st_mode) else ""
        if to:
            self._making(path, origin, lambda: os.symlink(to, path[-1], dir_fd=target))
            return
        type_ = stat.S_IFMT(st.st_mode)
        if type_ not in (stat.S_IFREG, stat.S_IFDIR):
            raise Refused(f"{shown(origin)} is {_SPECIAL.get(type_, 'of an unknown type')}: remove it")
        with Descriptors() as fds:
            flags = DIRECTORY if type_ == stat.S_IFDIR else _FILE | os.O_NOFOLLOW
            with _explained(origin):
                fd = fds.add(os.open(name, flags & ~os.O_NOFOLLOW if follow else flags, dir_fd=parent))
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)) != (st.st_dev, st.st_ino, type_):
                raise _changed(origin)
            _require_plain(fd, origin)
            if type_ == stat.S_IFREG:
                self._file(fd, found, target, path, origin)
            else:
                made = fds.add(self._made(target, path, origin))
                self._directory(fd, found, made, path, origin)

    def _directory(self, fd: int, st: os.stat_result, made: int, path: Path, origin: str) -> None:
        if path != ("etc",):
            self._note_directory(st, path)
        for name in self.names(fd, path):
            if is_content((*path, name)):
                self._node(fd, name, made, (*path, name), os.path.join(origin, name), follow=False)
            else:
                self._leftovers.append("/".join((*path, name)))
        if os.fstat(fd).st_mtime_ns != st.st_mtime_ns:
            raise _changed(origin)

    def _making(self, path: Path, origin: str, make: Callable[[], T]) -> T:
        """What `make` makes at a path that no other source has made."""
        if path in self._from:
            raise self._both(path, origin)
        try:
            made = make()
        except FileExistsError:
            raise self._both(path, origin) from None
        self._from[path] = origin
        return made

    def _file(self, fd: int, st: os.stat_result, target: int, path: Path, origin: str) -> None:
        self._left -= st.st_size
        try:
            require_size(self._size_max - self._left, self._size_max, "ImageMax=")
        except Refused as refused:
            raise Refused(f"{refused}, with {shown(origin)}") from None
        mode = 0o644 if st.st_mode & stat.S_IROTH else 0o600
        if st.st_mode & stat.S_IXUSR:
            mode |= (mode & 0o444) >> 2
        where = "/".join(path)
        if not mode & stat.S_IROTH:
            self._private.append(where + _group(st))
        if st.st_mode & (stat.S_ISUID | stat.S_ISGID):
            self._set_id.append(where)
        made = self._making(path, origin, lambda: os.open(path[-1], _NEW, 0o600, dir_fd=target))
        try:
            with Lease(fd) as lease:
                copy_file(fd, made, st.st_size, hashlib.sha256(), lease)
            if os.fstat(fd).st_size != st.st_size:
                raise Busy("it grew while it was read")
            os.fchmod(made, mode)
        except Busy as busy:
            raise Busy(f"{shown(origin)}: {busy}: build again when it is written") from None
        finally:
            os.close(made)


@contextlib.contextmanager
def _explained(origin: str) -> Iterator[None]:
    """An error of a system call that names a node, with all of its path."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise _changed(origin) from error
        raise Refused(f"{shown(origin)} cannot be read: {error.strerror}") from error


def _require_plain(fd: int, origin: str) -> None:
    """Extended attributes are left out; one by which a file hides others would be missed."""
    for name in attributes.names(fd):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            raise Refused(
                f"{shown(origin)} has the extended attribute {shown(name)}, which no image gets that is built so:"
                " remove it, or make the image by hand"
            )


def _group(st: os.stat_result) -> str:
    """The group that may read a file here, and cannot in the image."""
    if not st.st_mode & stat.S_IRGRP or st.st_gid == 0:
        return ""
    try:
        name = grp.getgrgid(st.st_gid).gr_name
    except KeyError:
        name = str(st.st_gid)
    return f" (here for group {name}, too)"


def _changed(origin: str) -> Busy:
    return Busy(f"{shown(origin)} changed while it was read: build again")


def _some(paths: list[str]) -> str:
    more = len(paths) - _NAMED_MAX
    said = ", ".join(map(shown, paths[:_NAMED_MAX]))
    return f"{said} and {more} more" if more > 0 else said
