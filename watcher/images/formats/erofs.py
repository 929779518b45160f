# SPDX-License-Identifier: LGPL-2.1-or-later
"""erofs, as its superblock describes it (fs/erofs/erofs_fs.h, fs/erofs/super.c)."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple

from watcher.images.formats.base import Format, require_claimed, require_superblock
from watcher.images.formats.crc32c import crc32c
from watcher.model import Refused

# struct erofs_super_block, little endian: what of it decides. It has 128 bytes, from byte 1024 on.
_STRUCT = struct.Struct("<4xIIBxH20xII36xI2xH")
_OFFSET = 1024
_END = _OFFSET + 128
_MAGIC = 0xE0F5E1E2.to_bytes(4, "little")
_COMPAT_SB_CHKSUM = 0x1
_INCOMPAT_DEVICE_TABLE = 0x8
_INCOMPAT_48BIT = 0x80
_BLOCK_BITS = range(9, 17)
_SLOT_BITS = 5  # inode numbers count slots of 32 bytes


class _Superblock(NamedTuple):
    checksum: int
    feature_compat: int
    block_bits: int
    root: int
    blocks: int
    meta_block: int
    feature_incompat: int
    extra_devices: int

    @property
    def claimed(self) -> int:
        return self.blocks << self.block_bits


class Erofs(Format):
    name = "erofs"

    def recognises(self, head: bytes) -> bool:
        return head[_OFFSET : _OFFSET + 4] == _MAGIC

    def complete(self, head: bytes, size: int) -> int:
        require_superblock(size, _END)
        found = _superblock(head)
        if found.block_bits not in _BLOCK_BITS:
            raise Refused(f"a broken erofs image: block size 2^{found.block_bits}")
        if found.feature_incompat & _INCOMPAT_DEVICE_TABLE and found.extra_devices:
            raise Refused(
                f"an erofs image in {found.extra_devices + 1} parts (--blobdev): build it as one file"
            )
        require_claimed(size, found.claimed, _END)
        return found.claimed

    def verify(self, head: bytes) -> None:
        found = _superblock(head)
        if (found.meta_block << found.block_bits) + (found.root << _SLOT_BITS) >= found.claimed:
            raise Refused(
                f"lies about its size: it claims {found.claimed} bytes, its root directory is not within them"
            )
        if found.feature_compat & _COMPAT_SB_CHKSUM and checksum(head) != found.checksum:
            raise Refused("a broken erofs image: the checksum of its superblock is wrong")

    def unpack_command(self, image: str, target: str, path: str) -> list[str]:
        return ["fsck.erofs", f"--extract={target}", image]

    def fsmount(self, backing: int, label: str, offset: int = 0, size: int = 0) -> int:
        # Since Linux 6.12 straight from the file, but not on every file system (ENOTBLK). In a partition since 6.17,
        # where that begins at a multiple of its block size. What is wrong with the image itself shows again, and is
        # told, when it is tried through a loop device.
        options = {"fsoffset": str(offset)} if offset else {}
        with contextlib.suppress(OSError):
            return self._fsmount(f"/proc/self/fd/{backing}", **options)
        return super().fsmount(backing, label, offset, size)


EROFS = Erofs()


def _superblock(head: bytes) -> _Superblock:
    found = _Superblock._make(_STRUCT.unpack_from(head, _OFFSET))
    if found.feature_incompat & _INCOMPAT_48BIT:
        # The two bytes are the upper part of the block count then, and the root inode is found elsewhere.
        return found._replace(blocks=found.blocks | found.root << 32, root=0, meta_block=0)
    return found


def checksum(head: bytes) -> int:
    """CRC-32C from the superblock to the end of its block, its own field taken as zero (fs/erofs/super.c)."""
    block = 1 << head[_OFFSET + 12]
    length = block - _OFFSET if block > _OFFSET else block
    area = bytearray(head[_OFFSET : _OFFSET + length])
    area[4:8] = bytes(4)
    return crc32c(bytes(area))
