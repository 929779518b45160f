# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as drift; with real services: scenarios/test_drift.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.model import Kind, Layer, Stack
from watcher.records.state import Accepted, Covers, Drifted, State
from watcher.rounds import drift

BY = {"a": "web 1.4", "b": "site 2"}
STACK = Stack((Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, ""),))


def accepted(covers: Covers | None = None, when: int = 5) -> State:
    return State(accepted=Accepted(STACK, when=when), covers=covers)


def test_what_the_host_has_is_noted_first_and_that_is_no_drift() -> None:
    state = drift.noted(accepted(), {"a": "1"}, BY)
    assert state.covers == Covers(5, {"a": "1"})
    assert state.drifted == ()
    assert drift.noted(state, {"a": "1"}, BY) is state  # nothing to write


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({"a": "2"}, [("a", "web 1.4", "changed", "2")]),
        ({}, [("a", "web 1.4", "went", "")]),
        ({"a": "1", "b": "1"}, [("b", "site 2", "came", "1")]),
        ({"a": "2", "b": "1"}, [("a", "web 1.4", "changed", "2"), ("b", "site 2", "came", "1")]),
        ({"a": "1", "c": "1"}, []),
    ],
)
def test_a_file_that_changes_comes_or_goes_below_one_of_an_image(
    now: dict[str, str], found: list[tuple[str, ...]]
) -> None:
    before = drift.noted(accepted(), {"a": "1"}, BY)
    after = drift.noted(before, now, BY)
    assert list(after.drifted) == [Drifted(*one) for one in found]
    if after.covers is not None:
        assert drift.unsaid(before, after.covers) == after.drifted
        assert drift.unsaid(after, after.covers) == ()  # once
    back = drift.noted(after, {"a": "1"}, BY)
    assert back.drifted == ()


def test_each_further_change_is_said() -> None:
    one = drift.noted(accepted(Covers(5, {"a": "1"})), {"a": "2"}, BY)
    two = drift.noted(one, {"a": "3"}, BY)
    assert two.covers is not None
    assert [found.now for found in drift.unsaid(one, two.covers)] == ["3"]


def test_it_is_over_with_the_next_stack() -> None:
    old = drift.noted(accepted(Covers(5, {"a": "1"})), {"a": "2"}, BY)
    assert old.drifted
    newer = accepted(old.covers, when=6)
    assert newer.drifted == ()
    assert drift.noted(newer, {"a": "2"}, BY).covers == Covers(6, {"a": "2"})
    assert drift.noted(newer, {}, {}).covers is None  # a stack without files


def test_the_log_names_a_few_files_and_the_command() -> None:
    many = [Drifted(f"f\n{number}", "web 1.4", "changed") for number in range(5)]
    said = drift.sentence("web.service", many)
    assert "\n" not in said
    assert "/etc/f\\n0 changed (web 1.4 covers it)" in said.replace("\\x0a", "\\n")
    assert "and 2 more" in said and "confext-watcher diff web.service --from none" in said


# The files


@pytest.fixture
def etc(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_only_contents_count(tmp_path: Path, etc: int) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    known: dict[tuple[int, ...], str] = {}
    first = drift.content(etc, "file", known)
    os.utime(file, (1, 1))
    file.chmod(0o600)
    assert drift.content(etc, "file", known) == first
    file.unlink()
    file.write_text("one")
    assert drift.content(etc, "file", known) == first
    file.write_text("two")
    assert drift.content(etc, "file", known) != first
    file.unlink()
    assert drift.content(etc, "file", known) == ""


def test_other_kinds_are_told_apart_and_none_is_waited_for(tmp_path: Path, etc: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    (tmp_path / "other").symlink_to("fifo")
    (tmp_path / "file").touch()
    with (tmp_path / "large").open("wb") as large:
        large.truncate(drift.BYTES_MAX + 1)
    kinds = [drift.content(etc, name, {}) for name in ("fifo", "dir", "link", "other", "file", "large")]
    assert len(set(kinds)) == 6 and all(kinds)
    assert drift.content(etc, "link/below", {}) == ""  # an overlay does not join what a link leads to


def test_the_files_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etc: int) -> None:
    for name in ("web.conf", "nginx/nginx.conf", "nginx/d/a", "extension-release.d/extension-release.web"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "link").symlink_to("web.conf")
    assert sorted(drift.files_of(etc)) == ["link", "nginx/d/a", "nginx/nginx.conf", "web.conf"]
    monkeypatch.setattr(drift, "FILES_MAX", 2)
    assert len(list(drift.files_of(etc))) == 2
