# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes, hash and lease go together in one pass; where the file system can share blocks, nothing is written at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.images import program
from support.needs import filesystem, loop, root, tool
from watcher.images.files import CHUNK, copy_file, hash_file
from watcher.model import Busy
from watcher.watch.lease import Lease

SIZES = [0, 1, 4095, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 12345]


@contextmanager
def files(source: Path, target: Path) -> Iterator[tuple[int, int]]:
    with ExitStack() as stack:
        fd = os.open(source, os.O_RDONLY)
        stack.callback(os.close, fd)
        made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        stack.callback(os.close, made)
        yield fd, made


def copied(source: Path, target: Path, sync: bool = False) -> str:
    hasher = hashlib.sha256()
    with files(source, target) as (fd, made), Lease(fd) as lease:
        copy_file(fd, made, source.stat().st_size, hasher, lease, sync)
        assert not lease.held()
    return hasher.hexdigest()


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_copy_is_the_same_and_the_hash_is_its(tmp_path: Path, size: int, sync: bool) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert copied(tmp_path / "a", tmp_path / "b", sync) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "b").read_bytes() == content


@pytest.mark.parametrize("size", SIZES)
def test_hash_alone(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    hasher = hashlib.sha256()
    with (tmp_path / "a").open("rb") as file:
        hash_file(file.fileno(), size, hasher)
    assert hasher.digest() == hashlib.sha256(content).digest()


def test_a_file_that_became_shorter_is_busy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(CHUNK))
    with (
        files(tmp_path / "a", tmp_path / "b") as (fd, made),
        Lease(fd) as lease,
        pytest.raises(Busy, match="shorter"),
    ):
        copy_file(fd, made, CHUNK + 1, hashlib.sha256(), lease)


def test_a_broken_lease_ends_it_within_one_chunk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(b"x" * CHUNK * 4))
    with files(tmp_path / "a", tmp_path / "b") as (fd, made), Lease(fd) as lease:
        seen = []

        class Hasher:
            def update(self, data: bytes | memoryview, /) -> None:
                seen.append(len(data))
                with pytest.raises(
                    BlockingIOError
                ):  # a writer that does not wait breaks the lease all the same
                    os.open(tmp_path / "a", os.O_WRONLY | os.O_NONBLOCK)

        with pytest.raises(Busy, match="while it was read"):
            copy_file(fd, made, 4 * CHUNK, Hasher(), lease)
        assert seen == [CHUNK]


def shares(device: str, mountpoint: str, mkfs: str) -> None:
    """In a mount namespace of its own: two copies of a file that fits into the file system only once."""
    subprocess.run([mkfs, "-q", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", device, mountpoint], check=True)
    source = Path(mountpoint) / "a"
    with source.open("wb") as file:
        for _ in range(100):
            file.write(os.urandom(2 << 20))
    whole = os.statvfs(mountpoint)
    assert 2 * source.stat().st_size > whole.f_blocks * whole.f_frsize
    wanted = hashlib.sha256(source.read_bytes()).hexdigest()
    assert copied(source, Path(mountpoint) / "b", sync=True) == wanted
    with source.open("r+b") as file:
        file.write(b"changed")
    assert hashlib.sha256((Path(mountpoint) / "b").read_bytes()).hexdigest() == wanted
    print("shared")


@root
@loop
@tool("unshare")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("xfs", marks=[filesystem("xfs"), tool("mkfs.xfs")]),
        pytest.param("btrfs", marks=[filesystem("btrfs"), tool("mkfs.btrfs")]),
    ],
)
def test_blocks_are_shared_where_that_is_possible(tmp_path: Path, name: str) -> None:
    device, mountpoint = tmp_path / "device", tmp_path / "mnt"
    mountpoint.mkdir()
    with device.open("wb") as file:
        file.truncate(360 << 20)
    command = ["unshare", "--mount", "--propagation", "private"]
    done = subprocess.run(
        [*command, *program("images.test_files", "shares", device, mountpoint, f"mkfs.{name}")],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.stdout == b"shared\n"
