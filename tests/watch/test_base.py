# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is noticed of a base: names, below every directory, and nothing of what is written in place."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.mounts.refresh import Changes
from watcher.watch import base as watching
from watcher.watch.base import Base, BaseWatches
from watcher.watch.watcher import new_inotify


class Watched:
    """A directory that is watched as a base."""

    def __init__(self, path: Path, fstype: str = "ext4") -> None:
        self.path = path
        self.inotify = new_inotify()
        self.watches = BaseWatches(self.inotify)
        self.base = self.of(path, fstype)

    def of(self, path: Path, fstype: str = "ext4") -> Base:
        base = Base(os.open(path, os.O_PATH), fstype)
        self.watches.add(base)
        return base

    def changes(self) -> Changes:
        return self.watches.read().get(self.base, Changes())

    def names(self) -> set[str]:
        return {path for path, _ in self.changes().paths()}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "etc/app/sub").mkdir(parents=True)
    (tmp_path / "etc/app/a.conf").write_text("1")
    made = Watched(tmp_path / "etc")
    yield made
    made.inotify.close()


def test_names_that_come_go_and_are_replaced(watched: Watched) -> None:
    etc = watched.path
    (etc / "new").write_text("1")
    (etc / "app/.a.conf.new").write_text("2")
    (etc / "app/.a.conf.new").rename(etc / "app/a.conf")
    os.link(etc / "new", etc / "app/sub/link")
    (etc / "new").unlink()
    assert watched.names() == {"new", "app/.a.conf.new", "app/a.conf", "app/sub/link"}
    assert not watched.changes()


def test_what_is_written_in_place_wakes_nobody(watched: Watched) -> None:
    with open(watched.path / "app/a.conf", "a") as file:
        file.write("more")
    os.truncate(watched.path / "app/a.conf", 1)
    assert not select.select([watched.inotify.fileno()], [], [], 0)[0]


def test_a_mode_is_told_as_such(watched: Watched) -> None:
    (watched.path / "app/a.conf").chmod(0o600)
    assert list(watched.changes().paths()) == [("app/a.conf", False)]
    (watched.path / "app/a.conf").chmod(0o644)
    (watched.path / "app/a.conf").unlink()
    assert list(watched.changes().paths()) == [("app/a.conf", True)]


def test_new_directories_are_watched_and_what_was_in_them_is_unknown(watched: Watched) -> None:
    (watched.path / "new/deep").mkdir(parents=True)
    changes = watched.changes()
    assert changes.names == {"": {"new": True}} | ({"new": {"deep": True}} if "new" in changes.names else {})
    assert changes.unknown == {"new", "new/deep"}
    (watched.path / "new/deep/file").write_text("1")
    assert watched.names() == {"new/deep/file"}


def test_a_directory_that_is_moved_is_watched_where_it_is(watched: Watched) -> None:
    (watched.path / "app").rename(watched.path / "other")
    changes = watched.changes()
    assert changes.names == {"": {"app": True, "other": True}}
    assert changes.unknown == {"other", "other/sub"}
    (watched.path / "other/sub/file").write_text("1")
    assert watched.names() == {"other/sub/file"}
    (watched.path / "other").rename(watched.path.parent / "out")
    assert watched.names() == {"other"}
    (watched.path.parent / "out/sub/more").write_text("1")
    assert not watched.changes()
    assert list(watched.base.watches) == [""]


def test_a_directory_that_is_replaced(watched: Watched) -> None:
    shutil.copytree(watched.path / "app", watched.path / "app.new")
    (watched.path / "app").rename(watched.path / "app.old")
    (watched.path / "app.new").rename(watched.path / "app")
    shutil.rmtree(watched.path / "app.old")
    watched.changes()
    assert sorted(watched.base.watches) == ["", "app", "app/sub"]
    (watched.path / "app/sub/file").write_text("1")
    assert watched.names() == {"app/sub/file"}


def test_bases_that_lie_in_each_other_share_their_watches(watched: Watched) -> None:
    inner = watched.of(watched.path / "app")
    (watched.path / "app/sub/file").write_text("1")
    told = {base: [path for path, _ in changes.paths()] for base, changes in watched.watches.read().items()}
    assert told == {watched.base: ["app/sub/file"], inner: ["sub/file"]}
    watched.watches.remove(watched.base)
    (watched.path / "app/sub/more").write_text("1")
    assert set(watched.watches.read()) == {inner}
    watched.watches.remove(inner)
    (watched.path / "app/sub/last").write_text("1")
    assert not watched.watches.read()


def test_a_directory_comes_and_goes_ten_times_and_nothing_is_left(watched: Watched) -> None:
    for _ in range(10):
        (watched.path / "new/deep").mkdir(parents=True)
        watched.changes()
        shutil.rmtree(watched.path / "new")
        watched.changes()
    assert sorted(watched.base.watches) == ["", "app", "app/sub"]


def test_after_an_overflow_all_may_have_changed(watched: Watched) -> None:
    queue_max = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(queue_max // 2 + 1):
        path = watched.path / f"{number}"
        path.touch()
        path.unlink()
    (watched.path / "unseen").mkdir()
    assert watched.changes().anything
    watched.changes()
    (watched.path / "unseen/file").write_text("1")
    assert watched.names() == {"unseen/file"}


def test_no_watch_left(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watches = BaseWatches(watched.inotify)
    watches._limit = 2
    base = Base(os.open(watched.path, os.O_PATH), "ext4")
    watches.add(base)
    assert base.gap == 28
    watches._limit = 10
    watches.add(base)
    assert base.gap == 0
    assert sorted(base.watches) == ["", "app", "app/sub"]


def test_a_base_with_too_many_directories(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may make any number in a root of its own."""
    monkeypatch.setattr(watching, "DIRECTORIES_MAX", 5)
    for number in range(5):
        (watched.path / f"{number}").mkdir()
    changes = watched.changes()
    assert set(changes.names[""]) == {"0", "1", "2", "3", "4"}
    assert len(watched.base.watches) == 5
    assert "more than 5 directories" in str(watching.gap_remark(watching.reason(watched.base.gap)))
    watched.watches.add(watched.base)
    assert watched.base.gap, "it is not looked for anew each time"


@pytest.mark.parametrize("fstype", ["nfs4", "fuse.sshfs", "overlay"])
def test_a_file_system_that_tells_of_no_change_has_a_gap(
    tmp_path: Path, fstype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching.os, "stat", lambda path: os.lstat("/proc"))
    made = Watched(tmp_path, fstype)
    assert made.base.gap and not made.base.watches
    made.inotify.close()


def test_what_nobody_can_write_to_needs_no_watch(tmp_path: Path) -> None:
    made = Watched(tmp_path, "squashfs")
    assert not made.base.gap and not made.base.watches
    made.inotify.close()
