# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: how often a file was opened and then closed, whatever else happens to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.mounts import fanotify
from watcher.mounts.fanotify import Place
from watcher.watch.turns import Turns


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Turns]:
    made = Turns()
    made.begin()
    made.watch(str(tmp_path))
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        return fanotify.name_to_handle_at(fd), "a"
    finally:
        os.close(fd)


def test_one_after_the_other_and_at_once(turns: Turns, tmp_path: Path, place: Place) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    file.write_text("x")
    turns.read_before()
    assert turns.count(place) == 2 and turns.has_just_ended(place)
    turns.read_after()
    for _ in range(2):  # one read more than it has to be does not count
        turns.read_before()
        turns.read_after()
    assert turns.count(place) == 0
    with file.open("w"), file.open("w"):
        pass
    turns.read_before()
    assert turns.count(place) == 1
    with file.open("w"):
        turns.read_after()
        assert turns.count(place) == 1 and not turns.has_just_ended(place)


def test_a_close_while_it_is_read_makes_no_end_less_certain(
    turns: Turns, tmp_path: Path, place: Place
) -> None:
    """Both have it open, one ends, and the other one ends between the two reads."""
    file = tmp_path / "a"
    with file.open("w"):
        file.write_text("x")
        turns.read_before()
        assert turns.has_just_ended(place)
    turns.read_after()
    assert turns.has_just_ended(place) and turns.count(place) == 1


def test_what_came_after_the_last_read_counts_in_this_one(turns: Turns, tmp_path: Path, place: Place) -> None:
    turns.read_before()
    (tmp_path / "a").write_text("x")
    turns.read_after()
    turns.read_before()
    assert turns.count(place) == 1


def test_the_same_name_elsewhere_is_another_file(turns: Turns, tmp_path: Path, place: Place) -> None:
    other = tmp_path / "other"
    other.mkdir()
    turns.watch(str(other))
    (other / "a").write_text("x")
    turns.read_before()
    assert turns.count(place) == 0 and not turns.has_just_ended(place)


def test_where_events_were_lost_nothing_is_known(tmp_path: Path, place: Place) -> None:
    turns = Turns()
    turns.begin()
    turns.watch(str(tmp_path))
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(most + 1):
        os.close(os.open(tmp_path / f"{number % 2}", os.O_WRONLY | os.O_CREAT, 0o644))
    (tmp_path / "a").write_text("x")
    turns.read_before()
    assert turns.count(place) == 0 and not turns.has_just_ended(place)
    turns.close()
    Turns().close()
