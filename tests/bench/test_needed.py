# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least that Python needs keeps what we promise, or it is no measure: needed.py, needed_start.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import filesystem, idle, needed
from bench.report import Failed
from bench.rig import Image, drop, rig, service, stamp
from support.images import program
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mkfs.ext4"), tool("mksquashfs")]


def gifts() -> None:
    """Two drops for three services, the second while it is stopped; what each was told, and what is kept of it."""
    filesystem.SIZE = 64 << 20
    with rig() as place, contextlib.ExitStack() as stack:
        image, directory, store = (
            Image(place.where, "squashfs"),
            place.directory("some"),
            place.where / "store",
        )
        store.mkdir()
        make = (service(f"{number}.service", None, directory.parent) for number in range(3))
        services = [stack.enter_context(one) for one in make]
        pid = stack.enter_context(needed.loop(directory, store, "squashfs", [one.pid for one in services]))
        for number in (1, 2):
            os.kill(pid, signal.SIGSTOP)
            drop(image.version(number), directory)
            os.kill(pid, signal.SIGCONT)
            print(*{one.handled()[1] == stamp(number) for one in services})
        state = place.where / "store-state"
        _until(lambda: _outcomes(state) == 6)
        for link in (state / "units").iterdir():
            record = json.loads((link / ".state.json").read_text())
            digest = (link / "web.raw").resolve().name
            print(record["stack"][0]["digest"] == digest == _digests(state)[-1])


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)  # outcomes are written when all were told


def _rows(state: Path, words: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(state / "history.sqlite")) as history:
        return history.execute(f"SELECT {words} FROM history ORDER BY moment").fetchall()


def _outcomes(state: Path) -> int:
    return len(_rows(state, "moment"))


def _digests(state: Path) -> list[object]:
    return [row[0] for row in _rows(state, "outcome")]


def test_each_service_gets_each_image_and_what_is_kept_of_it_is_true() -> None:
    done = _run("gifts")
    assert done.stdout == "True\n" * 5, done.stderr


def start() -> None:
    """It is ready where services show their stacks, and not where one shows none."""
    filesystem.SIZE, idle.SERVICES = 64 << 20, 3
    with rig() as place, idle._services(place):
        with place.daemon() as daemon:
            idle._wait_until_quiet(daemon)
        with idle._least(place) as (_, seconds):
            print(seconds > 0)
        extra = service("late.service", place.runtime_directory, place.directory("all").parent)
        with extra, pytest.raises(Failed), idle._least(place):
            pass
        print(True)


def test_it_is_ready_only_when_it_has_seen_every_stack() -> None:
    done = _run("start")
    assert done.stdout == "True\nTrue\n", done.stderr


def _run(function: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program("bench.test_needed", function), check=True, capture_output=True, text=True)
