# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of files and directories, put together in an empty directory that an image is made of.

What a tool would read by itself may change while it reads. So everything is copied first. The owner of what is copied
may change it meanwhile: the walk goes by descriptor, follows no link, and takes no file that is being written.

What a node has in the copy besides its content (owner, mode, attributes) is for the one who makes the image to say:
build_stage.py, and first_version.py in `setup/`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from watcher.images import attributes
from watcher.images.errors import require_size
from watcher.images.files import copy_file
from watcher.images.tree import in_blocks
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

T = TypeVar("T")


class Staging(Walk):
    """Copies one node after the other, with all that is below it, or only looks at them, where the copy is None.

    A `Path` is a place in the copy, an `origin` where a node comes from. What comes from one origin twice is there
    once.

    Attributes:
        size: bytes of all files.
        room: bytes that the copy takes.
    """

    def __init__(self, size_max: int) -> None:
        super().__init__()
        self.size = self.room = 0
        self._size_max = size_max
        self._from: dict[Path, str] = {}
        """Where each file and link came from."""

    # --- what a kind of image has its own rule for ---

    def _takes(self, path: Path) -> bool:
        """Whether a node that lies in a directory gets into the copy."""
        return is_content(path)

    def _special(self, what: str, origin: str) -> None:
        """Of a node that no image can have."""
        raise Refused(f"{shown(origin)} is {what}: remove it")

    def _found_directory(self, fd: int, st: os.stat_result, path: Path) -> None:
        """Note what `fd` is, before what is in it."""

    def _finish_directory(self, fd: int, st: os.stat_result, made: int, path: Path) -> None:
        """Complete the directory `made`, a copy of `fd`, when all is in it."""

    def _finish_link(self, node: str, st: os.stat_result, target: int, path: Path) -> None:
        """Complete the link `path[-1]` in the directory `target`; `node` is a path of what it was made of."""

    def _found_file(self, fd: int, st: os.stat_result, path: Path) -> None:
        """Note what `fd` is, before it is copied."""
        raise NotImplementedError

    def _finish_file(self, fd: int, st: os.stat_result, made: int, path: Path) -> None:
        """Complete the file `made`, a copy of `fd`."""
        raise NotImplementedError

    # --- the copy ---

    def has(self, place: Path) -> bool:
        return place in self._from

    def write(self, root: int, place: Path, text: str) -> None:
        """Make a file that no source has, in the copy `root`."""
        with Descriptors() as fds:
            parent = root
            for depth in range(1, len(place)):
                parent = fds.add(self._made(parent, place[:depth], ""))
            try:
                made = fds.add(os.open(place[-1], _NEW, 0o600, dir_fd=parent))
            except FileExistsError:
                raise Refused(f"{shown('/'.join(place))} is a directory, and must be a file") from None
            os.write(made, text.encode())
            os.fchmod(made, 0o644)

    def _made(self, parent: int, path: Path, origin: str) -> int:
        """A directory of the copy, made or there already; the caller closes it."""
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
        self, parent: int | None, name: str, target: int | None, path: Path, origin: str, *, follow: bool
    ) -> None:
        """Copy one node, and what is below it.

        Args:
            name: of the node in the directory `parent`, or a path.
            target: the directory of the copy that gets it, as `path[-1]`.
        """
        if self._from.get(path) == origin:
            return
        with _explained(origin):
            st = os.stat(name, dir_fd=parent, follow_symlinks=follow)
            to = os.readlink(name, dir_fd=parent) if stat.S_ISLNK(st.st_mode) else ""
        if to:
            self._link(
                name if parent is None else f"/proc/self/fd/{parent}/{name}", to, st, target, path, origin
            )
            return
        type_ = stat.S_IFMT(st.st_mode)
        if type_ not in (stat.S_IFREG, stat.S_IFDIR):
            self._special(_SPECIAL.get(type_, "of an unknown type"), origin)
            return
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
                made = None if target is None else fds.add(self._made(target, path, origin))
                self._directory(fd, found, made, path, origin)

    def _directory(self, fd: int, st: os.stat_result, made: int | None, path: Path, origin: str) -> None:
        self.room += in_blocks(0)
        self._found_directory(fd, st, path)
        for name in self.names(fd, path):
            if self._takes((*path, name)):
                self._node(fd, name, made, (*path, name), os.path.join(origin, name), follow=False)
        if os.fstat(fd).st_mtime_ns != st.st_mtime_ns:
            raise _changed(origin)
        if made is not None:
            self._finish_directory(fd, st, made, path)

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

    def _link(
        self, node: str, to: str, st: os.stat_result, target: int | None, path: Path, origin: str
    ) -> None:
        self.room += in_blocks(0)
        if target is None:
            self._from[path] = origin
            return
        self._making(path, origin, lambda: os.symlink(to, path[-1], dir_fd=target))
        self._finish_link(node, st, target, path)

    def _file(self, fd: int, st: os.stat_result, target: int | None, path: Path, origin: str) -> None:
        self.size += st.st_size
        self.room += in_blocks(st.st_size)
        try:
            require_size(self.size, self._size_max, "ImageMax=")
        except Refused as refused:
            raise Refused(f"{refused}, with {shown(origin)}") from None
        self._found_file(fd, st, path)
        if target is None:
            self._from[path] = origin
            return
        made = self._making(path, origin, lambda: os.open(path[-1], _NEW, 0o600, dir_fd=target))
        try:
            with Lease(fd) as lease:
                copy_file(fd, made, st.st_size, hashlib.sha256(), lease)
            if os.fstat(fd).st_size != st.st_size:
                raise Busy("it grew while it was read")
            self._finish_file(fd, st, made, path)
        except Busy as busy:
            raise Busy(f"{shown(origin)}: {busy}: try again when it is written") from None
        finally:
            os.close(made)


def directory() -> str:
    """Where a copy is put together: on a disk, as all of an image may be too much for memory."""
    given = any(os.environ.get(key) for key in ("TMPDIR", "TEMP", "TMP"))
    return tempfile.gettempdir() if given or not os.access("/var/tmp", os.W_OK | os.X_OK) else "/var/tmp"


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
    """Refuse an attribute by which a file hides others, in an overlay alone: no image gets it."""
    for name in attributes.names(fd):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            raise Refused(
                f"{shown(origin)} has the extended attribute {shown(name)}, which no image gets that is built so:"
                " remove it, or make the image by hand"
            )


def _changed(origin: str) -> Busy:
    return Busy(f"{shown(origin)} changed while it was read: try again")
