# SPDX-License-Identifier: LGPL-2.1-or-later
"""All of a tree reaches the disk, and all of it goes; nothing that it only points to."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import confext, program
from support.needs import root, tool
from watcher.records import durable


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {f"etc/d{number % 7}/{number}": b"%d" % number for number in range(60)}
    made = confext(tmp_path / "tree", "web", files)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").touch()
    (made / "etc/away").symlink_to(tmp_path / "outside")
    (made / "etc/dangling").symlink_to("nowhere")
    return made


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


class TestSync:
    def run(self, tree: Path, entries: int) -> None:
        fd = os.open(tree, os.O_RDONLY)
        before = set(os.listdir("/proc/self/fd"))
        try:
            durable.fsync_tree(fd, entries)
        finally:
            assert set(os.listdir("/proc/self/fd")) == before
            os.close(fd)

    @pytest.mark.parametrize("entries", [0, 8, 80, 10_000])
    def test_every_file_and_directory_once(
        self, tree: Path, entries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        self.run(tree, entries)
        wanted = [path.stat().st_ino for path in [tree, *tree.rglob("*")] if not path.is_symlink()]
        assert sorted(synced) == sorted(wanted)

    @pytest.mark.parametrize("entries", [0, 80])
    def test_an_error_of_the_disk_is_not_lost(
        self, tree: Path, entries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = (tree / "etc/d3/3").stat().st_ino

        def fsync(fd: int) -> None:
            if os.fstat(fd).st_ino == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output error"):
            self.run(tree, entries)

    def test_without_further_threads(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        self.run(tree, 80)


class TestRemove:
    def test_a_tree_is_gone_and_what_its_links_lead_to_stays(
        self, tree: Path, parent: int, tmp_path: Path
    ) -> None:
        (tree / "etc/d1").chmod(0o500)
        (tree / "etc/d2").chmod(0)
        durable.remove("tree", parent)
        assert not tree.exists()
        assert (tmp_path / "outside/kept").exists()

    def test_a_link_is_removed_and_not_followed(self, tree: Path, parent: int, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("outside")
        durable.remove("link", parent)
        assert (tmp_path / "outside/kept").exists()

    def test_a_file(self, tree: Path, parent: int, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        durable.remove("file", parent)
        assert not (tmp_path / "file").exists()

    def test_nothing_there_is_no_error(self, parent: int) -> None:
        durable.remove("nothing", parent)

    @root
    @tool("setpriv")
    def test_with_only_the_rights_of_an_owner(self, tree: Path, tmp_path: Path) -> None:
        """Root without CAP_DAC_OVERRIDE is an ordinary user with files of his own."""
        (tree / "etc/d1").chmod(0o500)
        (tree / "etc/d2").chmod(0)
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        subprocess.run([*command, *program("records.test_durable", "remove", tmp_path)], check=True)
        assert not tree.exists()


def remove(path: str) -> None:
    durable.remove("tree", os.open(path, os.O_RDONLY))
