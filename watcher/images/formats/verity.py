# SPDX-License-Identifier: LGPL-2.1-or-later
"""The superblock of a dm-verity hash tree, as veritysetup and systemd-repart write it: how the tree is to be read.

Strangers wrote it. Every number in it is held against the bytes that are there before anything is read by it; so a tree
costs what the image is long, whatever it claims. The format: cryptsetup, lib/verity/verity.c, and the kernel's
Documentation/admin-guide/device-mapper/verity.rst.
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

from watcher.images.formats.base import Extent
from watcher.model import Incomplete, Refused

# struct verity_sb: version, type, UUID, algorithm, block sizes, number of data blocks, salt. Little endian.
_STRUCT = struct.Struct("<8sII16s32sIIQH6x256s")
SIZE = 512
"""Bytes. The hash tree begins in the next hash block."""
_MAGIC = b"verity\0\0"

ALGORITHMS = {"sha256": 32, "sha384": 48, "sha512": 64}
"""What we verify by, with the bytes of a digest. systemd-repart and veritysetup write sha256 if not told otherwise."""

_BLOCK_MIN = 512
_HASH_BLOCK_MAX = 512 << 10
"""VERITY_MAX_BLOCK_SIZE of cryptsetup."""
_DATA_BLOCK_MAX = mmap.PAGESIZE
"""The kernel has no larger data blocks."""


class Level(NamedTuple):
    """One level of a hash tree, in hash blocks: where it begins, counted from the superblock on, and how long it is."""

    start: int
    blocks: int


class Superblock(NamedTuple):
    """
    Attributes:
        hash_type: 1: the salt comes before the block, and digests have room of a power of two; 0: behind it, and dense.
        algorithm: one of ALGORITHMS.
        data_block, hash_block: bytes of a block.
        data_blocks: how many blocks the tree covers.
        levels: from the one that has the digests of the data up to the one block whose digest is the root hash; none
            where there is one block of data alone.
        end: bytes from the superblock's first to the tree's last.
    """

    hash_type: int
    algorithm: str
    data_block: int
    hash_block: int
    data_blocks: int
    salt: bytes
    levels: tuple[Level, ...]
    end: int

    @property
    def digest_size(self) -> int:
        return ALGORITHMS[self.algorithm]

    @property
    def digests_per_block(self) -> int:
        return _digests_per_block(self.hash_block, self.digest_size)

    @property
    def data_size(self) -> int:
        """Bytes that the tree covers, from the first byte of the data on."""
        return self.data_blocks * self.data_block


def read(tree: Extent, data_size: int) -> Superblock:
    """The superblock at the start of `tree`, which is complete, and within its bounds.

    Args:
        data_size: bytes of the data that it is for.

    Raises:
        Incomplete: the tree is a file of its own, and bytes of it are missing.
        Refused: it is not one, or asks for what is not there, or for what the kernel or we cannot do.
        Busy: it became shorter meanwhile.
        OSError: it cannot be read.
    """
    _require(tree, SIZE)
    magic, version, hash_type, _, algorithm, data_block, hash_block, data_blocks, salt_size, salt = (
        _STRUCT.unpack(tree.read(_STRUCT.size))
    )
    if magic != _MAGIC:
        if tree.offset == 0 and not any(tree.read(SIZE)):
            raise Incomplete("incomplete: its verity data begins with nothing but zeros: not uploaded yet")
        raise Refused("its verity data has no superblock: build it with systemd-repart or veritysetup format")
    if version != 1 or hash_type not in (0, 1):
        raise Refused(f"its verity data is of version {version} and type {hash_type}, which nobody knows")
    name = _name(algorithm)
    if data_block not in _powers_of_two(_DATA_BLOCK_MAX) or hash_block not in _powers_of_two(_HASH_BLOCK_MAX):
        raise Refused(
            f"its verity data claims data blocks of {data_block} bytes and hash blocks of {hash_block}: there are"
            f" powers of two from {_BLOCK_MIN} up to {_DATA_BLOCK_MAX} and {_HASH_BLOCK_MAX}"
        )
    if not 1 <= data_blocks <= data_size // data_block:
        raise Refused(
            f"its verity data claims {data_blocks} blocks of {data_block} bytes, and the file system has"
            f" {data_size} bytes: they are of different images, or one is damaged"
        )
    if salt_size > len(salt):
        raise Refused(f"its verity data claims a salt of {salt_size} bytes, there is room for {len(salt)}")
    levels, end = _levels(data_blocks, hash_block, ALGORITHMS[name])
    _require(tree, end)
    return Superblock(
        hash_type, name, data_block, hash_block, data_blocks, salt[:salt_size], levels, end
    )  # fmt: skip


def _require(tree: Extent, end: int) -> None:
    if tree.size < end:
        missing = f"{tree.size} of {end} bytes of its verity data are here"
        raise Refused(missing) if tree.offset else Incomplete(f"incomplete: {missing}")


def _name(algorithm: bytes) -> str:
    name = algorithm.partition(b"\0")[0].decode("ascii", "replace")
    if name not in ALGORITHMS:
        known = name if name.isalnum() else "unknown"
        raise Refused(
            f"the hash algorithm of its verity data is {known}, not one of {', '.join(ALGORITHMS)}: build it with these"
        )
    return name


def _powers_of_two(end: int) -> set[int]:
    return {1 << power for power in range(_BLOCK_MIN.bit_length() - 1, end.bit_length())}


def _digests_per_block(block: int, digest: int) -> int:
    """A power of two, as the kernel has it."""
    return 1 << (block // digest).bit_length() - 1


def _levels(data_blocks: int, hash_block: int, digest: int) -> tuple[tuple[Level, ...], int]:
    """The levels, lowest first. In the file the highest comes first."""
    sizes = []
    blocks = data_blocks
    while blocks > 1:
        blocks = -(-blocks // _digests_per_block(hash_block, digest))
        sizes.append(blocks)
    levels = []
    at = -(-SIZE // hash_block)
    for size in reversed(sizes):
        levels.append(Level(at, size))
        at += size
    return tuple(reversed(levels)), at * hash_block if levels else SIZE
