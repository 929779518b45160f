# SPDX-License-Identifier: LGPL-2.1-or-later
"""File systems made for writing: mounted so that nothing is written, and refused where they would ask for more.

Of images/formats/ext4.py, images/formats/btrfs.py and images/formats/crc32c.py.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.disks import disk
from support.images import confext, digest, image, noise
from support.needs import filesystem, loop, root, tool
from watcher.images.formats import ext4
from watcher.images.formats.crc32c import crc32c
from watcher.images.formats.image import Image
from watcher.images.formats.probe import probe
from watcher.model import Incomplete, Refused

KINDS = [pytest.param(one, marks=tool(f"mkfs.{one}")) for one in ("ext4", "btrfs")]
MOUNTED = [pytest.param(one, marks=[tool(f"mkfs.{one}"), filesystem(one)]) for one in ("ext4", "btrfs")]
EXT4_AT, BTRFS_AT = 1024, 1 << 16


def made(path: Path, fstype: str, content: str = "x = 1\n", *options: str) -> Path:
    tree = confext(path.with_suffix(".tree"), "web", {"etc/web.conf": content.encode(), "etc/n": noise(9000)})
    return image(tree, path, fstype, *options)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    top = tmp_path_factory.mktemp("images")

    def content(fstype: str) -> bytes:
        path = top / fstype
        return (path if path.exists() else made(path, fstype)).read_bytes()

    return content


def probed(content: bytes) -> Image:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return probe(file.fileno(), len(content))


def ext4_with(content: bytes, **fields: int) -> bytes:
    """An ext4 with other values in its superblock, and the right checksum."""
    changed = bytearray(content)
    for name, value in fields.items():
        offset, size = EXT4_FIELDS[name]
        changed[EXT4_AT + offset : EXT4_AT + offset + size] = value.to_bytes(size, "little")
    changed[EXT4_AT + 1020 : EXT4_AT + 1024] = ext4.checksum(bytes(changed)).to_bytes(4, "little")
    return bytes(changed)


EXT4_FIELDS = {
    "blocks": (4, 4),
    "blocks_high": (0x150, 4),
    "block_log": (0x18, 4),
    "state": (0x3A, 2),
    "errors": (0x3C, 2),
    "incompat": (0x60, 4),
    "ro_compat": (0x64, 4),
    "orphan": (0xE8, 4),
    "mount_options": (0x200, 8),
}
INCOMPAT = 0x2C2  # of a plain ext4: filetype, extents, 64bit, flex_bg
RO_COMPAT = 0x46B


def btrfs_with(content: bytes, **fields: int) -> bytes:
    changed = bytearray(content)
    for name, value in fields.items():
        offset, size = BTRFS_FIELDS[name]
        changed[BTRFS_AT + offset : BTRFS_AT + offset + size] = value.to_bytes(size, "little")
    made = crc32c(bytes(changed[BTRFS_AT + 32 : BTRFS_AT + 4096])) ^ 0xFFFFFFFF
    changed[BTRFS_AT : BTRFS_AT + 4] = made.to_bytes(4, "little")
    return bytes(changed)


BTRFS_FIELDS = {
    "offset": (0x30, 8),
    "flags": (0x38, 8),
    "log_root": (0x60, 8),
    "size": (0x70, 8),
    "devices": (0x88, 8),
    "checksum": (0xC4, 2),
    "device_size": (0xD1, 8),
}


@contextmanager
def mounted(path: Path) -> Iterator[int]:
    """The root directory of an image."""
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        made = probe(backing, os.fstat(backing).st_size).fsmount(backing, "test")
    finally:
        os.close(backing)
    try:
        yield made
    finally:
        os.close(made)


def conf(root: int) -> str:
    fd = os.open("etc/web.conf", os.O_RDONLY, dir_fd=root)
    try:
        return os.read(fd, 100).decode().strip()
    finally:
        os.close(fd)


def test_crc32c_is_castagnolis() -> None:
    # RFC 3720, B.4
    assert crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc32c(b"123456789") ^ 0xFFFFFFFF != zlib.crc32(b"123456789")


@pytest.mark.parametrize("fstype", KINDS)
def test_a_real_one_is_whole_and_cut_off_it_is_incomplete(
    contents: Callable[[str], bytes], fstype: str
) -> None:
    content = contents(fstype)
    found = probed(content)
    assert (found.name, found.end) == (fstype, len(content))
    for size in (70_000, len(content) - 4096, len(content) - 1):
        with pytest.raises(Incomplete, match=f"^incomplete: {size} of {len(content)} bytes are here$"):
            probed(content[:size])
    assert probed(disk(content)).name == f"disk image with {fstype}"
    # Cut off within its superblock, and before that.
    for size in (1090, 1500, 66_000, 68_000):
        with pytest.raises(Refused):
            probed(content[:size])


@tool("mkfs.ext4")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incompat": INCOMPAT | 0x4}, "an ext4 whose journal was not replayed.*e2fsck -f"),
        ({"incompat": INCOMPAT | 0x8}, "the journal of an ext4 file system"),
        ({"incompat": INCOMPAT | 0x10000}, "features that are not for an image .incompat 0x10000"),
        ({"incompat": INCOMPAT | 0x20000}, "features that are not for an image .incompat 0x20000"),
        ({"incompat": 0xFFFFFFF3}, "an ext4"),
        ({"incompat": 0x2, "ro_compat": 0x3}, "an ext2 or ext3 file system: use squashfs, erofs or ext4"),
        ({"state": 0}, "an ext4 that is not clean"),
        ({"state": 3}, "an ext4 that is not clean"),
        ({"orphan": 12}, "an ext4 that is not clean"),
        ({"ro_compat": RO_COMPAT | 0x10000}, "an ext4 that is not clean"),
        ({"errors": 3}, "asks the kernel to panic when it finds an error: tune2fs -e remount-ro"),
        ({"mount_options": 0x64}, "an ext4 with mount options in its superblock"),
        ({"blocks": 1}, "lies about its size"),
        ({"blocks": 0}, "lies about its size"),
        ({"blocks": 0xFFFFFFFF}, r"incomplete: \d+ of \d+ bytes"),
        ({"blocks_high": 0xFFFFFFFF, "block_log": 6}, r"incomplete: \d+ of \d+ bytes"),
        ({"block_log": 7}, "no squashfs, erofs, ext4 or btrfs image"),
        ({"block_log": 0xFFFFFFFF}, "no squashfs, erofs, ext4 or btrfs image"),
    ],
)
def test_an_ext4_that_asks_for_more_than_to_be_read(
    contents: Callable[[str], bytes], changes: dict[str, int], reason: str
) -> None:
    content = contents("ext4")
    assert probed(ext4_with(content)).name == "ext4"
    with pytest.raises(Refused, match=reason):
        probed(ext4_with(content, **changes))


@tool("mkfs.btrfs")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"devices": 2}, "a btrfs of 2 devices, of which an image is one"),
        ({"devices": 0}, "a btrfs of 0 devices"),
        ({"flags": 0x100000001}, "a btrfs that is a seed device, on which others build"),
        ({"flags": 0x200000001}, "with flags that are not for an image .0x200000001."),
        ({"log_root": 4096}, "a btrfs whose log was not replayed, which would write to it"),
        ({"offset": 0x4000000}, "its superblock belongs elsewhere"),
        ({"checksum": 4}, "unknown checksum 4"),
        ({"checksum": 2}, "the checksum of its superblock is wrong"),
        ({"size": 0}, "lies about its size"),
        ({"size": 1 << 63}, r"incomplete: \d+ of 9223372036854775808 bytes"),
        ({"device_size": 0}, "lies about its size"),
        ({"device_size": 1 << 63}, r"incomplete: \d+ of 9223372036854775808 bytes"),
    ],
)
def test_a_btrfs_that_is_not_one_image(
    contents: Callable[[str], bytes], changes: dict[str, int], reason: str
) -> None:
    content = contents("btrfs")
    assert probed(btrfs_with(content)).name == "btrfs"
    with pytest.raises(Refused, match=reason):
        probed(btrfs_with(content, **changes))


@pytest.mark.parametrize("fstype", KINDS)
def test_one_flipped_bit_anywhere_in_the_superblock_is_refused(
    contents: Callable[[str], bytes], fstype: str
) -> None:
    content = contents(fstype)
    start, size = (EXT4_AT, 1024) if fstype == "ext4" else (BTRFS_AT, 4096)
    # Of a btrfs 28 of the 32 bytes of the checksum are not used. Of one said to be by xxhash only the kernel tells.
    unused = {*range(BTRFS_AT + 4, BTRFS_AT + 32), BTRFS_AT + 196} if fstype == "btrfs" else set()
    for offset in set(range(start, start + size, 7)) - unused:
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        with pytest.raises(Refused):
            probed(bytes(changed))


@tool("mkfs.ext4")
@tool("blkid")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-O", "^has_journal"),
        ("-O", "^metadata_csum"),
        ("-O", "^metadata_csum,^64bit"),
        ("-O", "^extent,^flex_bg,^64bit,^metadata_csum,^huge_file,^dir_nlink,^extra_isize"),
        ("-O", "none"),
        ("-b", "4096"),
        ("-O", "inline_data,meta_bg,^resize_inode"),
        ("-t", "ext3"),
        ("-t", "ext2"),
    ],
)
def test_what_is_an_ext4_is_so_to_libblkid(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = made(tmp_path / "web.raw", "ext4", "x", *options)
    words = ["blkid", "--probe", "--output", "value", "--match-tag", "TYPE", path]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    try:
        found = probed(path.read_bytes()).name
    except Refused as refused:
        assert str(refused).startswith("an ext2 or ext3 file system")
        found = "ext3" if "ext3" in done.stdout else "ext2"
    assert found == done.stdout.strip()


@tool("mkfs.btrfs")
@pytest.mark.parametrize("checksum", ["crc32c", "xxhash", "sha256", "blake2"])
def test_btrfs_with_each_checksum(tmp_path: Path, checksum: str) -> None:
    path = made(tmp_path / "web.raw", "btrfs", "x", "--csum", checksum)
    assert probed(path.read_bytes()).name == "btrfs"


@root
@loop
class TestMounted:
    @pytest.mark.parametrize("fstype", MOUNTED)
    def test_nothing_is_written(self, tmp_path: Path, fstype: str) -> None:
        path = made(tmp_path / "web.raw", fstype)
        before = digest(path)
        with mounted(path) as root:
            assert conf(root) == "x = 1"
            with pytest.raises(OSError, match="Read-only file system"):
                os.open("etc/web.conf", os.O_WRONLY, dir_fd=root)
            os.sync()
        os.sync()
        assert digest(path) == before

    @pytest.mark.parametrize("fstype", MOUNTED)
    def test_two_with_the_same_uuid_are_two(self, tmp_path: Path, fstype: str) -> None:
        """As two versions are that a build made reproducible. Also the same one twice, as a start of a unit has it."""
        same = "11111111-2222-3333-4444-555555555555"
        one, two = (made(tmp_path / f"{name}.raw", fstype, name, "-U", same) for name in ("one", "two"))
        with mounted(one) as first, mounted(two) as second, mounted(one) as again:
            assert [conf(root) for root in (first, second, again)] == ["one", "two", "one"]
        with mounted(two) as second:
            assert conf(second) == "two"

    @filesystem("ext4")
    @tool("mkfs.ext4")
    @tool("debugfs")
    def test_an_ext4_that_was_not_unmounted(self, tmp_path: Path) -> None:
        path = made(tmp_path / "web.raw", "ext4")
        command = ["debugfs", "-w", "-R", "feature needs_recovery", path]
        subprocess.run(command, check=True, capture_output=True)
        with pytest.raises(Refused, match="an ext4 whose journal was not replayed"), mounted(path):
            pass
