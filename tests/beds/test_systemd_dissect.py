# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which partition of a disk image is the root: systemd-dissect of each systemd is asked about hundreds of odd ones."""

from __future__ import annotations

import json
import random
import shutil
import struct
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beds.bed import Bed
from support import needs
from support.disks import GENERIC, NO_AUTO, READ_ONLY, ROOT, SIGNATURE, SIGNED, USR, VERITY, Disk, Part, build
from support.images import confext, image
from watcher.images.formats import disk, gpt, partition_types
from watcher.images.formats.base import HEAD
from watcher.images.formats.probe import probe
from watcher.model import Refused
from watcher.settings import architectures

pytestmark = [
    needs.bed,
    needs.tool("mksquashfs"),
    pytest.mark.skipif(architectures.native() != "x86-64", reason="the images are made for x86-64"),
]

COUNT = 300
SCRATCH = "/var/tmp/dissect"
FOREIGN = [partition_types.root(name) for name in ("arm64", "riscv64", "x86")]
TYPES = [*[ROOT] * 6, *FOREIGN, VERITY, VERITY, SIGNATURE, USR, GENERIC]
LABELS = ["", "a", "root_1", "root_2", "root_10", "root~1", "_empty", "_", "ä", "root-1.2"]
ON_PURPOSE = (
    "usr partition", "is called _empty", "broken disk image", "of another size", "overlap", "entries of",
    "lies about its size", "incomplete: ", "ambiguous", "without the verity data",
)  # fmt: skip
"""What the watcher refuses although a version of systemd, or both, would mount it."""


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    top = tmp_path_factory.mktemp("squashfs")
    return image(confext(top / "tree", "web"), top / "web.raw").read_bytes()


def odd(rng: random.Random, content: bytes) -> Disk:
    """A disk image; three in four have a table that is right."""
    parts = []
    for number in range(1, rng.randint(1, 3) + 1):
        type = rng.choice(TYPES)
        flags = rng.choice([0, 0, 0, 0, NO_AUTO, READ_ONLY, 1])
        inside = {VERITY: bytes(512), SIGNATURE: rng.choice([SIGNED, SIGNED, b"{}", b""])}.get(type, content)
        parts.append(Part(inside, type, rng.choice(LABELS), flags, id=uuid.UUID(int=number)))
    made = Disk(tuple(parts), rng.choice([512, 512, 4096, 1024, 2048]), rng.choice([128, 128, 4, 256]))
    match rng.randrange(12):
        case 0:
            value = struct.pack("<Q", rng.choice([0, 1, 2, 40, 90, 1 << 40, (1 << 64) - 1]))
            return replace(made, header={rng.choice([24, 32, 40, 48, 72]): value})
        case 1:
            return replace(made, backup={rng.choice([0, 24, 32, 48, 56, 72]): bytes(8)})
        case 2:
            start = rng.choice([3, 79, 81, 1 << 33])
            far = Part(type=rng.choice(TYPES), label="far", start=start, end=start + rng.randint(-1, 9))
            return replace(made, parts=(*made.parts, replace(far, id=uuid.UUID(int=99))))
    return made


def ours(content: bytes) -> tuple[str, str]:
    """The UUID of the root partition, or "" and why it is refused."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            probe(file.fileno(), len(content))
        except Refused as refused:
            # Which one is the root is asked here, not whether what protects it is right.
            if "its verity data has no superblock" not in str(refused):
                return "", str(refused)
        table = gpt.read(file.fileno(), content[:HEAD], len(content))
        return str(disk.root(table, "x86-64").partition.id), ""


def theirs(answer: str) -> str:
    """The UUID of the partition that systemd mounts as root by its type; "" if there is none."""
    if not answer.startswith("{"):
        return ""
    found: dict[str, Any] = json.loads(answer)
    roots = [one for one in found["mounts"] or () if one["designator"] == "root" and one["architecture"]]
    return str(roots[0]["partition_uuid"]) if roots else ""


@pytest.fixture
def scratch(bed: Bed) -> Iterator[Path]:
    bed.run(["mkdir", SCRATCH])
    yield bed.path(SCRATCH)
    shutil.rmtree(bed.path(SCRATCH))


@pytest.mark.limit(600)
def test_the_root_is_the_one_that_systemd_takes_or_there_is_a_reason(
    bed: Bed, scratch: Path, squashfs: bytes
) -> None:
    rng = random.Random(1)
    disks = [build(odd(rng, squashfs)) for _ in range(COUNT)]
    for number, content in enumerate(disks):
        (scratch / f"{number}.raw").write_bytes(content)
    ask = (
        f"cd {SCRATCH}; for n in $(seq 0 {COUNT - 1}); do"
        " systemd-dissect --json=short --no-pager $n.raw 2>&1 | tail -n 1; done"
    )
    answers = bed.run(["sh", "-c", ask], timeout=500).stdout.splitlines()
    assert len(answers) == COUNT
    seen: Counter[str] = Counter()
    wrong = []
    for number, (content, answer) in enumerate(zip(disks, answers, strict=True)):
        root, reason = ours(content)
        wanted = theirs(answer)
        if root == wanted:
            seen["same" if root else "refused by both"] += 1
        elif not root and any(words in reason for words in ON_PURPOSE):
            seen["refused by us alone"] += 1
        else:
            wrong.append((number, root, reason, wanted, answer[-300:]))
    assert wrong == []
    # The questions are of all kinds.
    assert min(seen["same"], seen["refused by both"], seen["refused by us alone"]) > COUNT // 20, seen
