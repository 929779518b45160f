# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disk images for tests, made by hand: with a partition table (GPT) that is right, or wrong in one place.

`systemd-repart` makes those that people have; these are the odd ones, and need no tool.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass, field, replace

from watcher.images.formats import partition_types

NO_AUTO = 1 << 63
READ_ONLY = 1 << 60
ROOT = partition_types.root("x86-64")
VERITY = partition_types.root("x86-64", "verity")
SIGNATURE = partition_types.root("x86-64", "verity-sig")
USR = next(id for id, known in partition_types.KNOWN.items() if known == ("usr", "", "x86-64"))
GENERIC = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
SIGNED = b'{"rootHash": "00112233445566778899aabbccddeeff", "signature": "MAA="}'
"""What a signature partition has in it, padded with NUL: `rootHash` and `signature`, of nothing."""
SIGNED_HASH = bytes.fromhex("00112233445566778899aabbccddeeff")
_DISK, _PARTITION = uuid.UUID(int=0x1234), uuid.UUID(int=0x5678)


@dataclass(frozen=True)
class Part:
    """A partition.

    Attributes:
        start, end: first and last sector; -1: where the one before ends, aligned to 4096 bytes, and as long as needed.
    """

    content: bytes = b""
    type: uuid.UUID = ROOT
    label: str = "root"
    flags: int = 0
    start: int = -1
    end: int = -1
    id: uuid.UUID = _PARTITION


@dataclass(frozen=True)
class Disk:
    """What is written, right or wrong: -1 stands for what is right.

    Attributes:
        dense: the first partition begins right behind the entries, not at byte 40960.
        header, backup: these bytes of a header are replaced, by their offset in it, before it gets its checksum.
    """

    parts: tuple[Part, ...] = ()
    sector: int = 512
    entries: int = 128
    protective: bool = True
    dense: bool = False
    header: dict[int, bytes] = field(default_factory=dict)
    backup: dict[int, bytes] = field(default_factory=dict)


def disk(*contents: bytes | Part, sector: int = 512) -> bytes:
    """A disk image with these partitions, each of type root unless it says otherwise."""
    return build(Disk(tuple(Part(one) if isinstance(one, bytes) else one for one in contents), sector))


def build(what: Disk) -> bytes:
    """The bytes of a disk image."""
    sector = what.sector
    array_sectors = -(-what.entries * 128 // sector)
    first = 2 + array_sectors if what.dense else max(2 + array_sectors, 40960 // sector)
    parts = list(_placed(what.parts, first, sector))
    last = max([first, *(part.end for part in parts if part.end < _FAR)])
    array = bytearray(what.entries * 128)
    for number, part in enumerate(parts):
        _ENTRY.pack_into(
            array,
            number * 128,
            part.type.bytes_le,
            part.id.bytes_le,
            part.start,
            part.end,
            part.flags,
            part.label.encode("utf-16-le", "surrogatepass")[:72],
        )
    alternate = last + array_sectors + 1
    content = bytearray((alternate + 1) * sector)
    if what.protective:
        content[446:462] = struct.pack("<B3xB3xII", 0, 0xEE, 1, min(alternate, 0xFFFFFFFF))
        content[510:512] = b"\x55\xaa"
    for part in parts:
        if part.content:
            content[part.start * sector : part.start * sector + len(part.content)] = part.content
    content[2 * sector : 2 * sector + len(array)] = array
    backup_array = last + 1
    content[backup_array * sector : backup_array * sector + len(array)] = array
    for own, other, where, changes in (
        (1, alternate, 2, what.header),
        (alternate, 1, backup_array, what.backup),
    ):
        made = _header(own, other, first, last, where, what.entries, zlib.crc32(array), changes)
        content[own * sector : own * sector + len(made)] = made
    return bytes(content)


_FAR = 1 << 16
"""Sector: a partition that ends behind it lies, and the disk is not made so large."""
# UEFI 5.3.2 and 5.3.3.
_HEADER = struct.Struct("<8s4sIII QQQQ 16s QIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")


def _header(
    own: int, other: int, first: int, last: int, where: int, count: int, crc: int, changes: dict[int, bytes]
) -> bytes:
    made = bytearray(
        _HEADER.pack(
            b"EFI PART",
            b"\0\0\1\0",
            92,
            0,
            0,
            own,
            other,
            first,
            last,
            _DISK.bytes_le,
            where,
            count,
            128,
            crc,
        )
    )
    for offset, value in changes.items():
        made[offset : offset + len(value)] = value
    if 16 not in changes:
        made[16:20] = struct.pack("<I", zlib.crc32(made))
    return bytes(made)


def _placed(parts: tuple[Part, ...], first: int, sector: int) -> list[Part]:
    placed = []
    after = first
    for part in parts:
        start = after if part.start < 0 else part.start
        end = start + max(1, -(-len(part.content) // sector)) - 1 if part.end < 0 else part.end
        placed.append(replace(part, start=start, end=end))
        after = max(after, -(-(end + 1) * sector // 4096) * 4096 // sector) if end < _FAR else after
    return placed
