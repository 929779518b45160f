# SPDX-License-Identifier: LGPL-2.1-or-later
"""A GUID partition table, as UEFI 5.3 describes it: where the partitions of a disk image are, and where the image ends.

Strangers wrote it. The kernel, libblkid and the tools forgive much: they use the backup where the table is broken, and
leave out a partition that lies. Here such a table is refused: a disk image is made once by a tool that gets it right,
and what is wrong in it was damaged, or is meant to look different to different readers. At most 70 KiB are read.
"""

from __future__ import annotations

import itertools
import struct
import uuid
import zlib
from typing import NamedTuple

from watcher.images.formats.base import read_all
from watcher.model import Incomplete, Refused

_MAGIC = b"EFI PART"
_SECTORS = (512, 1024, 2048, 4096)
"""The header is in the second sector. Those are the sizes that systemd looks for (probe_sector_size())."""

# UEFI 5.3.2: the header without its magic and revision; 5.3.3: one entry. Little endian.
_HEADER = struct.Struct("<12xII4xQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_CHECKSUM = slice(16, 20)
_ENTRIES_MAX = 256
"""The kernel has no more partitions of a disk (DISK_MAX_PARTS); tools make room for 128."""
_END_MAX = 1 << 63

# The protective MBR: four entries of 16 bytes from byte 446 on, of which one has the type 0xEE.
_MBR_TYPES = slice(450, 510, 16)
_MBR_MAGIC = slice(510, 512)
_PROTECTIVE = 0xEE

NO_AUTO = 1 << 63
"""A flag of a partition that is not to be looked at (Discoverable Partitions Specification)."""


class Partition(NamedTuple):
    """
    Attributes:
        number: from 1 on, as its device is called.
        start, size: bytes.
        label: "" without one.
    """

    number: int
    type: uuid.UUID
    id: uuid.UUID
    start: int
    size: int
    flags: int
    label: str

    @property
    def end(self) -> int:
        return self.start + self.size


class Table(NamedTuple):
    """
    Attributes:
        sector: bytes.
        end: bytes from the start of the file to the end of the backup header; what follows is not the image's.
        partitions: by number; they do not overlap, and end before `end`.
    """

    sector: int
    end: int
    partitions: tuple[Partition, ...]


class _Header(NamedTuple):
    size: int
    checksum: int
    own: int
    other: int
    first: int
    last: int
    disk: bytes
    array: int
    entries: int
    entry_size: int
    array_checksum: int

    @property
    def shared(self) -> tuple[object, ...]:
        """What header and backup have in common."""
        return self.first, self.last, self.disk, self.entries, self.array_checksum

    @property
    def array_size(self) -> int:
        return self.entries * _ENTRY.size


def recognises(head: bytes) -> bool:
    """Whether a file with these first bytes is a disk image, or the beginning of one."""
    if any(head[sector : sector + len(_MAGIC)] == _MAGIC for sector in _SECTORS):
        return True
    return len(head) < _SECTORS[-1] + _HEADER.size and _is_protective(head) and not any(head[512:])


def read(fd: int, head: bytes, size: int) -> Table:
    """The partition table of the file `fd`, for whose first bytes `recognises()` is true.

    Args:
        head: the first bytes of the file, 64 KiB or all that there are.
        size: of the file, bytes.

    Raises:
        Incomplete: bytes are missing; says how many there are and how many it takes.
        Refused: a table that is broken, contradicts itself, or that readers would take for different things.
        OSError: it could not be read.
    """
    sector = _sector(head, size)
    primary = _header(head[sector : 2 * sector], 1, "its partition table")
    end = (primary.other + 1) * sector
    if end > _END_MAX:
        raise Refused(f"lies about its size: its partition table claims {end} bytes")
    _require_places(primary, sector)
    if size < end:
        raise Incomplete(f"incomplete: {size} of {end} bytes are here")
    backup = _backup(fd, primary, sector)
    array = read_all(fd, primary.array_size, primary.array * sector)
    for copy, what in ((array, "its partition table"), (_array(fd, backup, sector), "its backup")):
        if zlib.crc32(copy) != primary.array_checksum:
            raise Refused(f"a broken disk image: the checksum of the partitions in {what} is wrong")
    if not _is_protective(head):
        raise Refused(
            "a broken disk image: it has no protective MBR, without which nobody looks at its partitions"
        )
    return Table(sector, end, _partitions(array, primary, sector))


def _is_protective(head: bytes) -> bool:
    return head[_MBR_MAGIC] == b"\x55\xaa" and _PROTECTIVE in head[_MBR_TYPES]


def _sector(head: bytes, size: int) -> int:
    found = [sector for sector in _SECTORS if head[sector : sector + len(_MAGIC)] == _MAGIC]
    if len(found) > 1:
        raise Refused("ambiguous: it has partition tables for sectors of several sizes")
    need = (found[0] if found else _SECTORS[-1]) + _HEADER.size
    if size < need or not found:
        raise Incomplete(f"incomplete: {size} bytes are here, its partition table alone takes {need}")
    return found[0]


def _header(block: bytes, own: int, what: str) -> _Header:
    """The header in a block of one sector, which is well-formed, and lies in the sector `own`."""
    found = _Header._make(_HEADER.unpack_from(block))
    if not block.startswith(_MAGIC) or not _HEADER.size <= found.size <= len(block):
        raise Refused(f"a broken disk image: the header of {what} is not one")
    covered = bytearray(block[: found.size])
    covered[_CHECKSUM] = bytes(4)
    if zlib.crc32(covered) != found.checksum:
        raise Refused(f"a broken disk image: the checksum of the header of {what} is wrong")
    if found.own != own:
        raise Refused(f"a broken disk image: {what} says it is in sector {found.own}, and is in {own}")
    if found.entry_size != _ENTRY.size or not 1 <= found.entries <= _ENTRIES_MAX:
        raise Refused(
            f"a disk image with a partition table of {found.entries} entries of {found.entry_size} bytes:"
            f" up to {_ENTRIES_MAX} of {_ENTRY.size} are supported"
        )
    return found


def _require_places(primary: _Header, sector: int) -> None:
    """Header, entries, usable sectors and backup come in this order and do not overlap."""
    array_end = primary.array + -(-primary.array_size // sector)
    if not 1 < primary.array < array_end <= primary.first <= primary.last < primary.other:
        raise Refused("a broken disk image: the parts of its partition table overlap or are in disorder")


def _backup(fd: int, primary: _Header, sector: int) -> _Header:
    """The header at the end, which is the same as the one at the beginning."""
    block = read_all(fd, sector, primary.other * sector)
    if not any(block):
        # Space set aside by `rsync --preallocate` or fallocate(1) before the bytes come.
        raise Incomplete("incomplete: nothing but zeros where the backup of its partition table belongs")
    backup = _header(block, primary.other, "the backup of its partition table")
    if backup.other != 1 or backup.shared != primary.shared:
        raise Refused("a broken disk image: its partition table and the backup of that differ")
    array_end = backup.array + -(-backup.array_size // sector)
    if not backup.last < backup.array < array_end <= backup.own:
        raise Refused("a broken disk image: the backup of its partition table overlaps others")
    return backup


def _array(fd: int, header: _Header, sector: int) -> bytes:
    return read_all(fd, header.array_size, header.array * sector)


def _partitions(array: bytes, header: _Header, sector: int) -> tuple[Partition, ...]:
    found = []
    for number, (type_, id_, first, last, flags, label) in enumerate(_ENTRY.iter_unpack(array), 1):
        if not any(type_):
            continue
        if not header.first <= first <= last <= header.last:
            raise Refused(
                f"a broken disk image: partition {number} is said to be in sectors {first} to {last},"
                f" {header.first} to {header.last} can be used"
            )
        found.append(
            Partition(
                number,
                uuid.UUID(bytes_le=type_),
                uuid.UUID(bytes_le=id_),
                first * sector,
                (last - first + 1) * sector,
                flags,
                label.decode("utf-16-le", "replace").partition("\0")[0],
            )
        )
    in_order = sorted(found, key=lambda partition: partition.start)
    for before, after in itertools.pairwise(in_order):
        if after.start < before.end:
            raise Refused(f"a broken disk image: partitions {before.number} and {after.number} overlap")
    return tuple(found)
