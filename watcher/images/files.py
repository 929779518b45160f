# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of one file: copied, and hashed in the same pass."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from watcher.model import Busy
from watcher.watch.lease import Lease

# Bytes. The lease is checked between two chunks: this bounds how long a writer waits, and a thread's buffer.
CHUNK = 1 << 19

_FICLONE = 0x40049409  # linux/fs.h; Python's fcntl has it from 3.14 on

# ioctl_ficlone(2): another file system, one without reflinks, or a file that cannot be shared.
_NO_CLONE = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)

_BLOCK = 4096

_SHORTER = "became shorter while it was read"
_ZEROS = memoryview(bytes(1 << 16))


class Hasher(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes | memoryview, /) -> None: ...


class _Buffer(threading.local):
    """One for each thread: the page faults of fresh memory cost more than reading 1 MiB. O_DIRECT needs whole pages."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, CHUNK))


_buffer = _Buffer()


def copy_file(source: int, target: int, size: int, hasher: Hasher, lease: Lease, sync: bool = False) -> None:
    """Bring the `size` bytes of `source` into the empty file `target` and into `hasher`, holes as holes.

    The lease is given back as soon as everything has been read. With `sync` the data is on the disk on return.

    Raises:
        Busy: the lease was broken, or the file is shorter than `size`.
        OSError: reading or writing failed.
    """
    if _clone(source, target):
        lease.check()
        lease.release()
        hash_file(target, size, hasher)
    else:
        os.ftruncate(target, size)
        for offset, chunk, hole in _chunks(source, size):
            lease.check()
            if not hole:
                _write(target, chunk, offset)
            if offset + len(chunk) == size:
                lease.release()
            if sync and not hole:
                # Have the disk begin with these bytes, without waiting for it. Python does not have sync_file_range(2).
                # This starts writing, too (mm/fadvise.c), and the kernel does not drop from memory what is still being
                # written. The disk works while the bytes are hashed: a quarter faster.
                os.posix_fadvise(target, offset, len(chunk), os.POSIX_FADV_DONTNEED)
            hasher.update(chunk)
        if not size:
            lease.check()
            lease.release()
    if sync:
        os.fdatasync(target)


def stat_key(found: os.stat_result) -> tuple[int, ...]:
    """Stands for a content. A later change gives another key, unless it comes within the same tick of the clock."""
    who = found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_gid
    return *who, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(source: int, size: int) -> str:
    """SHA-256 of the `size` bytes of `source`, 64 hexadecimal digits. Raises as `hash_file`."""
    hasher = hashlib.sha256()
    hash_file(source, size, hasher)
    return hasher.hexdigest()


def leased_digest(source: int, size: int, lease: Lease) -> str:
    """`digest_of()` a file that `lease` protects."""
    digest = digest_of(source, size)
    lease.check()
    return digest


def hash_file(source: int, size: int, hasher: Hasher) -> None:
    """Bring the `size` bytes of `source` into `hasher` alone.

    Raises:
        Busy: the file is shorter than `size`.
        OSError: reading failed.
    """
    for _, chunk, _ in _chunks(source, size):
        hasher.update(chunk)


def hash_from_disk(source: int, size: int, hasher: Hasher, pace: Callable[[], object] = lambda: None) -> None:
    """`hash_file()` of what is on the disk now, which is what the next boot will read.

    What the kernel remembers of a file may be older, and good; and to fill its memory with what nobody uses would slow
    everything down. So we read past it (open(2), O_DIRECT). A file system that cannot do that is asked to forget the
    file before and after (posix_fadvise(2)); it keeps what is mapped, or not on the disk yet.

    Args:
        pace: called after each piece of at most `CHUNK` bytes. It may wait, or end the reading by an exception.

    Raises:
        Busy, OSError: as `hash_file()`.
    """
    if not _direct(source, wanted=True):
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
    for _, chunk, _ in _chunks(source, size):
        hasher.update(chunk)
        pace()
    if not _direct(source, wanted=False):
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)


def _direct(fd: int, *, wanted: bool) -> bool:
    """Switch O_DIRECT on or off. Returns whether it was switched."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if bool(flags & os.O_DIRECT) is wanted:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags ^ os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _read(source: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(source, [view], offset)
    except OSError as error:
        # Pieces that this disk does not take. That says nothing of the file.
        if error.errno != errno.EINVAL or not _direct(source, wanted=False):
            raise
        return os.preadv(source, [view], offset)


def _clone(source: int, target: int) -> bool:
    """Make the empty file `target` share all blocks of `source`; False where the file systems cannot do that."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def _chunks(source: int, size: int) -> Iterator[tuple[int, memoryview, bool]]:
    """Offset and bytes of each piece in turn, and whether it is a hole. The bytes are valid until the next piece."""
    offset = 0
    for end, hole in _extents(source, size):
        while offset < end:
            if hole:
                chunk = _ZEROS[: end - offset]
            else:
                # Whole blocks, for O_DIRECT: what lies behind the end of the extent is left out.
                view = _buffer.view[: -(-(end - offset) // _BLOCK) * _BLOCK]
                chunk = view[: min(_read(source, view, offset), end - offset)]
                if not chunk:
                    raise Busy(_SHORTER)
            yield offset, chunk, hole
            offset += len(chunk)


def _extents(source: int, size: int) -> Iterator[tuple[int, bool]]:
    """Where each extent ends, and whether it is a hole (lseek(2), SEEK_HOLE)."""
    found = os.fstat(source)
    if found.st_size < size:
        raise Busy(_SHORTER)
    if found.st_blocks * 512 >= size:
        yield size, False
        return
    offset = 0
    while offset < size:
        try:
            data = min(os.lseek(source, offset, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: a hole up to the end
                raise
            data = size
        if data > offset:
            yield data, True
        if data < size:
            offset = min(os.lseek(source, data, os.SEEK_HOLE), size)
            yield offset, False
        else:
            offset = size


def _write(target: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        written = os.pwrite(target, chunk, offset)
        chunk, offset = chunk[written:], offset + written
