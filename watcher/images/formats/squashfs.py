# SPDX-License-Identifier: LGPL-2.1-or-later
"""squashfs 4.0, as its superblock describes it (fs/squashfs/squashfs_fs.h, fs/squashfs/super.c)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from watcher.images.formats.base import Format, require_claimed, require_superblock
from watcher.model import Incomplete, Refused

# struct squashfs_super_block, little endian: what of it decides.
_STRUCT = struct.Struct("<12x2I2H4x2H8Q")
_MAGIC = b"hsqs"
_COMPRESSORS = range(1, 7)  # gzip, lzma, lzo, xz, lz4, zstd
_NO_TABLE = 0xFFFFFFFFFFFFFFFF
# The kernel reads whole blocks of so many bytes (SQUASHFS_DEVBLK_SIZE).
_DEVICE_BLOCK = 1024


class _Superblock(NamedTuple):
    block_size: int
    fragments: int
    compression: int
    block_log: int
    major: int
    minor: int
    root_inode: int
    bytes_used: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int
    lookup_table: int


class Squashfs(Format):
    name = "squashfs"

    def recognises(self, head: bytes) -> bool:
        return head.startswith(_MAGIC)

    def complete(self, head: bytes, size: int) -> int:
        require_superblock(size, _STRUCT.size)
        found = _superblock(head)
        if (found.major, found.minor) != (4, 0):
            raise Refused(f"squashfs {found.major}.{found.minor}, the kernel reads 4.0 only")
        if not 12 <= found.block_log <= 20 or found.block_size != 1 << found.block_log:
            raise Refused(f"a broken squashfs image: block size {found.block_size}")
        if found.compression not in _COMPRESSORS:
            raise Refused(f"a broken squashfs image: unknown compression {found.compression}")
        require_claimed(size, found.bytes_used, _STRUCT.size)
        # The last block is whole, too. Else the kernel reports an input/output error.
        need = -(-found.bytes_used // _DEVICE_BLOCK) * _DEVICE_BLOCK
        if size < need:
            raise Incomplete(
                f"incomplete: {size} of {need} bytes are here (padding is missing: if it was built with -nopad,"
                " build it without)"
            )
        return found.bytes_used

    def verify(self, head: bytes) -> None:
        """The tables lie within the image and in the order that the kernel insists on."""
        found = _superblock(head)
        # Without fragments the kernel does not look at their table.
        fragments = found.fragment_table if found.fragments else _NO_TABLE
        optional = (fragments, found.lookup_table, found.id_table, found.xattr_table)
        used = [found.inode_table, found.directory_table, *(t for t in optional if t != _NO_TABLE)]
        if used != sorted(used) or used[0] < _STRUCT.size or used[-1] >= found.bytes_used:
            raise Refused(
                f"lies about its size: it claims {found.bytes_used} bytes, its tables are not within them"
            )
        if found.inode_table + (found.root_inode >> 16) >= found.directory_table:
            raise Refused("a broken squashfs image: its root directory is outside the inode table")

    def unpack_command(self, image: str, target: str, path: str) -> list[str]:
        return ["unsquashfs", "-no-progress", "-quiet", "-dest", target, image, path]


SQUASHFS = Squashfs()


def _superblock(head: bytes) -> _Superblock:
    return _Superblock._make(_STRUCT.unpack_from(head))
