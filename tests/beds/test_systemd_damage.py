# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd mounts what the slots lead to: a damaged copy is found before that, or by the start that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, Host
from beds.site import WEB, drop, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def damage(host: Host) -> Path:
    """Of the copy that the unit's slot leads to."""
    digest = os.path.basename(site.kept(host).strip())
    copy = host.bed.path(f"{site.STATE}/store/{digest}")
    with copy.open("r+b") as file:
        file.write(bytes(16))
    return copy


def test_a_unit_starts_on_a_copy_that_was_damaged_while_the_watcher_was_away(host: Host) -> None:
    run(host, UNIT, {"web.conf": "good"})
    host.systemctl("stop", WEB, "confext-watcher")
    damage(host)
    journal = host.journal()
    host.systemctl("start", WEB)  # which wants the watcher, and is ordered after it
    sees(host, "good")
    assert "used any more" in journal.until(lambda entry: "is damaged" in entry["MESSAGE"])["MESSAGE"]


def test_a_unit_starts_on_the_stack_before_where_the_dropped_file_is_damaged_too(host: Host) -> None:
    journal = run(host, UNIT, {"web.conf": "good"})
    dropped = drop(host, 2, {"web.conf": "better"})
    journal.applied(WEB)
    host.systemctl("stop", WEB, "confext-watcher")
    damage(host)
    os.truncate(dropped, 1000)
    dropped.with_name("site_1.raw").unlink()
    host.systemctl("start", WEB)
    sees(host, "good")
    journal.until(lambda entry: "site 1 is used instead" in entry["MESSAGE"])


def test_a_unit_that_fails_by_its_slot_finds_it_mended_and_is_not_blamed(host: Host) -> None:
    journal = run(host, UNIT, {"web.conf": "good"})
    drop(host, 2, {"web.conf": "better"})
    journal.applied(WEB)
    # Else the watcher may find it before systemd does.
    host.systemctl("kill", "--signal=STOP", "confext-watcher")
    host.systemctl("stop", WEB)
    damage(host)
    failed = host.bed.run(["systemctl", "start", WEB], check=False)
    host.systemctl("kill", "--signal=CONT", "confext-watcher")
    assert failed.returncode != 0
    again = f"until systemctl start {WEB}; do sleep 0.2; systemctl reset-failed {WEB}; done"
    host.bed.run(["sh", "-c", again], timeout=SECONDS)
    sees(host, "better")
    assert not [entry for entry in journal.said() if entry.get("CONFEXT_OUTCOME") == "rolled-back"]
