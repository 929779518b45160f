# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole images are told from truncated ones and from everything else, byte for byte.

Of the formats: images/formats/base.py, images/formats/squashfs.py, images/formats/erofs.py.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from support.images import confext, image, noise
from support.needs import tool
from watcher.images.formats.probe import probe
from watcher.model import Busy, Incomplete, Refused

both = [
    pytest.param("squashfs", marks=tool("mksquashfs")),
    pytest.param("erofs", marks=tool("mkfs.erofs")),
]
squashfs = tool("mksquashfs")
erofs = tool("mkfs.erofs")


class Probed(NamedTuple):
    fstype: str
    bytes_used: int


def probed(content: bytes) -> Probed:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content))
        return Probed(found.name, found.end)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return confext(tmp_path / "tree", "web", {"etc/web.conf": b"x = 1\n", "etc/large": noise(200_000)})


def made(tree: Path, fstype: str, *options: str) -> bytes:
    return image(tree, tree.parent / "image.raw", fstype, *options).read_bytes()


def patched(content: bytes, offset: int, form: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


@pytest.mark.parametrize("fstype", both)
def test_a_real_image_is_whole(tree: Path, fstype: str) -> None:
    content = made(tree, fstype)
    found = probed(content)
    assert found.fstype == fstype
    assert 200_000 < found.bytes_used <= len(content)


@pytest.mark.parametrize(
    "options",
    [
        *[
            pytest.param(("-comp", name), id=name, marks=squashfs)
            for name in ("gzip", "xz", "lz4", "zstd", "lzo")
        ],
        pytest.param(("-no-exports", "-no-xattrs", "-no-fragments"), id="bare", marks=squashfs),
        pytest.param(("-b", "4096"), id="small-blocks", marks=squashfs),
    ],
)
def test_squashfs_as_people_build_it(tree: Path, options: tuple[str, ...]) -> None:
    content = made(tree, "squashfs", *options)
    assert probed(content).bytes_used <= len(content)


@squashfs
def test_squashfs_without_padding_cannot_be_read_to_its_end(tree: Path) -> None:
    """The kernel reads whole blocks of 1024 bytes."""
    content = made(tree, "squashfs", "-nopad")
    need = -(-len(content) // 1024) * 1024
    assert need > len(content), "take another tree"
    with pytest.raises(Incomplete, match=f"{len(content)} of {need} bytes are here .*-nopad"):
        probed(content)
    assert probed(content.ljust(need, b"\0")).bytes_used == len(content)


@squashfs
def test_squashfs_of_an_almost_empty_tree(tmp_path: Path) -> None:
    assert probed(made(confext(tmp_path / "tree", "web"), "squashfs")).fstype == "squashfs"


@erofs
@pytest.mark.parametrize(
    "options", [(), ("-zlz4hc",), ("-E", "legacy-compress"), ("-E", "force-inode-extended")]
)
def test_erofs_as_people_build_it(tree: Path, options: tuple[str, ...]) -> None:
    assert probed(made(tree, "erofs", *options)).fstype == "erofs"


@pytest.mark.parametrize("fstype", both)
def test_one_missing_byte_is_incomplete_and_says_how_much_there_is(tree: Path, fstype: str) -> None:
    content = made(tree, fstype)
    used = probed(content).bytes_used
    with pytest.raises(Incomplete, match=rf"^incomplete: {used - 1} of {used} bytes are here$"):
        probed(content[: used - 1])
    assert probed(content[: -(-used // 1024) * 1024]).bytes_used == used


@pytest.mark.parametrize("fstype", both)
def test_no_prefix_of_an_image_passes(tree: Path, fstype: str) -> None:
    content = made(tree, fstype)
    used = probed(content).bytes_used
    for length in [
        0,
        1,
        4,
        95,
        96,
        97,
        511,
        512,
        1023,
        1024,
        1028,
        1151,
        1152,
        4095,
        4096,
        *range(5000, used, 7001),
    ]:
        with pytest.raises(Refused):
            probed(content[:length])


@pytest.mark.parametrize("fstype", both)
def test_what_follows_an_image_does_not_matter(tree: Path, fstype: str) -> None:
    content = made(tree, fstype)
    assert probed(content + noise(10_000)) == probed(content)


@squashfs
@pytest.mark.parametrize("left", [1, 100, 2000])
def test_one_that_becomes_shorter_is_still_being_written(tree: Path, left: int) -> None:
    content = made(tree, "squashfs")
    with tempfile.TemporaryFile() as file:
        file.write(content[:left])
        file.flush()
        with pytest.raises(Busy):
            probe(file.fileno(), len(content))


def test_empty() -> None:
    with pytest.raises(Refused, match=r"^empty$") as refused:
        probed(b"")
    assert not isinstance(refused.value, Incomplete)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"\x1f\x8b\x08" + bytes(2000), "gzip"),
        (b"PK\x03\x04" + bytes(2000), "zip"),
        (b"x" * 257 + b"ustar\x0000" + bytes(2000), "tar"),
        (bytes(1080) + b"\x53\xef" + bytes(2000), "an ext2 or ext3 file system"),
        (
            bytes(65600) + b"_BHRfS_M" + bytes(2000),
            "incomplete: 67608 bytes are here, the superblock alone takes 69632",
        ),
        (b"XFSB" + bytes(2000), "an XFS file system: use squashfs or erofs"),
        (b"LUKS\xba\xbe" + bytes(2000), "encrypted"),
        (b"sqsh" + bytes(2000), "big-endian"),
        (b"#!/bin/sh\n", "no squashfs, erofs, ext4 or btrfs image, but a script: "),
        (b"\n<!DOCTYPE html>\n<html>" + b"x" * 9000, "no squashfs.*, but a web page: download"),
        (b"<html><head><title>404", "but a web page: download"),
        (b"<?xml version='1.0'?><Error>AccessDenied", "but an XML document"),
        (b'{"message": "Not Found"}', "but JSON, perhaps what a server answered"),
        (b"\xef\xbb\xbf{}", "but JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "but a git-lfs pointer.*run git lfs pull",
        ),
        (b"-----BEGIN PKCS7-----\n", "but a certificate, key or signature"),
        ("h\u00e9llo\n".encode() * 1000, "no squashfs, erofs, ext4 or btrfs image, but a text: "),
        (b"\x00\x01" * 600, "no squashfs, erofs, ext4 or btrfs image$"),
        (b"\xe2\xe1\xf5\xe0", "no squashfs, erofs, ext4 or btrfs image$"),
    ],
)
def test_other_things_are_named(content: bytes, hint: str) -> None:
    with pytest.raises(Refused, match=hint):
        probed(content)


def test_space_set_aside_is_an_upload_that_has_not_begun() -> None:
    with pytest.raises(Incomplete, match="zeros"):
        probed(bytes(100_000))


@squashfs
def test_what_two_formats_recognise_is_refused_as_systemd_does(tree: Path) -> None:
    content = made(tree, "squashfs")
    with pytest.raises(Refused, match=r"^ambiguous: it is squashfs and erofs$"):
        probed(patched(content, 1024, "<I", 0xE0F5E1E2))


@squashfs
class TestSquashfsThatLies:
    # struct squashfs_super_block: bytes_used at 40, then where the tables are

    def test_about_a_size_beyond_the_file(self, tree: Path) -> None:
        with pytest.raises(Incomplete, match=str(2**63)):
            probed(patched(made(tree, "squashfs"), 40, "<Q", 2**63))

    @pytest.mark.parametrize("claim", [0, 95])
    def test_about_no_size_at_all(self, tree: Path, claim: int) -> None:
        with pytest.raises(Refused, match="lies about its size"):
            probed(patched(made(tree, "squashfs"), 40, "<Q", claim))

    @pytest.mark.parametrize("claim", [96, 4096, 100_000])
    def test_so_that_its_tables_are_outside(self, tree: Path, claim: int) -> None:
        with pytest.raises(Refused, match="lies about its size"):
            probed(patched(made(tree, "squashfs"), 40, "<Q", claim))

    @pytest.mark.parametrize("offset", [48, 56, 64, 72, 80, 88])
    def test_about_where_a_table_is(self, tree: Path, offset: int) -> None:
        with pytest.raises(Refused):
            probed(patched(made(tree, "squashfs"), offset, "<Q", 2**62))

    def test_about_an_inode_table_within_its_header(self, tree: Path) -> None:
        with pytest.raises(Refused, match="lies about its size"):
            probed(patched(made(tree, "squashfs"), 64, "<Q", 95))

    def test_except_about_fragments_that_it_does_not_have(self, tree: Path) -> None:
        content = patched(patched(made(tree, "squashfs"), 16, "<I", 0), 80, "<Q", 2**62)
        assert probed(content).fstype == "squashfs"

    @pytest.mark.parametrize(
        ("offset", "form", "value", "text"),
        [
            (12, "<I", 12345, "block size"),
            (22, "<H", 40, "block size"),
            (20, "<H", 77, "compression 77"),
            (28, "<H", 3, "squashfs 3.0"),
            (30, "<H", 9, "squashfs 4.9"),
            (32, "<Q", 2**63, "root directory"),
        ],
    )
    def test_about_anything_else(self, tree: Path, offset: int, form: str, value: int, text: str) -> None:
        with pytest.raises(Refused, match=text):
            probed(patched(made(tree, "squashfs"), offset, form, value))


@erofs
class TestErofsThatLies:
    def test_about_a_size_beyond_the_file(self, tree: Path) -> None:
        with pytest.raises(Incomplete, match=str((2**32 - 1) << 12)):
            probed(patched(made(tree, "erofs"), 1024 + 36, "<I", 2**32 - 1))

    def test_about_no_size_at_all(self, tree: Path) -> None:
        with pytest.raises(Refused, match="lies about its size"):
            probed(patched(made(tree, "erofs"), 1024 + 36, "<I", 0))

    @pytest.mark.parametrize("bits", [0, 8, 17, 255])
    def test_about_its_blocks(self, tree: Path, bits: int) -> None:
        with pytest.raises(Refused, match="block size"):
            probed(patched(made(tree, "erofs"), 1024 + 12, "<B", bits))

    def test_about_where_its_root_is(self, tree: Path) -> None:
        with pytest.raises(Refused, match="lies about its size"):
            probed(patched(made(tree, "erofs"), 1024 + 40, "<I", 2**31))

    def test_by_one_flipped_bit_anywhere_in_its_superblock(self, tree: Path) -> None:
        content = made(tree, "erofs")
        for offset in range(1024, 1024 + 128):
            with pytest.raises(Refused):
                probed(patched(content, offset, "<B", content[offset] ^ 0x10))

    def test_except_where_it_has_no_checksum(self, tree: Path) -> None:
        content = patched(made(tree, "erofs"), 1024 + 4, "<II", 0, 0)
        assert probed(content).fstype == "erofs"

    def test_about_a_size_in_48_bits(self, tree: Path) -> None:
        content = patched(made(tree, "erofs"), 1024 + 4, "<II", 0, 0)
        blocks = struct.unpack_from("<I", content, 1024 + 36)[0]
        wide = patched(patched(content, 1024 + 80, "<I", 0x80), 1024 + 14, "<H", 1)
        with pytest.raises(Incomplete, match=str((blocks + 2**32) << 12)):
            probed(wide)
        assert probed(patched(wide, 1024 + 14, "<H", 0)).fstype == "erofs"

    def test_about_further_devices(self, tree: Path) -> None:
        content = patched(patched(made(tree, "erofs"), 1024 + 80, "<I", 0x8), 1024 + 86, "<H", 1)
        with pytest.raises(Refused, match="2 parts"):
            probed(content)


@pytest.mark.parametrize("fstype", both)
def test_no_rubbish_in_a_header_is_answered_with_anything_but_a_verdict(tree: Path, fstype: str) -> None:
    content = made(tree, fstype)
    start = 0 if fstype == "squashfs" else 1024
    rng = random.Random(1)
    for _ in range(3000):
        changed = bytearray(content[:8192])
        for _ in range(rng.randint(1, 40)):
            changed[start + rng.randrange(4, 128)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        try:
            found = probed(bytes(changed))
        except Refused as refused:
            assert str(refused).isprintable()
        else:
            assert found.bytes_used <= len(changed)


def test_a_file_that_cannot_be_read_is_no_verdict(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            probe(fd, 4096)
    finally:
        os.close(fd)
