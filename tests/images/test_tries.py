# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counted tries are kept up in the names of the files."""

from __future__ import annotations

import os
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from support.needs import root
from watcher.images import tries
from watcher.model import Interest, Kind, Layer, Stack
from watcher.watch.watcher import Watcher


def stack(path: Path) -> Stack:
    return Stack((Layer("web.raw", "web", "1", "d" * 64, Kind.IMAGE, str(path)),))


KEYS = ("d" * 16,)


def drop(tmp_path: Path, name: str) -> Path:
    directory = tmp_path / "web.raw.v"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(name)
    return directory / name


def names(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "web.raw.v"))


def test_an_attempt_takes_one_and_a_success_removes_the_counters(tmp_path: Path) -> None:
    begun = tries.begin(stack(drop(tmp_path, "web_1+3.raw")), KEYS, "web.service")
    assert names(tmp_path) == ["web_1+2-1.raw"]
    again = tries.begin(begun, KEYS, "web.service")
    assert names(tmp_path) == ["web_1+1-2.raw"]
    done = tries.succeed(again, "web.service")
    assert (names(tmp_path), done.layers[0].source) == (["web_1.raw"], str(tmp_path / "web.raw.v/web_1.raw"))


@pytest.mark.parametrize(
    ("name", "then"), [("web_1.4+010.raw", "web_1.4+7-1.raw"), ("web_1.4+09.raw", "web_1.4+09.raw")]
)
def test_a_counter_is_the_number_that_a_pick_takes_it_for(tmp_path: Path, name: str, then: str) -> None:
    """As C reads it: octal with a zero in front."""
    tries.begin(stack(drop(tmp_path, name)), KEYS, "web.service")
    assert names(tmp_path) == [then]


def test_what_the_service_has_already_is_no_attempt(tmp_path: Path) -> None:
    tries.begin(stack(drop(tmp_path, "web_1+3.raw")), (), "web.service")
    assert names(tmp_path) == ["web_1+3.raw"]


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    drop(tmp_path, "web_1+2-1.raw")
    first = stack(drop(tmp_path, "web_1+3.raw"))
    assert tries.begin(first, KEYS, "web.service") == first
    assert {name: (tmp_path / "web.raw.v" / name).read_text() for name in names(tmp_path)} == {
        "web_1+3.raw": "web_1+3.raw",
        "web_1+2-1.raw": "web_1+2-1.raw",
    }


def test_two_services_share_the_count(tmp_path: Path) -> None:
    seen_by_both = stack(drop(tmp_path, "web_1+3.raw"))
    one = tries.begin(seen_by_both, KEYS, "one.service")
    with pytest.raises(FileNotFoundError):  # look again, and find what the other has made of it
        tries.begin(seen_by_both, KEYS, "two.service")
    tries.begin(one, KEYS, "two.service")
    assert names(tmp_path) == ["web_1+1-2.raw"]
    tries.succeed(one, "one.service")
    assert names(tmp_path) == ["web_1.raw"]
    tries.succeed(one, "two.service")
    assert names(tmp_path) == ["web_1.raw"]


def test_a_plus_in_a_name_that_has_no_counters_is_left_alone(tmp_path: Path) -> None:
    assert tries.counted("/x/web.service.confext.d/c+3.raw") is None


async def test_a_rename_of_our_own_is_told_to_others_only(tmp_path: Path) -> None:
    counted = stack(drop(tmp_path, "web_1+3.raw"))
    interest = Interest(str(tmp_path / "web.raw.v"), pattern=r"web_.*\.raw")
    told: list[frozenset[str]] = []
    with Watcher() as watcher:
        watcher.set("own", [interest])
        watcher.set("other", [interest])
        tries.begin(counted, KEYS, "own", lambda old, new: watcher.renaming("own", old, new))
        with trio.fail_after(10):
            async with aclosing(watcher.changes()) as changes:
                async for keys in changes:
                    told.append(keys)
                    if "own" in keys:
                        break
                    drop(tmp_path, "web_2.raw")
    assert told[0] == {"other"} and "own" in told[-1]


@root
@pytest.mark.parametrize("what", ["begin", "succeed"])
def test_a_stranger_has_nothing_renamed_elsewhere(tmp_path: Path, what: str) -> None:
    """Between the look and the rename he sends the way to another directory, where there is a file of the name."""
    drop(tmp_path, "web_1+3.raw")
    (tmp_path / "his").mkdir()
    (tmp_path / "his/web.raw.v").symlink_to(tmp_path / "web.raw.v")
    os.lchown(tmp_path / "his/web.raw.v", 65534, 65534)
    layers = stack(tmp_path / "his/web.raw.v/web_1+3.raw")
    if what == "begin":
        assert tries.begin(layers, KEYS, "web.service") == layers
    else:
        assert tries.succeed(layers, "web.service") == layers
    assert names(tmp_path) == ["web_1+3.raw"]
