# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verifies the data of an image by its whole hash tree (dm-verity), as `veritysetup verify` does.

There is no well-kept library for it in Python, and hashlib is as fast. dm-verity itself would verify each block as it
is read, and needs a device mapper. Here all of it is read once, and what has been read is not to change afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from watcher.images.formats import verity
from watcher.images.formats.base import Extent
from watcher.images.formats.verity import Superblock
from watcher.model import Refused

_CHUNK = 1 << 20
"""Bytes that are read at once; blocks are parts of it."""

_Digest = Callable[[memoryview], bytes]


def verify(data: Extent, tree: Extent, root_hash: bytes) -> Superblock:
    """Read all data and the whole tree. Returns how the tree was read; what lies behind `data_size` is not covered.

    Raises:
        Refused, Incomplete: as `formats.verity.read()`; or root hash, tree and data are not of each other.
        Busy, OSError: likewise.
    """
    found = verity.read(tree, data.size)
    if len(root_hash) != found.digest_size:
        raise Refused(
            f"its root hash has {len(root_hash)} bytes, and its hash tree is of {found.algorithm}: they are not of"
            " each other"
        )
    digest = _digest(found)
    whole = Extent(data.fd, data.offset, found.data_size)
    if not found.levels:
        if digest(memoryview(whole.read(found.data_size))) != root_hash:
            raise _damaged(0)
        return found
    top = found.levels[-1]
    if digest(memoryview(tree.read(found.hash_block, top.start * found.hash_block))) != root_hash:
        raise Refused(
            "its root hash is not that of its hash tree: they are of different images, or one is damaged"
        )
    for upper, lower in zip(reversed(found.levels), reversed(found.levels[:-1]), strict=False):
        below = Extent(tree.fd, tree.offset + lower.start * found.hash_block, lower.blocks * found.hash_block)
        if _first_wrong(found, tree, upper.start, below, found.hash_block, digest) is not None:
            raise Refused("its hash tree is damaged: copy it again from where it was built")
    wrong = _first_wrong(found, tree, found.levels[0].start, whole, found.data_block, digest)
    if wrong is not None:
        raise _damaged(wrong)
    return found


def _damaged(offset: int) -> Refused:
    return Refused(
        f"its file system is damaged at byte {offset} or soon after, by its hash tree: copy it again from where it"
        " was built"
    )


def _first_wrong(
    found: Superblock, tree: Extent, start: int, below: Extent, block: int, digest: _Digest
) -> int | None:
    """Where below the level that begins with the hash block `start` a group of blocks has other digests."""
    digests = (digest(one) for chunk in _chunks(below) for one in _blocks(chunk, block))
    hash_blocks = (
        one
        for chunk in _chunks(
            Extent(tree.fd, tree.offset + start * found.hash_block, _length(found, below, block))
        )
        for one in _blocks(chunk, found.hash_block)
    )
    left = below.size // block
    for number, there in enumerate(hash_blocks):
        count = min(left, found.digests_per_block)
        if _packed(found, [next(digests) for _ in range(count)]) != there:
            return number * found.digests_per_block * block
        left -= count
    return None


def _length(found: Superblock, below: Extent, block: int) -> int:
    """Bytes of the level that has the digests of `below`."""
    return -(-(below.size // block) // found.digests_per_block) * found.hash_block


def _chunks(extent: Extent) -> Iterator[memoryview]:
    for at in range(0, extent.size, _CHUNK):
        yield memoryview(extent.read(min(_CHUNK, extent.size - at), at))


def _blocks(chunk: memoryview, size: int) -> Iterator[memoryview]:
    for at in range(0, len(chunk), size):
        yield chunk[at : at + size]


def _packed(found: Superblock, digests: list[bytes]) -> bytes:
    """The hash block that these digests make; the room that is left has to be zero."""
    if found.hash_type:
        room = 1 << (found.digest_size - 1).bit_length()
        digests = [one.ljust(room, b"\0") for one in digests]
    return b"".join(digests).ljust(found.hash_block, b"\0")


def _digest(found: Superblock) -> _Digest:
    """The digest of a block: with the salt before it (type 1), or behind it (type 0)."""
    if not found.hash_type:
        algorithm, salt = found.algorithm, found.salt
        return lambda block: hashlib.new(algorithm, b"".join((block, salt))).digest()
    salted = hashlib.new(found.algorithm, found.salt)

    def digest(block: memoryview) -> bytes:
        hasher = salted.copy()
        hasher.update(block)
        return hasher.digest()

    return digest
