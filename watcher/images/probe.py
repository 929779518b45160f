# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image file is, and whether all of it is there, by its superblock alone.

Every field is whatever somebody uploaded. What is checked here is what decides between "not all here yet" and "will
never do", and what the kernel would answer with a bare EINVAL; the rest is left to the kernel, which mounts it or not.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from watcher.model import Incomplete, Refused

# fs/squashfs/squashfs_fs.h: struct squashfs_super_block, little endian.
_SQUASHFS = struct.Struct("<4s4I6H8Q")
_SQUASHFS_MAGIC = b"hsqs"
_SQUASHFS_COMPRESSORS = range(1, 7)  # gzip, lzma, lzo, xz, lz4, zstd
_SQUASHFS_NO_TABLE = 0xFFFFFFFFFFFFFFFF
# The kernel reads it in blocks of so many bytes, and no part of one (SQUASHFS_DEVBLK_SIZE).
_SQUASHFS_BLOCK = 1024

# fs/erofs/erofs_fs.h: struct erofs_super_block at byte 1024, little endian, up to and with `devt_slotoff`.
_EROFS_OFFSET = 1024
_EROFS = struct.Struct("<IIIBBHQQIIII16s16sIHHH")
_EROFS_SIZE = 128
_EROFS_MAGIC = 0xE0F5E1E2
_EROFS_COMPAT_SB_CHKSUM = 0x1
_EROFS_INCOMPAT_DEVICE_TABLE = 0x8
_EROFS_INCOMPAT_48BIT = 0x80
_EROFS_BLOCK_BITS = range(9, 17)
_EROFS_SLOT_BITS = 5  # inode numbers count slots of 32 bytes

# UEFI 5.3.2: the header is in the second logical block, of 512 bytes or on some disks 4096.
_GPT_MAGIC = b"EFI PART"
_GPT_OFFSETS = (512, 4096)

# The first block of an erofs image is at most this large (the checksum covers it), and everything else is in it too.
_HEAD = 1 << 16

# What people drop by mistake, for a better word than "unknown".
_HINTS = (
    (0, b"\x1f\x8b", "gzip data: unpack it first"),
    (0, b"\xfd7zXZ\x00", "xz data: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
    (0, b"BZh", "bzip2 data: unpack it first"),
    (257, b"ustar", "a tar archive: build an image from its contents"),
    (0, b"PK\x03\x04", "a zip archive: build an image from its contents"),
    (1080, b"\x53\xef", "an ext2/3/4 file system: use squashfs or erofs"),
    (0, b"XFSB", "an XFS file system: use squashfs or erofs"),
    (0x8001, b"CD001", "an ISO 9660 image: use squashfs or erofs"),
    (0, b"sqsh", "a big-endian squashfs: build it with mksquashfs 4 or later"),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A file system image, whole by its own account.

    Attributes:
        fstype: "squashfs" or "erofs".
        bytes_used: bytes from the start of the file that belong to it; what follows is padding.
    """

    fstype: str
    bytes_used: int


def probe(fd: int, size: int) -> Probe:
    """Say what the image behind `fd` is; `size` is the length of the file in bytes.

    Raises:
        Incomplete: bytes are missing; says how many there are and how many it takes.
        Refused: empty, of an unknown kind, with a partition table, or contradicting itself.
        OSError: it could not be read.
    """
    if size == 0:
        raise Refused("empty")
    head = os.pread(fd, min(size, _HEAD), 0)
    if head.startswith(_SQUASHFS_MAGIC):
        return _squashfs(head, size)
    if any(head[offset : offset + 8] == _GPT_MAGIC for offset in _GPT_OFFSETS):
        raise Refused("disk images with a partition table are not supported yet: drop the bare file system")
    if head[_EROFS_OFFSET : _EROFS_OFFSET + 4] == _EROFS_MAGIC.to_bytes(4, "little"):
        return _erofs(head, size)
    raise _unknown(head, size)


def _unknown(head: bytes, size: int) -> Refused:
    for offset, magic, hint in _HINTS:
        if head[offset : offset + len(magic)] == magic:
            return Refused(hint)
    if size >= _EROFS_OFFSET and not any(head):
        # Space set aside by `rsync --preallocate` or fallocate(1) before the bytes come.
        return Incomplete(f"nothing but zeros in its first {len(head)} bytes: not uploaded yet")
    return Refused("neither a squashfs nor an erofs image")


def _squashfs(head: bytes, size: int) -> Probe:
    if len(head) < _SQUASHFS.size:
        raise Incomplete(f"incomplete: {size} bytes are here, the superblock alone takes {_SQUASHFS.size}")
    _, _, _, block_size, fragments, compression, block_log, _, _, major, minor, *places = (
        _SQUASHFS.unpack_from(head)
    )
    root_inode, bytes_used, *tables = places
    if (major, minor) != (4, 0):
        raise Refused(f"squashfs {major}.{minor}, the kernel reads 4.0 only")
    if not 12 <= block_log <= 20 or block_size != 1 << block_log:
        raise Refused(f"a broken squashfs image: block size {block_size}")
    if compression not in _SQUASHFS_COMPRESSORS:
        raise Refused(f"a broken squashfs image: unknown compression {compression}")
    _require(bytes_used, _SQUASHFS.size, size)
    _require_padding(bytes_used, size)
    if not fragments:
        tables[4] = _SQUASHFS_NO_TABLE  # the kernel does not look at it then
    _squashfs_tables(root_inode, bytes_used, tables)
    return Probe("squashfs", bytes_used)


def _require_padding(bytes_used: int, size: int) -> None:
    """The last block too is whole. Otherwise the kernel would speak of an input/output error."""
    need = -(-bytes_used // _SQUASHFS_BLOCK) * _SQUASHFS_BLOCK
    if size < need:
        raise Incomplete(
            f"incomplete: {size} of {need} bytes are here (padding is missing: if it was built with -nopad,"
            " build it without)"
        )


def _squashfs_tables(root_inode: int, bytes_used: int, tables: list[int]) -> None:
    """The tables lie within the image and in the order the kernel insists on (fs/squashfs/super.c)."""
    ids, xattrs, inodes, directories, fragments, lookup = tables
    optional = (table for table in (fragments, lookup, ids, xattrs) if table != _SQUASHFS_NO_TABLE)
    used = [inodes, directories, *optional]
    if used != sorted(used) or inodes < _SQUASHFS.size or used[-1] >= bytes_used:
        raise Refused(f"lies about its size: it claims {bytes_used} bytes, its tables are not within them")
    if inodes + (root_inode >> 16) >= directories:
        raise Refused("a broken squashfs image: its root directory is outside the inode table")


def _erofs(head: bytes, size: int) -> Probe:
    if len(head) < _EROFS_OFFSET + _EROFS_SIZE:
        need = _EROFS_OFFSET + _EROFS_SIZE
        raise Incomplete(f"incomplete: {size} bytes are here, the superblock alone takes {need}")
    fields = _EROFS.unpack_from(head, _EROFS_OFFSET)
    checksum, compat, bits, root, blocks, meta = (
        fields[1],
        fields[2],
        fields[3],
        fields[5],
        fields[9],
        fields[10],
    )
    incompat, extra_devices = fields[14], fields[16]
    if bits not in _EROFS_BLOCK_BITS:
        raise Refused(f"a broken erofs image: block size 2^{bits}")
    if incompat & _EROFS_INCOMPAT_DEVICE_TABLE and extra_devices:
        raise Refused(f"an erofs image in {extra_devices + 1} parts (--blobdev): build it as one file")
    if incompat & _EROFS_INCOMPAT_48BIT:
        # The two bytes are the upper part of the block count then, and the root inode is found elsewhere.
        blocks, root, meta = blocks | root << 32, 0, 0
    need = blocks << bits
    _require(need, _EROFS_OFFSET + _EROFS_SIZE, size)
    if (meta << bits) + (root << _EROFS_SLOT_BITS) >= need:
        raise Refused(f"lies about its size: it claims {need} bytes, its root directory is not within them")
    if compat & _EROFS_COMPAT_SB_CHKSUM and _erofs_checksum(head, 1 << bits) != checksum:
        raise Refused("a broken erofs image: the checksum of its superblock is wrong")
    return Probe("erofs", need)


def _require(need: int, least: int, size: int) -> None:
    if need < least:
        raise Refused(f"lies about its size: it claims {need} bytes, its superblock alone takes {least}")
    if size < need:
        raise Incomplete(f"incomplete: {size} of {need} bytes are here")


def _erofs_checksum(head: bytes, block: int) -> int:
    """CRC-32C from the superblock to the end of its block, its own field taken as zero (fs/erofs/super.c)."""
    length = block - _EROFS_OFFSET if block > _EROFS_OFFSET else block
    area = bytearray(head[_EROFS_OFFSET : _EROFS_OFFSET + length])
    area[4:8] = bytes(4)
    crc = 0xFFFFFFFF
    for byte in area:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc  # the kernel's crc32c() does not invert at the end


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()
