# SPDX-License-Identifier: LGPL-2.1-or-later
"""ext4, as its superblock describes it (fs/ext4/ext4.h, fs/ext4/super.c).

It is a file system for writing, and its superblock tells the kernel what to do: replay a journal, mount with these
options, panic on an error. An image that needs or asks for any of that is refused. systemd would mount it as it is, and
so would have the kernel do it.
"""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import NamedTuple

from watcher.images.formats.base import Format, require_claimed, require_superblock
from watcher.images.formats.crc32c import crc32c
from watcher.model import Refused

# struct ext4_super_block, little endian: what of it decides. It has 1024 bytes, from byte 1024 on.
_STRUCT = struct.Struct("<4xI16xI28xHHH30xIII128xI100xI680xI")
_OFFSET = 1024
_END = _OFFSET + 1024
_CHECKSUM = _OFFSET + 1020
_MOUNT_OPTIONS = slice(_OFFSET + 512, _OFFSET + 576)
_MAGIC = 0xEF53
_MAGIC_AT = slice(_OFFSET + 56, _OFFSET + 58)
_BLOCK_LOG_AT = slice(_OFFSET + 24, _OFFSET + 28)
_BLOCK_LOG_MAX = 6  # 64 KiB

_STATE_VALID = 0x1
_STATE_ERROR = 0x2
_ERRORS_PANIC = 3
_INCOMPAT_RECOVER = 0x4
_INCOMPAT_JOURNAL_DEVICE = 0x8
_INCOMPAT_64BIT = 0x80
_INCOMPAT_KNOWN = 0x2 | 0x10 | 0x40 | _INCOMPAT_64BIT | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000
"""filetype, meta_bg, extents, 64bit, flex_bg, ea_inode, csum_seed, largedir, inline_data. Not encryption, not names
that are compared without case (overlayfs refuses them), and not what is for disks that several hosts share."""
_RO_COMPAT_METADATA_CSUM = 0x400
_RO_COMPAT_ORPHANS = 0x10000
# What ext3 knows; libblkid, and so systemd, calls a file system without any other feature ext2 or ext3.
_EXT3_INCOMPAT = 0x2 | _INCOMPAT_RECOVER | 0x10
_EXT3_RO_COMPAT = 0x7


class _Superblock(NamedTuple):
    blocks_low: int
    block_log: int
    magic: int
    state: int
    errors: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    last_orphan: int
    blocks_high: int
    checksum: int

    @property
    def claimed(self) -> int:
        high = self.blocks_high if self.feature_incompat & _INCOMPAT_64BIT else 0
        return (high << 32 | self.blocks_low) << (10 + self.block_log)


class Ext4(Format):
    name = "ext4"
    # Without `noload` the kernel would write to the device, read-only mounts and devices notwithstanding. `errors`
    # has precedence over what the superblock asks for.
    options = MappingProxyType({"noload": None, "errors": "remount-ro"})

    def recognises(self, head: bytes) -> bool:
        """Also of ext2 and ext3, which are then refused."""
        block_log = int.from_bytes(head[_BLOCK_LOG_AT], "little")
        return head[_MAGIC_AT] == _MAGIC.to_bytes(2, "little") and block_log <= _BLOCK_LOG_MAX

    def complete(self, head: bytes, size: int) -> int:
        require_superblock(size, _END)
        found = _superblock(head)
        if found.feature_incompat & _INCOMPAT_JOURNAL_DEVICE:
            raise Refused("the journal of an ext4 file system, and not the file system itself")
        if not (found.feature_incompat & ~_EXT3_INCOMPAT or found.feature_ro_compat & ~_EXT3_RO_COMPAT):
            raise Refused("an ext2 or ext3 file system: use squashfs, erofs or ext4")
        require_claimed(size, found.claimed, _END)
        return found.claimed

    def verify(self, head: bytes) -> None:
        found = _superblock(head)
        if found.feature_ro_compat & _RO_COMPAT_METADATA_CSUM and checksum(head) != found.checksum:
            raise Refused("a broken ext4 image: the checksum of its superblock is wrong")
        if found.feature_incompat & _INCOMPAT_RECOVER:
            raise Refused(
                "an ext4 whose journal was not replayed, which would write to it: it is still mounted, or was not"
                " unmounted; unmount it before it is copied, or run e2fsck -f"
            )
        if (
            not found.state & _STATE_VALID
            or found.state & _STATE_ERROR
            or found.last_orphan
            or found.feature_ro_compat & _RO_COMPAT_ORPHANS
        ):
            raise Refused(
                "an ext4 that is not clean: it is still mounted, or was not unmounted; run e2fsck -f on it"
            )
        if unknown := found.feature_incompat & ~_INCOMPAT_KNOWN:
            raise Refused(f"an ext4 with features that are not for an image (incompat {unknown:#x})")
        if found.errors == _ERRORS_PANIC:
            raise Refused(
                "an ext4 that asks the kernel to panic when it finds an error: tune2fs -e remount-ro mends that"
            )
        if head[_MOUNT_OPTIONS].strip(b"\0"):
            raise Refused(
                'an ext4 with mount options in its superblock: tune2fs -E mount_opts="" removes them'
            )


EXT4 = Ext4()


def _superblock(head: bytes) -> _Superblock:
    return _Superblock._make(_STRUCT.unpack_from(head, _OFFSET))


def checksum(head: bytes) -> int:
    """Of all of the superblock but this field (ext4_superblock_csum())."""
    return crc32c(head[_OFFSET:_CHECKSUM])
