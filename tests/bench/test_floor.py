# SPDX-License-Identifier: LGPL-2.1-or-later
"""The floor is one to the end of the measurement, or there is none."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bench import filesystem, floor
from bench.report import Failed
from bench.rig import Image, drop, rig, service, stamp
from support.images import program
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mkfs.ext4"), tool("mksquashfs")]


def test_a_floor_that_ends_while_it_is_measured_is_none(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="the floor, have ended"), floor.reader(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def twice() -> None:
    """What is late sees only the second of two files at both events; then there is a third."""
    filesystem.SIZE = 64 << 20
    with rig() as place:
        image, directory, store = (
            Image(place.where, "squashfs"),
            place.directory("bare"),
            place.where / "store",
        )
        store.mkdir()
        with (
            service("bare.service", None, directory.parent) as target,
            floor.loop(directory, store, "squashfs", [target.pid]) as pid,
        ):
            os.kill(pid, signal.SIGSTOP)
            drop(image.version(1), directory)
            drop(b"", directory, ".ignored")  # without it, the two events are one to inotify
            drop(image.version(2), directory)
            os.kill(pid, signal.SIGCONT)
            seen = [target.handled()[1]]
            drop(image.version(3), directory)
            seen.append(target.handled()[1])
            print(seen == [stamp(2), stamp(3)])


def test_the_bare_loop_outlives_being_late() -> None:
    done = subprocess.run(program("bench.test_floor", "twice"), check=True, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
