# SPDX-License-Identifier: LGPL-2.1-or-later
"""btrfs, as its superblock describes it (include/uapi/linux/btrfs_tree.h, fs/btrfs/disk-io.c).

It is a file system of several devices, which the kernel puts together by their UUIDs, whatever host, namespace or
file they are in. One with a single device stays by itself: since Linux 6.7 a second one of the same UUID, mounted or
not, gets another UUID for as long as it is mounted (find_fsid_by_device()). So two versions that were built with the
same UUID are not mixed up, and an image cannot become a part of one of the host's. An image of several devices, and
one that others build on (a seed device), do not have that, and are refused.
"""

from __future__ import annotations

import hashlib
import struct
from types import MappingProxyType
from typing import NamedTuple

from watcher.images.formats.base import Format, require_claimed, require_superblock
from watcher.images.formats.crc32c import crc32c
from watcher.model import Refused

# struct btrfs_super_block, little endian: what of it decides. It has 4096 bytes, from 64 KiB on.
_STRUCT = struct.Struct("<48xQQ8s24xQ8xQ16xQ52xH11xQ")
_OFFSET = 1 << 16
_END = _OFFSET + 4096
_CHECKED = slice(_OFFSET + 32, _END)
_CHECKSUM = slice(_OFFSET, _OFFSET + 32)
_MAGIC = b"_BHRfS_M"
_MAGIC_AT = slice(_OFFSET + 64, _OFFSET + 72)
_CHECKSUMS = range(4)  # crc32c, xxhash, sha256, blake2
_FLAG_WRITTEN = 0x1
_FLAG_SEEDING = 0x100000000


class _Superblock(NamedTuple):
    own_offset: int
    flags: int
    magic: bytes
    log_root: int
    claimed: int
    devices: int
    checksum_type: int
    device_size: int


class Btrfs(Format):
    name = "btrfs"
    # As systemd mounts it: never write, whatever there may be to replay.
    options = MappingProxyType({"rescue": "nologreplay"})

    def recognises(self, head: bytes) -> bool:
        return head[_MAGIC_AT] == _MAGIC

    def complete(self, head: bytes, size: int) -> int:
        require_superblock(size, _END)
        found = _superblock(head)
        require_claimed(size, found.claimed, _END)
        require_claimed(size, found.device_size, _END)
        return max(found.claimed, found.device_size)

    def verify(self, head: bytes) -> None:
        found = _superblock(head)
        if found.checksum_type not in _CHECKSUMS:
            raise Refused(f"a broken btrfs image: unknown checksum {found.checksum_type}")
        if not _is_sealed(head, found.checksum_type):
            raise Refused("a broken btrfs image: the checksum of its superblock is wrong")
        if found.own_offset != _OFFSET:
            raise Refused("a broken btrfs image: its superblock belongs elsewhere")
        if found.devices != 1:
            raise Refused(f"a btrfs of {found.devices} devices, of which an image is one: build it of one")
        if found.flags & _FLAG_SEEDING:
            raise Refused("a btrfs that is a seed device, on which others build: btrfstune -S 0 mends that")
        if found.flags != _FLAG_WRITTEN:
            raise Refused(f"a btrfs with flags that are not for an image ({found.flags:#x})")
        if found.log_root:
            raise Refused(
                "a btrfs whose log was not replayed, which would write to it: it is still mounted, or was not"
                " unmounted; unmount it before it is copied"
            )


BTRFS = Btrfs()


def _superblock(head: bytes) -> _Superblock:
    return _Superblock._make(_STRUCT.unpack_from(head, _OFFSET))


def _is_sealed(head: bytes, type: int) -> bool:
    checked = head[_CHECKED]
    match type:
        case 0:
            made = (crc32c(checked) ^ 0xFFFFFFFF).to_bytes(4, "little")
        case 2:
            made = hashlib.sha256(checked).digest()
        case 3:
            made = hashlib.blake2b(checked, digest_size=32).digest()
        case _:
            return True  # xxhash is not in Python: the kernel checks it when it mounts it
    return head[_CHECKSUM].startswith(made)
