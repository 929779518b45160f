# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disk images: what of a partition table is believed, what is refused and how, and that hostile ones end quickly.

Of images/formats/gpt.py, images/formats/disk.py, images/formats/image.py and images/formats/partition_types.py.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import tempfile
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.disks import (
    GENERIC,
    NO_AUTO,
    READ_ONLY,
    ROOT,
    SIGNATURE,
    SIGNED,
    SIGNED_HASH,
    USR,
    VERITY,
    Disk,
    Part,
    build,
    disk,
)
from support.images import confext, image, noise
from support.needs import tool
from support.signed import make_tree, padded
from watcher.images.formats import partition_types
from watcher.images.formats.gpt import read
from watcher.images.formats.image import Image
from watcher.images.formats.partition_types import OTHERS
from watcher.images.formats.probe import probe
from watcher.model import Incomplete, Refused, Sysext

pytestmark = tool("mksquashfs")
PAD = Part(bytes(512), GENERIC, "other")


def probed(content: bytes) -> Image:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return probe(file.fileno(), len(content))


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    top = tmp_path_factory.mktemp("squashfs")
    files = {"etc/web.conf": b"x = 1\n", "etc/large": noise(3000)}
    return image(confext(top / "tree", "web", files), top / "web.raw").read_bytes()


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    top = tmp_path_factory.mktemp("erofs")
    tree = confext(top / "tree", "web", {"etc/web.conf": b"x = 1\n"})
    return image(tree, top / "web.raw", "erofs").read_bytes()


@pytest.mark.parametrize("sector", [512, 1024, 2048, 4096])
def test_a_file_system_in_a_partition(squashfs: bytes, sector: int) -> None:
    content = disk(squashfs, PAD, sector=sector)
    found = probed(content)
    assert (found.name, found.end, found.brought) == ("disk image with squashfs", len(content), None)
    assert content[found.offset : found.offset + len(squashfs)] == squashfs
    assert found.size == -(-len(squashfs) // sector) * sector


@tool("mkfs.erofs")
def test_erofs_in_a_partition(erofs: bytes) -> None:
    assert probed(disk(erofs)).name == "disk image with erofs"


@pytest.mark.parametrize("sector", [512, 4096])
def test_no_prefix_passes_and_each_says_how_much_there_is(squashfs: bytes, sector: int) -> None:
    content = disk(squashfs, sector=sector)
    need = sector + 92
    for size in [512, 600, sector, sector + 91]:
        with pytest.raises(Incomplete, match=f"incomplete: {size} bytes are here, its partition table alone"):
            probed(content[:size])
    for size in [need, 2 * sector, 20_000, len(content) - sector, len(content) - 1]:
        with pytest.raises(Incomplete, match=f"^incomplete: {size} of {len(content)} bytes are here$"):
            probed(content[:size])


@pytest.mark.parametrize("trailing", [b"\0" * 5000, os.urandom(5000)])
def test_what_follows_the_backup_does_not_matter(squashfs: bytes, trailing: bytes) -> None:
    content = disk(squashfs)
    assert probed(content + trailing) == probed(content)


def test_space_set_aside_and_filled_in_part_is_incomplete(squashfs: bytes) -> None:
    content = disk(squashfs)
    for size in (1024, 30_000, len(content) - 512):
        with pytest.raises(Incomplete, match="zeros where the backup of its partition table belongs"):
            probed(content[:size].ljust(len(content), b"\0"))


# --- which partition ---


@tool("veritysetup")
def test_what_it_can_be_verified_by_is_told(squashfs: bytes) -> None:
    data = padded(squashfs)
    tree = make_tree(data)
    verity = Part(tree.content, VERITY, "v", id=uuid.UUID(bytes=tree.root_hash[16:]))
    root = Part(data, id=uuid.UUID(bytes=tree.root_hash[:16]))
    brought = probed(disk(root, verity)).brought
    assert brought is not None and (brought.root_hash, brought.signature) == (tree.root_hash, None)
    signed = probed(disk(root, verity, Part(SIGNED, SIGNATURE, "s"))).brought
    assert signed is not None and (signed.root_hash, signed.signature) == (SIGNED_HASH, b"0\x00")
    with pytest.raises(Refused, match="a signature, and without the verity data"):
        probed(disk(root, Part(SIGNED, SIGNATURE, "s")))
    assert probed(disk(root, replace(verity, flags=NO_AUTO))).brought is None
    with pytest.raises(Refused, match="its verity data has no superblock"):
        probed(disk(root, Part(b"verity" * 1000, VERITY, "v")))


ARM, X86 = partition_types.root("arm64"), partition_types.root("x86")


def test_what_is_no_part_of_a_confext_is_there_for_a_policy_all_the_same(squashfs: bytes) -> None:
    """systemd does not start a unit whose policy wants no such partition: settings/image_policy.py."""
    home, esp = (next(id for id, known in OTHERS.items() if known == name) for name in ("home", "esp"))
    others = [(home, NO_AUTO), (home, READ_ONLY), (home, 0), (esp, NO_AUTO), (GENERIC, 0)]
    found = probed(disk(Part(squashfs), *(Part(bytes(4096), type, "x", flags) for type, flags in others)))
    assert found.parts == (("root", 0), ("home", READ_ONLY), ("esp", NO_AUTO))
    hidden = probed(disk(Part(squashfs), Part(bytes(4096), esp, "x", 2)))  # no block I/O protocol
    assert hidden.parts == (("root", 0),)


@pytest.mark.parametrize(
    ("parts", "number"),
    [
        ([("", ROOT, 0)], 1),
        ([("a", GENERIC, 0), ("", ROOT, 0)], 2),
        ([("1", ROOT, NO_AUTO), ("", ROOT, 0)], 2),
        ([("a_1", ROOT, 0), ("a_2", ROOT, 0)], 2),
        ([("a_2", ROOT, 0), ("a_1", ROOT, 0)], 1),
        ([("a_9", ROOT, 0), ("a_10", ROOT, 0)], 2),
        ([("a", ROOT, 0), ("a", ROOT, 0)], 1),
        ([("z", ARM, 0), ("a", ROOT, 0)], 2),
        ([("a", ROOT, 0), ("z", ARM, 0)], 1),
        ([("z", ARM, 0), ("a", X86, 0)], 2),
        ([("z", ARM, 0)], 1),
        ([("_empty", ROOT, NO_AUTO), ("a", ROOT, 0)], 2),
        ([("_empty", X86, 0), ("a", ROOT, 0)], 2),
    ],
)
def test_the_root_is_the_one_that_systemd_takes(
    squashfs: bytes, parts: list[tuple[str, Any, int]], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watcher.settings.architectures.native", lambda: "x86-64")
    contents = [Part(squashfs, type, label, flags) for label, type, flags in parts]
    content = disk(*contents)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        table = read(file.fileno(), content[: 1 << 16], len(content))
    assert probed(content).offset == table.partitions[number - 1].start


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "a disk image with no partitions, so none a root partition .*systemd-repart --make-ddi=confext"),
        ([("a", GENERIC, 0)], "a disk image with 1 partitions, none of them a root partition"),
        ([("a", ROOT, NO_AUTO)], "none of them a root partition .by its type, and without the flag no-auto"),
        (
            [("a", ROOT, 0), ("a", USR, 0)],
            "^a disk image with a usr partition: of a confext there is only /etc",
        ),
        ([("_empty", ROOT, 0)], "root partition 1 is called _empty: systemd 257 takes it, later ones do not"),
        ([("_empty", ROOT, 0), ("_", ROOT, 0)], "root partition 1 is called _empty"),
        ([("a", VERITY, 0)], "none of them a root partition"),
    ],
)
def test_without_a_root_that_all_agree_on_it_is_refused(
    squashfs: bytes, parts: list[tuple[str, Any, int]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watcher.settings.architectures.native", lambda: "x86-64")
    with pytest.raises(Refused, match=reason) as refused:
        probed(disk(*[Part(squashfs, type, label, flags) for label, type, flags in parts]))
    assert not isinstance(refused.value, Incomplete | Sysext)


def test_a_usr_partition_alone_is_a_sysext_which_a_unit_may_declare(squashfs: bytes) -> None:
    with pytest.raises(Sysext, match="not a confext but a sysext"):
        probed(disk(Part(squashfs, USR)))


# --- what is in it ---


def ext2(content: bytes) -> bytes:
    return bytes(1080) + b"\x53\xef" + bytes(8000)


def btrfs(content: bytes) -> bytes:
    return bytes(65600) + b"_BHRfS_M" + bytes(8000)


def nested(content: bytes) -> bytes:
    return disk(content)


def cut(content: bytes) -> bytes:
    return content[:2048]


def ambiguous(content: bytes) -> bytes:
    return content[:1024] + b"\xe2\xe1\xf5\xe0" + content[1028:]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (ext2, "an ext2 or ext3 file system: use squashfs, erofs or ext4"),
        (btrfs, "lies about its size"),
        (nested, "a disk image within a disk image"),
        (cut, r"incomplete: \d+ of \d+ bytes are here"),
        (ambiguous, "ambiguous: it is squashfs and erofs"),
        (lambda content: b"LUKS\xba\xbe" + bytes(5000), "encrypted"),
        (lambda content: bytes(5000), "zeros"),
        (lambda content: b"ID=_any\n" * 100, "no squashfs, erofs, ext4 or btrfs image"),
    ],
)
def test_what_else_is_in_its_root_partition_is_said(squashfs: bytes, made: Any, reason: str) -> None:
    with pytest.raises(Refused, match=rf"^its root partition \(number 1\): .*{reason}") as refused:
        probed(disk(made(squashfs)))
    assert not isinstance(refused.value, Incomplete)  # all of the partition is there


def test_a_disk_image_in_a_squashfs_in_a_disk_image_is_not_looked_into(
    squashfs: bytes, tmp_path: Path
) -> None:
    tree = confext(tmp_path / "tree", "web", {"etc/inner.raw": disk(squashfs)})
    assert probed(disk(image(tree, tmp_path / "outer.raw").read_bytes())).name == "disk image with squashfs"


def test_a_file_that_is_two_things_at_once_is_neither(squashfs: bytes) -> None:
    content = bytearray(disk(squashfs))
    content[:96] = squashfs[:96]
    with pytest.raises(Refused, match="ambiguous: it is a disk image and squashfs"):
        probed(bytes(content))
    content = bytearray(disk(squashfs))
    content[4096:4104] = b"EFI PART"
    with pytest.raises(Refused, match="ambiguous: it has partition tables for sectors of several sizes"):
        probed(bytes(content))


# --- what lies ---


def le32(value: int) -> bytes:
    return struct.pack("<I", value)


def le64(value: int) -> bytes:
    return struct.pack("<Q", value)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({12: le32(91)}, "the header of its partition table is not one"),
        ({12: le32(513)}, "the header of its partition table is not one"),
        ({12: le32(0xFFFFFFFF)}, "the header of its partition table is not one"),
        ({16: le32(1)}, "the checksum of the header of its partition table is wrong"),
        ({24: le64(2)}, "its partition table says it is in sector 2, and is in 1"),
        ({32: le64(HUGE)}, "lies about its size: its partition table claims"),
        ({32: le64(0)}, "overlap or are in disorder"),
        ({32: le64(1)}, "overlap or are in disorder"),
        ({40: le64(0)}, "overlap or are in disorder"),
        ({40: le64(HUGE)}, "overlap or are in disorder"),
        ({48: le64(HUGE)}, "overlap or are in disorder"),
        ({72: le64(0)}, "overlap or are in disorder"),
        ({72: le64(1)}, "overlap or are in disorder"),
        ({72: le64(HUGE)}, "overlap or are in disorder"),
        ({80: le32(0)}, "a partition table of 0 entries of 128 bytes: up to 256 of 128 are supported"),
        ({80: le32(0xFFFFFFFF)}, "a partition table of 4294967295 entries"),
        ({84: le32(127)}, "entries of 127 bytes"),
        ({84: le32(0)}, "entries of 0 bytes"),
        ({84: le32(0xFFFFFFFF)}, "entries of 4294967295 bytes"),
        ({88: le32(7)}, "the (backup|checksum)"),
        ({56: bytes(16)}, "its partition table and the backup of that differ"),
        ({48: le64(80)}, "its partition table and the backup of that differ"),
    ],
)
def test_a_header_that_lies(squashfs: bytes, changes: dict[int, bytes], reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        probed(build(Disk((Part(squashfs),), header=changes)))
    assert not isinstance(refused.value, Incomplete)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({0: b"EFI PORT"}, "the header of the backup of its partition table is not one"),
        ({16: le32(1)}, "the checksum of the header of the backup"),
        ({24: le64(1)}, "the backup of its partition table says it is in sector 1"),
        ({32: le64(7)}, "its partition table and the backup of that differ"),
        ({40: le64(90)}, "its partition table and the backup of that differ"),
        ({72: le64(2)}, "the backup of its partition table overlaps others"),
        ({72: le64(HUGE)}, "the backup of its partition table overlaps others"),
        ({80: le32(127)}, "its partition table and the backup of that differ"),
    ],
)
def test_a_backup_that_lies(squashfs: bytes, changes: dict[int, bytes], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        probed(build(Disk((Part(squashfs),), backup=changes)))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (Part(type=GENERIC, start=90, end=89), "partition 2 is said to be in sectors 90 to 89"),
        (Part(type=GENERIC, start=2, end=3), "partition 2 is said to be in sectors 2 to 3"),
        (
            Part(type=GENERIC, start=1 << 40, end=1 << 41),
            "partition 2 is said to be in sectors 1099511627776",
        ),
        (
            Part(type=GENERIC, start=HUGE, end=HUGE),
            "partition 2 is said to be in sectors 18446744073709551615",
        ),
        (Part(type=GENERIC, start=0, end=HUGE), "partition 2 is said to be in sectors 0"),
        (Part(type=GENERIC, start=80, end=80), "partitions 1 and 2 overlap"),
        (Part(type=GENERIC, start=81, end=200), "partitions 1 and 2 overlap"),
    ],
)
def test_a_partition_that_lies(squashfs: bytes, odd: Part, reason: str) -> None:
    with pytest.raises(Refused, match=f"^a broken disk image: {reason}"):
        probed(disk(squashfs, odd))


def test_without_a_protective_mbr_others_see_no_partitions(squashfs: bytes) -> None:
    with pytest.raises(Refused, match="it has no protective MBR"):
        probed(build(Disk((Part(squashfs),), protective=False)))


def test_one_flipped_bit_anywhere_in_the_tables_is_refused(squashfs: bytes) -> None:
    content = disk(squashfs)
    tables = [
        *range(512, 604),
        *range(1024, 1024 + 128 * 128, 61),
        *range(len(content) - 512, len(content) - 420),
    ]
    backup = len(content) - 512 - 128 * 128
    for offset in [*tables, *range(backup, backup + 256)]:
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        with pytest.raises(Refused):
            probed(bytes(changed))


def test_an_image_of_any_size_costs_no_memory(squashfs: bytes) -> None:
    """All that is read is the head, two headers, two tables and the head of the partition."""
    made = disk(squashfs)
    end = 1 << 40
    with tempfile.TemporaryFile() as file:
        file.write(made)
        file.truncate(end)
        tracemalloc.start()
        assert probe(file.fileno(), end).end == len(made)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


# --- against others ---


@tool("sfdisk")
@pytest.mark.parametrize("seed", range(30))
def test_tables_by_sfdisk_are_read_as_sfdisk_reads_them(squashfs: bytes, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(rng.randint(3, 9) << 20)
    script = ["label: gpt", f"table-length: {rng.choice([4, 128, 256])}", f"grain: {rng.choice([512, 4096])}"]
    types = [str(one) for one in (GENERIC, VERITY, X86, ARM)]
    for number in rng.sample(range(1, 5), rng.randint(1, 4)):
        name = "".join(rng.choices("aä_ 1~.€𐍈", k=rng.randint(0, 20)))
        type = ROOT if number == 1 else rng.choice(types)
        script.append(f'{number} : size={rng.randint(1, 900)}, type={type}, name="{name}", attrs="GUID:60"')
    run = ["sfdisk", "--quiet", path]
    subprocess.run(run, input="\n".join(script).encode() + b"\n", check=True)
    said = json.loads(subprocess.run(["sfdisk", "--json", path], capture_output=True, check=True).stdout)
    content = path.read_bytes()
    with path.open("rb") as file:
        table = read(file.fileno(), content[: 1 << 16], len(content))
    assert table.end == len(content)
    assert [
        (one.number, one.start // 512, one.size // 512, one.type, one.id, one.label)
        for one in table.partitions
    ] == [
        (
            int(row["node"].removeprefix(str(path))),
            row["start"],
            row["size"],
            uuid.UUID(row["type"]),
            uuid.UUID(row["uuid"]),
            row.get("name", ""),
        )
        for row in sorted(said["partitiontable"]["partitions"], key=lambda row: str(row["node"]))
    ]


_numbers = st.one_of(st.integers(0, 200), st.sampled_from([HUGE, 1 << 63, 1 << 32, (1 << 54) - 1]))


@st.composite
def _disks(draw: st.DrawFn) -> bytes:
    parts = tuple(
        Part(
            draw(st.binary(max_size=64)),
            draw(st.sampled_from([ROOT, VERITY, SIGNATURE, USR, GENERIC, ARM])),
            draw(st.sampled_from(["", "a", "_empty", "\ud800"])),
            draw(st.sampled_from([0, NO_AUTO, HUGE])),
            draw(st.one_of(st.just(-1), _numbers)),
            draw(st.one_of(st.just(-1), _numbers)),
        )
        for _ in range(draw(st.integers(0, 4)))
    )
    fields = st.dictionaries(st.sampled_from([24, 32, 40, 48, 72]), _numbers.map(le64), max_size=2)
    small = st.dictionaries(st.sampled_from([12, 16, 80, 84, 88]), st.integers(0, 600).map(le32), max_size=1)
    made = Disk(
        tuple(replace(part, start=min(part.start, HUGE), end=min(part.end, HUGE)) for part in parts),
        draw(st.sampled_from([512, 4096])),
        draw(st.sampled_from([4, 128])),
        draw(st.booleans()),
        draw(fields) | draw(small),
        draw(fields) | draw(small),
    )
    return build(made)


@given(_disks(), st.integers(0, 1 << 17))
def test_whatever_a_disk_claims_there_is_a_verdict(content: bytes, size: int) -> None:
    for cut in (content, content[:size]):
        if not cut:
            continue
        try:
            found = probed(cut)
        except Refused as refused:
            assert str(refused).isprintable()
        else:
            assert 0 < found.offset < found.offset + found.size < found.end <= len(cut)
