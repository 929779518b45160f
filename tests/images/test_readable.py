# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damage that an image's own account does not show is found before a service reads it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import confext, image, noise
from support.needs import loop, root, tool
from watcher.images import readable as module
from watcher.images.admission import Admission
from watcher.images.image_check import examine
from watcher.images.made_for import host
from watcher.images.readable import require_readable
from watcher.images.store import Store
from watcher.model import Candidate, Kind, Later, Refused
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers

MIB = 1 << 20
LINES = b"".join(b"%d words that can be made smaller\n" % number for number in range(100_000))
images = [
    pytest.param("squashfs", marks=tool("mksquashfs")),
    pytest.param("erofs", marks=tool("mkfs.erofs")),
]
mounting = [root, loop, pytest.mark.skipif(not may_mount(), reason="needs root of the machine")]


def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return confext(tmp_path / "web", "web", {"etc/web.conf": b"x\n", "etc/web.d/large": LINES})


@pytest.fixture
def tree(source: Path) -> Iterator[int]:
    yield from opened(source)


def damaged(source: Path, path: Path, fstype: str, *options: str) -> Path:
    """An image with 3000 zeroed bytes in the middle of what its largest file is compressed to."""
    image(source, path, fstype, *options)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(3000))
    return path


def admitted(store: Store, path: Path) -> object:
    with MountWorkers() as workers, store.using():
        wanted = Candidate(str(path), path.name, "web", "", Kind.IMAGE)
        return Admission(store, workers).admit(wanted, host(), set(), None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


class TestAnImage:
    pytestmark = mounting

    @pytest.mark.parametrize("fstype", images)
    def test_that_is_whole(self, store: Store, source: Path, tmp_path: Path, fstype: str) -> None:
        assert admitted(store, image(source, tmp_path / "web.raw", fstype, *packed(fstype)))

    @pytest.mark.parametrize("fstype", images)
    def test_with_zeros_in_the_middle(self, store: Store, source: Path, tmp_path: Path, fstype: str) -> None:
        path = damaged(source, tmp_path / "web.raw", fstype, *packed(fstype))
        words = r"^broken: etc/web.d/large in it cannot be read: "
        with pytest.raises(Refused, match=words):
            admitted(store, path)
        with pytest.raises(Refused, match=words):
            examine(str(path), host(), 64 * MIB)

    @tool("mksquashfs")
    def test_that_unpacks_to_more_than_is_allowed(self, store: Store, source: Path, tmp_path: Path) -> None:
        with (source / "etc/zeros").open("w") as file:
            file.truncate(33 * MIB)
        path = image(source, tmp_path / "web.raw")
        assert path.stat().st_size < MIB
        with pytest.raises(Refused, match=r"^too large: its files have more than 33554432 bytes.*ImageMax="):
            admitted(store, path)

    @tool("mksquashfs")
    def test_that_a_sandbox_does_not_let_us_read_at_a_low_priority(
        self, store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (source / "etc/large").write_bytes(noise(9 * MIB))

        def forbidden(which: int, who: int, priority: int) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "setpriority", forbidden)
        assert admitted(store, image(source, tmp_path / "web.raw"))

    @tool("mksquashfs")
    def test_without_a_thread_it_is_later(
        self, store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name == "confext-read":
                raise RuntimeError("can't start new thread")
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        assert admitted(store, image(source, tmp_path / "web.raw")), "a few bytes need none"
        (source / "etc/large").write_bytes(noise(9 * MIB))
        with pytest.raises(Later, match=r"^too many threads: no thread can be started$"):
            admitted(store, image(source, tmp_path / "web.raw"))

    @tool("mksquashfs")
    def test_is_read_once(
        self, store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read, sendfile = [], os.sendfile
        monkeypatch.setattr(os, "sendfile", lambda *args: (read.append(args[1]), sendfile(*args))[1])
        path = image(source, tmp_path / "web.raw")
        with MountWorkers() as workers, store.using():
            admission = Admission(store, workers)
            wanted = Candidate(str(path), path.name, "web", "", Kind.IMAGE)
            threads = [
                threading.Thread(target=admission.admit, args=(wanted, host(), set(), None))
                for _ in range(20)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(read) == len([one for one in (source / "etc").rglob("*") if one.is_file()])

    @tool("mksquashfs")
    def test_that_was_built_twice_into_one_file(self, store: Store, source: Path, tmp_path: Path) -> None:
        path = image(source, tmp_path / "web.raw")
        (source / "etc/web.conf").write_text("new\n")
        subprocess.run(
            ["mksquashfs", source, path, "-quiet", "-no-progress"], check=True, capture_output=True
        )
        for look in (lambda: admitted(store, path), lambda: examine(str(path), host(), 64 * MIB)):
            with pytest.raises(Refused, match=r"^it has etc_1/ beside etc/: .* build it with -noappend$"):
                look()


def packed(fstype: str) -> tuple[str, ...]:
    """Options with which it is compressed."""
    return ("-zlz4hc",) if fstype == "erofs" else ()


def test_only_the_thread_that_reads_much_has_a_low_priority(
    source: Path, tree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, sendfile = [], os.sendfile

    def noted(*args: int) -> int:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        return sendfile(*args)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(os, "sendfile", noted)
    require_readable(tree, 64 * MIB)
    assert set(found) == {before}
    monkeypatch.setattr(module, "_AT_ONCE", len(LINES) - 1)
    require_readable(tree, 64 * MIB)
    assert found[-1] == max(module._NICE, before)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_only_etc_is_read_and_a_file_with_two_names_once(source: Path, tree: int) -> None:
    os.link(source / "etc/web.d/large", source / "etc/again")
    (source / "usr").mkdir()
    (source / "usr/large").write_bytes(LINES)
    require_readable(tree, len(LINES) + 1000)
    (source / "etc/copy").write_bytes(LINES)
    with pytest.raises(Refused, match="too large"):
        require_readable(tree, len(LINES) + 1000)


def test_a_file_that_ends_early(tree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    with pytest.raises(Refused, match="cannot be read: Input/output error"):
        require_readable(tree, MIB)
