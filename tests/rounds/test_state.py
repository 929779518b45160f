# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notes about a service that outlive a kill: a try that was counted is not counted again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from watcher.images import tries
from watcher.model import Kind, Layer, Stack
from watcher.resolve.trust import ROOT_ALONE
from watcher.rounds.state import CountedTries

WEB = "web.service"


class Killed(BaseException):
    """As if the process ended here."""


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    directory = tmp_path / "web.raw.v"
    directory.mkdir()
    (directory / "web_1+3.raw").touch()
    return directory


def begin(versions: Path, renaming: tries.Renaming = tries.unseen) -> str:
    """One attempt by a new process; what the file is called then."""
    (name,) = os.listdir(versions)
    found = Stack((Layer("web.raw", "web", "1", "d" * 64, Kind.IMAGE, str(versions / name)),))
    CountedTries(str(versions.parent)).begin(WEB, found, Stack(), renaming, ROOT_ALONE)
    return os.listdir(versions)[0]


@contextmanager
def before(old: str, new: str) -> Iterator[None]:
    raise Killed
    yield


@contextmanager
def after(old: str, new: str) -> Iterator[None]:
    yield
    raise Killed


def test_a_try_that_was_not_made_is_counted_once(versions: Path) -> None:
    assert begin(versions) == "web_1+2-1.raw"
    assert begin(versions) == "web_1+2-1.raw"
    CountedTries(str(versions.parent)).end(WEB)
    assert begin(versions) == "web_1+1-2.raw"


@pytest.mark.parametrize("when", [before, after])
def test_a_kill_at_the_rename_costs_no_try_and_saves_none(versions: Path, when: tries.Renaming) -> None:
    with pytest.raises(Killed):
        begin(versions, when)
    assert begin(versions) == "web_1+2-1.raw"


def test_the_try_of_another_service_does_not_count_for_this_one(versions: Path) -> None:
    @contextmanager
    def renamed(old: str, new: str) -> Iterator[None]:
        os.rename(old, new)
        yield

    with pytest.raises(FileNotFoundError):
        begin(versions, renamed)
    assert begin(versions) == "web_1+1-2.raw"


def test_a_file_that_is_dropped_anew_begins_anew(versions: Path) -> None:
    begin(versions)
    (versions / "web_1+2-1.raw").rename(versions / "web_1+3.raw")
    assert begin(versions) == "web_1+2-1.raw"


def test_what_cannot_be_counted_is_tried_to_be_counted_once(
    versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def refuse(old: str, new: str) -> None:
        said.append(new)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("watcher.mounts.syscalls.rename_noreplace", refuse)
    for _ in range(2):
        assert begin(versions) == "web_1+3.raw"
    assert len(said) == 1
