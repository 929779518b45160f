# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is measured on goes with the bench, whatever that dies of."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from bench import filesystem, floor
from bench.rig import rig, service
from support.images import program
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mkfs.ext4"), tool("setpriv")]

SECONDS = 20.0
"""How long the kernel may take to bring it all down."""


def measure() -> None:
    """Never ends; prints what exists then, as paths."""
    filesystem.SIZE = 16 << 20
    with rig() as place:
        directory = place.directory("web")
        with (
            place.daemon() as daemon,
            service("one.service", place.runtime_directory, directory.parent) as one,
            service("two.service", None, directory.parent, program=("sleep", "infinity")) as two,
            floor.reader(directory) as reader,
        ):
            number = os.minor(os.stat(place.where).st_dev)
            pids = (daemon.pid, one.pid, two.pid, reader)
            print(f"/sys/block/loop{number}/loop", *(f"/proc/{pid}" for pid in pids), flush=True)
            signal.pause()


def test_nothing_is_left_of_a_bench_that_is_killed() -> None:
    with subprocess.Popen(program("bench.test_rig", "measure"), stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        made = [Path(path) for path in killed.stdout.readline().split()]
        there = [path.exists() for path in made]
        killed.kill()
    assert there == [True] * 5
    deadline = time.monotonic() + SECONDS
    while (left := [path for path in made if path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.02)  # nothing announces the end of a loop device
    assert left == []
