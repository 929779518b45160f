# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree that is larger than any copy of it may be is watched no further than it is looked at, and costs no more.

Its owner is a stranger, who makes directories by steps (`mkdirat`), so that no path limits how deep they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.told import Told
from watcher.model import DEPTH_MAX, Interest, Scope
from watcher.watch import follow_links, watched_trees
from watcher.watch.watcher import Watcher

STEP = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def dig(top: Path, levels: int) -> None:
    """So many directories, each in the one before."""
    fd = os.open(top, STEP)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", STEP, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def fill_in(top: Path) -> None:
    """As `rm -rf` does: from below."""
    fd = os.open(top, STEP)
    levels = 0
    while "d" in os.listdir(fd):
        inner = os.open("d", STEP, dir_fd=fd)
        os.close(fd)
        fd = inner
        levels += 1
    for _ in range(levels):
        for name in os.listdir(fd):
            os.unlink(name, dir_fd=fd)
        outer = os.open("..", STEP, dir_fd=fd)
        os.close(fd)
        os.rmdir("d", dir_fd=outer)
        fd = outer
    if "link" in os.listdir(fd):
        os.unlink("link", dir_fd=fd)
    os.close(fd)


@pytest.fixture
def pit(tmp_path: Path) -> Iterator[Path]:
    """A directory in which one may dig."""
    (tmp_path / "pit").mkdir()
    yield tmp_path / "pit"
    fill_in(tmp_path / "pit")


async def everything(told: Told) -> set[str]:
    """All that is told until everything is watched that is to be."""
    keys: set[str] = set()
    while new := await told.keys():
        keys |= new
    return keys


def nodes(watcher: Watcher) -> int:
    return sum(1 for _ in watcher._directories.root.below())


@pytest.mark.parametrize("levels", [1500, 10_000])
async def test_a_deep_tree_is_watched_as_far_as_it_is_looked_at(told: Told, pit: Path, levels: int) -> None:
    told.watch(pit, Scope.TREE)
    before = nodes(told.watcher)
    dig(pit, levels)
    assert await everything(told) == {"web"}
    assert nodes(told.watcher) - before < DEPTH_MAX
    remarks = told.watcher.remarks()
    assert [(remark.path, remark.text) for remark in remarks] == [
        (str(pit), f"watched only in part: more than {DEPTH_MAX} levels in it")
    ]
    fill_in(pit)
    assert await everything(told) == {"web"}
    assert nodes(told.watcher) == before
    assert not told.watcher.remarks()


async def test_a_tree_of_the_allowed_depth_is_watched_to_its_last_directory(told: Told, pit: Path) -> None:
    dig(pit, DEPTH_MAX - 1)
    told.watch(pit, Scope.TREE)
    await everything(told)
    assert not told.watcher.remarks()
    last = pit.joinpath(*["d"] * (DEPTH_MAX - 1))
    (last / "file").touch()
    assert await everything(told) == {"web"}
    (last / "d").mkdir()
    assert await everything(told) == {"web"}
    assert told.watcher.remarks()
    (last / "d").rmdir()
    assert await everything(told) == {"web"}
    assert not told.watcher.remarks()


async def test_a_tree_of_too_many_entries_is_watched_in_part_until_it_has_fewer(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_trees, "ENTRIES_MAX", 20)
    pit = tmp_path / "tree"
    for name in "abcd":
        (pit / name / "sub").mkdir(parents=True)
        for number in range(5):
            (pit / name / str(number)).touch()
    told.watch(pit, Scope.TREE)
    assert [remark.text for remark in told.watcher.remarks()] == [
        "watched only in part: more than 20 entries in it"
    ]
    watched = nodes(told.watcher)
    for name in "abcd":
        for number in range(5):
            (pit / name / str(number)).unlink()
        (pit / name / "gone").mkdir()
        (pit / name / "gone").rmdir()
    assert await everything(told) == {"web"}
    assert not told.watcher.remarks()
    assert nodes(told.watcher) > watched
    for name in "abcd":
        (pit / name / "sub/file").touch()
        assert await everything(told) == {"web"}


async def test_many_entries_are_counted_for_each_tree_alone(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_trees, "ENTRIES_MAX", 5)
    for top in ("one", "two"):
        for number in range(4):
            (tmp_path / top / str(number)).mkdir(parents=True)
        told.watch(tmp_path / top, Scope.TREE, key=top)
    assert not told.watcher.remarks()
    (tmp_path / "one/0/x").mkdir()
    (tmp_path / "one/1/x").mkdir()
    assert await everything(told) == {"one"}
    assert [remark.path for remark in told.watcher.remarks()] == [str(tmp_path / "one")]
    told.watcher.drop("one")
    assert not told.watcher.remarks()


@contextmanager
def most_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many were open at once, in the block."""
    before, most, real = len(os.listdir("/proc/self/fd")), [0], os.open

    def count(*args: Any, **more: Any) -> int:
        fd = real(*args, **more)
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")) - before)
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", count)
        yield most


def test_a_path_deeper_than_any_may_be_takes_no_descriptors(
    pit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each link leads a thousand directories further down."""
    dig(pit, 3000)
    fd = os.open(pit, STEP)
    for _ in range(3):
        os.symlink("d/" * 1000 + "link", "link", dir_fd=fd)
        inner = os.open("d/" * 1000, STEP, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with Watcher() as watcher, most_descriptors(monkeypatch) as most:
        watcher.set("web", [Interest(str(pit / "link"))])
        assert nodes(watcher) < follow_links.LEVELS_MAX + 20
    assert most[0] < 100
