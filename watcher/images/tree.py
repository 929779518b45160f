# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory trees: their signature, their digest, and a faithful copy.

Strangers own a tree until it has been copied, and may change it meanwhile. Three things together make sure that a copy
shows one moment of it. Each file is copied under a lease. The `Signature` (what `stat` says of every node) is the same
before and after. And the copy only begins when the clock of the file system has moved past the latest change, so that a
later change cannot have the same timestamp.

The digest is the SHA-256 of: a header, then for the root and each node in it, depth first, names in the order of
their bytes: the type, mode, owner and group, the extended attributes by name, then a file's length and bytes, a
link's target, or a directory's number of entries and each one's name and node. Numbers are little endian, strings
have their length in front, so that no two trees give the same stream. Times and hard links do not count, nor does what
is no content (content.py). A copy has nothing else in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from watcher.images import attributes
from watcher.images.attributes import Xattrs
from watcher.images.extension import RELEASE_DIRECTORY
from watcher.images.files import Hasher, copy_file, hash_file, stat_key
from watcher.images.walk import DIRECTORY, Path, Walk, where
from watcher.model import Busy, Refused
from watcher.resolve import release
from watcher.resolve.content import MARKER, is_content
from watcher.resolve.strict_modes import Guard
from watcher.watch.lease import Lease, coarse_now_ns

# The default of ext4, xfs and btrfs.
_BLOCK = 4096

_HEADER = b"confext-watcher tree 1\n"
_NODE = struct.Struct("<cIII")
_LENGTH = struct.Struct("<Q")

# O_NONBLOCK: another process's lease (Samba's) makes this fail instead of wait.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# What open(2) says of a node that is no longer what stat(2) saw, or on which another process holds a write lease.
_CHANGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK})

Read = Callable[[int, int, Hasher], None]
"""Brings so many bytes of a file into a hash: `hash_file()`."""

_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


@dataclass(frozen=True, slots=True)
class Signature:
    """What `stat` says of every node: the same signature, the same tree, if no change of it is still too fresh.

    Of the root only what it is counts, not its times: to rename a tree, or to make something beside `etc` in it,
    changes nothing of its content.

    Attributes:
        key: SHA-256 over it.
        size: bytes that a copy takes: `in_blocks()` of each file, directory and link.
        entries: files, directories and links in it.
        youngest_ns: latest ctime below the root, nanoseconds since the epoch; 0 if there is nothing.
        changed_ns: the same without the marker, which is written when all else is there.
        marked_ns: ctime of the marker; 0: there is none.
    """

    key: bytes
    size: int
    entries: int
    youngest_ns: int
    changed_ns: int = 0
    marked_ns: int = 0


def signature(root: int, guard: Guard | None = None, *, whole: bool = False) -> Signature:
    """Walk the tree below the directory `root` by `stat` alone.

    Args:
        guard: called for each node below it; raises Refused where strangers could change it.
        whole: all in it counts: it is a copy in the store.

    Raises:
        Refused: it holds something that no copy could have (a device, a socket), or too much of it.
        Busy: it changes while it is walked.
        OSError: it could not be read.
    """
    walk = _Signing(guard, whole=whole)
    walk.root(os.fstat(root))
    walk.directory(root, ())
    youngest_ns = max(walk.changed_ns, walk.marked_ns)
    return Signature(
        walk.hash.digest(), walk.size, walk.entries, youngest_ns, walk.changed_ns, walk.marked_ns
    )


def wait_for_clock(signature: Signature) -> None:
    """Wait until a further change cannot have the timestamp of the latest one: at most a few milliseconds.

    Timestamps are as coarse as the timer's tick. A time in the future (the clock was set back) is not waited for: no
    further change gets it.
    """
    tick_ns = 20_000_000
    while 0 <= signature.youngest_ns - coarse_now_ns() < tick_ns:
        time.sleep(0.001)


def digest(root: int, *, whole: bool = False, read: Read = hash_file) -> str:
    """Digest of the tree below `root` (64 hexadecimal digits), without copying it. Raises as `copy` does.

    Args:
        whole: as for `signature()`.
        read: reads each file; the kernel's memory may have the names, and what `stat` says.
    """
    return _Reading(whole=whole, read=read).run(root)


def digest_of(root: int, signature: Signature) -> str:
    """`digest()` of a tree whose signature was taken before. Raises Busy if it is another one now."""
    found = digest(root)
    require_unchanged(root, signature)
    return found


def require_unchanged(root: int, before: Signature) -> None:
    """Raise Busy if the signature of a tree is another one than before."""
    if signature(root).key != before.key:
        raise Busy("changed while it was read")


def copy(root: int, target: int, size_max: int) -> str:
    """Copy the tree below `root` into the empty directory `target`, and give its digest.

    Modes, owners, times, links, hard links, holes and extended attributes are kept. An owner or an attribute that the
    kernel does not let us set (without root) is left out of the copy, not out of the digest.

    The release files of the copy get `user.extension-release.strict=0`: the slot has another name than the tree, and
    systemd has no `x-systemd.relax-extension-release-check` for directories. What the source said is kept beside it,
    and is what counts.

    Nothing is synced to the disk: see `durable.py`.

    Raises:
        Refused: as `signature`; a file that cannot be read.
        Busy: another process writes to it; it has grown beyond `size_max` bytes.
        OSError: reading or writing failed.
    """
    return _Reading(target, size_max).run(root)


def in_blocks(size: int) -> int:
    """What a file of so many bytes counts for: whole blocks, and at least one, for its inode.

    Not `st_blocks`: that is of the file system where the tree lies now, which may compress, or share blocks with files
    that go away. Nor is it known yet of what has just been written. Holes count, since they are read.
    """
    return max(-(-size // _BLOCK), 1) * _BLOCK


@contextmanager
def _opened(name: str, flags: int, parent: int, path: Path) -> Iterator[int]:
    try:
        fd = os.open(name, flags, dir_fd=parent)
    except PermissionError as error:
        raise Refused(f"{where(path)} cannot be read: {error.strerror}") from error
    except OSError as error:
        if error.errno in _CHANGED:
            raise _changed(path) from error
        raise
    try:
        yield fd
    finally:
        os.close(fd)


class _Walk(Walk):
    """A walk through a tree that may change: a name that is gone again is Busy.

    Args:
        whole: see `signature()`.
    """

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self._whole = whole

    def children(self, directory: int, path: Path) -> list[tuple[str, os.stat_result]]:
        names = self.names(directory, path)
        if not self._whole:
            found = len(names)
            names = [name for name in names if is_content((*path, name))]
            self.entries -= found - len(names)
        try:
            return [(name, os.stat(name, dir_fd=directory, follow_symlinks=False)) for name in names]
        except FileNotFoundError as error:
            raise _changed(path) from error


class _Signing(_Walk):
    def __init__(self, guard: Guard | None, *, whole: bool) -> None:
        super().__init__(whole=whole)
        self._guard = guard
        self.hash = hashlib.sha256()
        self.size = 0
        self.changed_ns = self.marked_ns = 0

    def root(self, st: os.stat_result) -> None:
        self.hash.update(repr((st.st_dev, st.st_ino, st.st_mode, st.st_uid, st.st_gid)).encode())
        self.size += in_blocks(0)

    def node(self, st: os.stat_result, path: Path) -> None:
        self.hash.update(repr((os.fsencode(path[-1]), *stat_key(st))).encode())
        self.size += in_blocks(st.st_size if stat.S_ISREG(st.st_mode) else 0)
        if path == (MARKER,):
            self.marked_ns = st.st_ctime_ns
        else:
            self.changed_ns = max(self.changed_ns, st.st_ctime_ns)

    def directory(self, fd: int, path: Path) -> None:
        for name, st in self.children(fd, path):
            inner = (*path, name)
            _require_copyable(st, inner)
            if self._guard is not None:
                self._guard(st, fd, name, "/".join(inner))
            self.node(st, inner)
            if stat.S_ISDIR(st.st_mode):
                with _opened(name, DIRECTORY, fd, inner) as child:
                    self.directory(child, inner)
        self.hash.update(b"end")


def _changed(path: Path) -> Busy:
    return Busy(f"{where(path)} changed while it was looked at")


def _require_copyable(st: os.stat_result, path: Path) -> None:
    type_ = stat.S_IFMT(st.st_mode)
    if type_ not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        raise Refused(f"{where(path)} is {_SPECIAL.get(type_, 'of an unknown type')}: remove it")


class _Reading(_Walk):
    """Reads a tree once: all content goes into the digest, and into the directory `target` if there is one."""

    def __init__(
        self,
        target: int | None = None,
        size_max: int | None = None,
        *,
        whole: bool = False,
        read: Read = hash_file,
    ) -> None:
        super().__init__(whole=whole)
        self._read = read
        self._size_max = size_max
        self._target = target
        self._copies: dict[tuple[int, int], Path] = {}
        """Of files with several names: where the first one is, by device and inode."""
        self._hash = hashlib.sha256(_HEADER)
        self._size = 0

    def run(self, root: int) -> str:
        self._directory(root, os.fstat(root), self._target, ())
        return self._hash.hexdigest()

    def _string(self, value: bytes) -> None:
        self._hash.update(_LENGTH.pack(len(value)) + value)

    def _node(self, kind: bytes, st: os.stat_result, xattrs: Xattrs, path: Path) -> None:
        attributes.require_unmarked((name for name, _ in xattrs), where(path))
        self._hash.update(_NODE.pack(kind, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid))
        self._hash.update(_LENGTH.pack(len(xattrs)))
        for name, value in xattrs:
            self._string(os.fsencode(name))
            self._string(value)

    def _directory(self, fd: int, st: os.stat_result, target: int | None, path: Path) -> None:
        xattrs = attributes.read(fd, where(path))
        self._node(b"d", st, xattrs, path)
        children = self.children(fd, path)
        self._hash.update(_LENGTH.pack(len(children)))
        for name, child in children:
            self._string(os.fsencode(name))
            self._child(fd, name, child, target, (*path, name))
        if target is not None:
            attributes.give(target, st, xattrs)

    def _child(self, parent: int, name: str, st: os.stat_result, target: int | None, path: Path) -> None:
        _require_copyable(st, path)
        if stat.S_ISLNK(st.st_mode):
            self._link(parent, st, target, path)
            return
        flags = DIRECTORY if stat.S_ISDIR(st.st_mode) else _FILE
        with _opened(name, flags, parent, path) as fd:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino, found.st_mode) != (st.st_dev, st.st_ino, st.st_mode):
                raise _changed(path)
            if stat.S_ISREG(st.st_mode):
                self._file(fd, found, target, path)
            elif target is None:
                self._directory(fd, found, None, path)
            else:
                os.mkdir(name, 0o700, dir_fd=target)
                with _opened(name, DIRECTORY, target, path) as made:
                    self._directory(fd, found, made, path)

    def _link(self, parent: int, st: os.stat_result, target: int | None, path: Path) -> None:
        name = path[-1]
        # No descriptor gives a link's own attributes; no other link is on this way to them.
        xattrs = attributes.read(f"/proc/self/fd/{parent}/{name}", where(path))
        self._node(b"l", st, xattrs, path)
        to = os.readlink(name, dir_fd=parent)
        self._string(os.fsencode(to))
        if target is None:
            return
        os.symlink(to, name, dir_fd=target)
        attributes.give_to_link(name, target, st, xattrs)

    def _file(self, fd: int, st: os.stat_result, target: int | None, path: Path) -> None:
        xattrs = attributes.read(fd, where(path))
        self._node(b"f", st, xattrs, path)
        self._hash.update(_LENGTH.pack(st.st_size))
        self._size += st.st_size
        if self._size_max is not None and self._size > self._size_max:
            raise Busy(f"{where(path)} grew while it was read")
        try:
            with Lease(fd) as lease:
                if target is None or self._linked(st, target, path):
                    self._read(fd, st.st_size, self._hash)
                    lease.check()
                else:
                    self._copy_file(fd, st, xattrs, lease, target, path)
        except Busy as busy:
            raise Busy(f"{where(path)}: {busy}") from busy

    def _copy_file(
        self, fd: int, st: os.stat_result, xattrs: Xattrs, lease: Lease, target: int, path: Path
    ) -> None:
        made = os.open(path[-1], _NEW, 0o600, dir_fd=target)
        try:
            copy_file(fd, made, st.st_size, self._hash, lease)
            is_release = path[-1].startswith(release.PREFIX) and "/".join(path[:-1]) == RELEASE_DIRECTORY
            attributes.give(made, st, attributes.relaxed(xattrs) if is_release else xattrs)
        finally:
            os.close(made)

    def _linked(self, st: os.stat_result, target: int, path: Path) -> bool:
        """Make `path` a hard link where the copy has this file already."""
        if st.st_nlink < 2:
            return False
        first = self._copies.setdefault((st.st_dev, st.st_ino), path)
        if first == path:
            return False
        try:
            os.link(
                "/".join(first), path[-1], src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False
            )
        except OSError as error:
            if error.errno in (errno.EMLINK, errno.ENAMETOOLONG):
                return False
            raise
        return True
