# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verity superblocks and hash trees, as veritysetup takes them: of images/formats/verity.py and images/hash_tree.py."""

from __future__ import annotations

import random
import struct
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.needs import tool
from support.signed import Tree, make_tree, veritysetup
from watcher.images import hash_tree
from watcher.images.formats import verity
from watcher.images.formats.base import Extent
from watcher.model import Incomplete, Refused

HUGE = (1 << 64) - 1


def verify(data: bytes, tree: bytes, root_hash: bytes, before: bytes = b"") -> verity.Superblock:
    """`before`: what comes before the tree in its file."""
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        for file, content in ((one, data), (other, before + tree)):
            file.write(content)
            file.flush()
        return hash_tree.verify(
            Extent(one.fileno(), 0, len(data)), Extent(other.fileno(), len(before), len(tree)), root_hash
        )


def superblock(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "magic": b"verity\0\0", "version": 1, "type": 1, "uuid": bytes(16), "algorithm": b"sha256",
        "data_block": 4096, "hash_block": 4096, "data_blocks": 2, "salt_size": 32, "salt": bytes(32),
    }  # fmt: skip
    return struct.pack("<8sII16s32sIIQH6x256s168x", *(fields | changes).values())


@tool("veritysetup")
@pytest.mark.parametrize("seed", range(40))
def test_a_tree_is_good_or_damaged_where_veritysetup_says_so(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    data_block, hash_block = 1 << rng.randint(9, 12), 1 << rng.randint(9, 14)
    algorithm = rng.choice(list(verity.ALGORITHMS))
    blocks = rng.choice([1, 2, 3, rng.randint(1, 40), rng.randint(1, 3000)])
    data = rng.randbytes(data_block * blocks) + bytes(rng.choice([0, 512, data_block]))
    made = make_tree(
        data,
        *("--hash", algorithm, "--data-block-size", data_block, "--hash-block-size", hash_block),
        *("--data-blocks", blocks, "--format", rng.randint(0, 1)),
        *("--salt", rng.randbytes(rng.choice([0, 1, 32, 255, 256])).hex() or "-"),
    )
    found = verify(data, made.content, made.root_hash)
    assert (found.data_size, found.algorithm) == (data_block * blocks, algorithm)
    for _ in range(4):
        changed = {"data": bytearray(data), "tree": bytearray(made.content)}
        name = rng.choice(["data", "tree", "tree"])
        offset = rng.randrange(min(rng.choice([512, len(changed[name])]), len(changed[name])))
        changed[name][offset] ^= 1 << rng.randrange(8)
        for file, content in changed.items():
            (tmp_path / file).write_bytes(content)
        said = veritysetup("verify", tmp_path / "data", tmp_path / "tree", made.root_hash.hex())
        # For veritysetup "SHA256" is "sha256", for the kernel it is not.
        if said.returncode == 0 and changed["tree"][32:64].islower():
            verify(bytes(changed["data"]), bytes(changed["tree"]), made.root_hash)
        else:
            with pytest.raises(Refused):
                verify(bytes(changed["data"]), bytes(changed["tree"]), made.root_hash)


@pytest.fixture(scope="module")
def made() -> tuple[bytes, Tree]:
    data = random.Random(7).randbytes(4096 * 300)
    return data, make_tree(data)


@tool("veritysetup")
@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (0, "its root hash is not that of its hash tree"),
        (4096 * 3 + 5, "its hash tree is damaged: copy it again"),
    ],
)
def test_a_damaged_tree_is_told_from(made: tuple[bytes, Tree], offset: int, words: str) -> None:
    data, tree = made
    changed = bytearray(tree.content)
    changed[offset or 4096] ^= 1
    with pytest.raises(Refused, match=words):
        verify(data, bytes(changed), tree.root_hash)


@tool("veritysetup")
def test_damaged_data_is_told_with_its_place(made: tuple[bytes, Tree]) -> None:
    data, tree = made
    changed = bytearray(data)
    changed[4096 * 200] ^= 1
    with pytest.raises(
        Refused, match=r"^its file system is damaged at byte 524288 or soon after, by its hash tree"
    ):
        verify(bytes(changed), tree.content, tree.root_hash)
    single = make_tree(data[:4096])
    with pytest.raises(Refused, match="its file system is damaged at byte 0 or soon after"):
        verify(bytes(changed[4096 * 200 :][:4096]), single.content, single.root_hash)


@tool("veritysetup")
def test_the_root_hash_of_another_image_is_refused(made: tuple[bytes, Tree]) -> None:
    data, tree = made
    other = make_tree(data)  # with another salt
    with pytest.raises(
        Refused, match=r"^its root hash is not that of its hash tree: they are of different images"
    ):
        verify(data, tree.content, other.root_hash)
    with pytest.raises(Refused, match=r"^its root hash has 16 bytes, and its hash tree is of sha256"):
        verify(data, tree.content, tree.root_hash[:16])


@tool("veritysetup")
def test_a_tree_that_is_cut_off(made: tuple[bytes, Tree]) -> None:
    """In a file of its own it is still to come; in a partition, of which all is there, it never will."""
    data, tree = made
    for size in (0, 100, 511, 512, 4096, len(tree.content) - 1):
        need = 512 if size < 512 else len(tree.content)
        with pytest.raises(
            Incomplete, match=f"^incomplete: {size} of {need} bytes of its verity data are here$"
        ):
            verify(data, tree.content[:size], tree.root_hash)
        with pytest.raises(Refused, match=f"^{size} of {need} bytes of its verity data are here$") as refused:
            verify(data, tree.content[:size], tree.root_hash, before=bytes(4096))
        assert not isinstance(refused.value, Incomplete)
    with pytest.raises(Incomplete, match="begins with nothing but zeros: not uploaded yet"):
        verify(data, bytes(len(tree.content)), tree.root_hash)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"magic": b"verity\0\1"},
            "its verity data has no superblock: build it with systemd-repart or veritysetup",
        ),
        ({"version": 0}, "its verity data is of version 0 and type 1, which nobody knows"),
        ({"version": 2}, "of version 2"),
        ({"type": 2}, "of version 1 and type 2"),
        (
            {"algorithm": b"sha1"},
            "the hash algorithm of its verity data is sha1, not one of sha256, sha384, sha512",
        ),
        ({"algorithm": b"md5"}, "verity data is md5"),
        ({"algorithm": b"shake_128"}, "verity data is unknown"),
        ({"algorithm": b"\xff\n"}, "verity data is unknown"),
        ({"algorithm": b""}, "verity data is unknown"),
        ({"data_block": 0}, "claims data blocks of 0 bytes and hash blocks of 4096"),
        ({"data_block": 256}, "claims data blocks of 256 bytes"),
        ({"data_block": 4095}, "claims data blocks of 4095 bytes"),
        ({"data_block": 1 << 20}, "claims data blocks of 1048576 bytes"),
        ({"data_block": 0xFFFFFFFF}, "claims data blocks of 4294967295 bytes"),
        ({"hash_block": 0}, "and hash blocks of 0"),
        ({"hash_block": 1 << 31}, "and hash blocks of 2147483648"),
        ({"hash_block": 3 << 10}, "and hash blocks of 3072"),
        ({"data_blocks": 0}, "claims 0 blocks of 4096 bytes, and the file system has 8192 bytes"),
        ({"data_blocks": 3}, "claims 3 blocks of 4096 bytes"),
        ({"data_blocks": HUGE}, "claims 18446744073709551615 blocks"),
        ({"data_blocks": (HUGE >> 12) + 1}, "claims 4503599627370496 blocks"),
        ({"salt_size": 257}, "claims a salt of 257 bytes, there is room for 256"),
        ({"salt_size": 0xFFFF}, "claims a salt of 65535 bytes"),
    ],
)
def test_a_superblock_that_lies(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        verify(bytes(8192), superblock(**changes) + bytes(16384), bytes(32))
    assert not isinstance(refused.value, Incomplete)


def test_a_tree_of_any_claim_costs_no_memory() -> None:
    """Data and tree of a TiB, which are sparse: the superblock alone is read, then one hash block."""
    end = 1 << 40
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        other.write(superblock(data_blocks=end // 512, data_block=512, hash_block=512))
        for file in (one, other):
            file.truncate(end)
        tracemalloc.start()
        with pytest.raises(Refused, match="its root hash is not that of its hash tree"):
            hash_tree.verify(Extent(one.fileno(), 0, end), Extent(other.fileno(), 0, end), bytes(32))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


_sizes = st.one_of(
    st.sampled_from([0, 512, 1024, 4096, 1 << 19, 1 << 20, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF)
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "version": st.integers(0, 2),
            "type": st.integers(0, 2),
            "algorithm": st.one_of(st.sampled_from([b"sha256", b"sha512", b"sha1"]), st.binary(max_size=32)),
            "data_block": _sizes,
            "hash_block": _sizes,
            "data_blocks": st.one_of(st.integers(0, 300), st.integers(0, HUGE)),
            "salt_size": st.integers(0, 300),
            "salt": st.binary(max_size=256),
        },
    ),
    st.binary(max_size=2000),
    st.binary(min_size=16, max_size=64),
    st.integers(0, 20_000),
)
def test_whatever_a_superblock_claims_there_is_a_verdict(
    changes: dict[str, object], rest: bytes, root_hash: bytes, cut: int
) -> None:
    try:
        found = verify(bytes(16384), (superblock(**changes) + rest + bytes(16384))[:cut], root_hash)
    except Refused as refused:
        assert str(refused).isprintable()
    else:
        assert 0 < found.data_size <= 16384 and found.end <= cut
