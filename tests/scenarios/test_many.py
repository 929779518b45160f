# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many services at once: what that takes of the machine is so much for each, and no more."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from bench import filesystem
from bench.idle import _wait_until_quiet
from bench.rig import Image, drop, rig, service
from support import CHECKOUT
from support.images import program
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mkfs.ext4"), tool("mksquashfs"), tool("setpriv")]

SERVICES = 100
EACH = 8
"""Descriptors for each service while all of them get an image: two when it is quiet."""
APART = 250
"""And for all of them together."""
MOST = 10_000
"""Services on one host."""


def drops() -> None:
    """Prints how many descriptors the daemon had at most, and has at the end."""
    filesystem.SIZE = 128 << 20
    with rig() as place, contextlib.ExitStack() as stack:
        image, directory = Image(place.where, "squashfs", 128 << 10), place.directory("all")
        names = (f"{number}.service" for number in range(SERVICES))
        made = (service(name, place.runtime_directory, directory.parent) for name in names)
        services = [stack.enter_context(one) for one in made]
        daemon = stack.enter_context(place.daemon())
        with most_descriptors(daemon.pid) as most:
            for number in (1, 2):
                drop(image.version(number), directory)
                for one in services:
                    one.handled()
        _wait_until_quiet(daemon)
        print(most[0], descriptors(daemon.pid))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def most_descriptors(pid: int) -> Iterator[list[int]]:
    """In the block: the largest number that a process was seen to have."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], descriptors(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def test_the_unit_has_descriptors_for_ten_thousand_services_that_get_an_image_at_once() -> None:
    done = subprocess.run(program("scenarios.test_many", "drops"), check=True, capture_output=True, text=True)
    most, left = map(int, done.stdout.split())
    assert left <= 3 * SERVICES + APART, done.stderr
    assert SERVICES < most <= EACH * SERVICES + APART, done.stderr
    unit = (Path(CHECKOUT) / "units/confext-watcher.service.in").read_text()
    limit = re.search(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    assert limit and int(limit[1]) >= EACH * MOST + APART
