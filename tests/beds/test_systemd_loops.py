# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices are given back, however many swaps and restarts there were: a machine may have eight."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed, loops_over
from beds.host import SECONDS, SLEEP, Host
from beds.site import WEB
from support import disks, needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

SWAPS, EACH, NODES = 200, 10, 8


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def loops(host: Host) -> int:
    return len(loops_over(host.bed.root))


def test_as_many_after_two_hundred_swaps_as_after_the_first(host: Host) -> None:
    images = [host.image(f"site_{number}", {"web.conf": str(number)}) for number in range(3)]
    # One is a disk image: its loop device is over a part of the file.
    images[2].write_bytes(disks.disk(images[2].read_bytes()))
    host.unit(WEB, f"{SLEEP}[X-Confext]\nReload=none\nSettleSec=0\n")
    host.watch()
    host.systemctl("start", WEB)
    journal = host.journal()
    versions = host.confext_dir(WEB) / "site.raw.v"
    versions.mkdir()
    first = most = 0
    for number in range(1, SWAPS + 2):
        coming = versions / ".coming"
        shutil.copyfile(images[number % 3], coming)
        coming.rename(versions / f"site_{number}.raw")
        journal.applied(WEB)
        if number == 1:
            first = loops(host)
        if number % EACH == 0:
            host.systemctl("restart", WEB)
            journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
            most = max(most, loops(host))
    assert first > 0 and most <= NODES
    assert host.see(WEB, "/etc/web.conf") == str((SWAPS + 1) % 3)
    deadline = time.monotonic() + SECONDS
    while (now := loops(host)) != first:  # the daemon gives back what it needs no more when it is idle
        assert time.monotonic() < deadline, (first, most, now)
        time.sleep(0.1)
