# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that goes down on its stack, that was down before, and that is done."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from support import needs
from watcher.rounds.facts import AFTERGLOW_USEC

pytestmark = [needs.bed, needs.tool("mksquashfs")]

WEB = "web.service"
DIES = """[Service]
ExecStart=/bin/sh -c 'trap "! grep -q bad /etc/web.conf || exit 1" HUP; while :; do sleep 0.05; done'
"""
SETTINGS = "[X-Confext]\nReload=signal:SIGHUP\nHealthWatchSec=1s\n"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


@pytest.mark.parametrize("restart", ["", "Restart=always\nRestartSec=200ms\n"])
def test_is_not_sent_down_again_by_the_next_try(host: Host, restart: str) -> None:
    host.unit(WEB, DIES + restart + SETTINGS)
    host.drop(host.image("site_1", {"web.conf": "good"}), WEB, "site.raw.v/site_1.raw")
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    journal.until(lambda entry: "started well" in entry["MESSAGE"])
    bad = host.image("site_2", {"web.conf": "bad"})
    host.drop(bad, WEB, "site.raw.v/site_2+3.raw")
    journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    versions = host.confext_dir(WEB) / "site.raw.v"
    names = sorted(path.name for path in versions.iterdir())
    tries = [name for name in names if "+" in name]
    # Where systemd starts it again on the new stack before anybody can judge, that start fails nothing, and counts.
    assert tries in (["site_2+2-1.raw"], ["site_2+1-2.raw"])
    # A later drop is applied; until then there was no other try.
    host.drop(host.image("base_1", {"base.conf": "base"}), WEB, "base.raw")
    journal.until(
        lambda entry: entry.get("CONFEXT_IMAGE") == "base" and entry["CONFEXT_OUTCOME"] == "applied"
    )
    assert sorted(path.name for path in versions.iterdir()) == names
    assert host.see(WEB, "/etc/web.conf") == "good"
    # Somebody starts it anew: the next try, with the start or by a reload just after.
    host.systemctl("restart", WEB)
    journal.until(
        lambda entry: "1 -> 2, accepted" in entry["MESSAGE"] or entry.get("CONFEXT_OUTCOME") == "rolled-back"
    )
    assert sorted(path.name for path in versions.iterdir()) != names


def test_one_that_was_down_before_is_judged_by_its_next_start(host: Host) -> None:
    start = "/bin/sh -c 'sleep 0.2; ! grep -q bad /etc/web.conf && exec sleep 1000'"
    host.unit(WEB, f"[Service]\nExecStart={start}\n[X-Confext]\nHealthWatchSec=1s\n")
    host.drop(host.image("site_1", {"web.conf": "good"}), WEB, "site.raw.v/site_1.raw")
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    journal.until(lambda entry: "started well" in entry["MESSAGE"])
    time.sleep(AFTERGLOW_USEC / 1e6)  # else the kill would be put down to what was judged just now
    host.systemctl("kill", "--signal=KILL", WEB)
    host.bed.run(["sh", "-c", f"until systemctl is-failed {WEB}; do sleep 0.02; done"])
    host.drop(host.image("site_2", {"web.conf": "bad"}), WEB, "site.raw.v/site_2.raw")
    journal.until(lambda entry: "1 -> 2, accepted; it is not running" in entry["MESSAGE"])
    host.systemctl("start", WEB)
    assert "site 2 taken out again" in journal.outcome(WEB, "rolled-back")["MESSAGE"]
    host.bed.run(["sh", "-c", f"until systemctl is-active {WEB}; do sleep 0.02; done"])
    assert host.see(WEB, "/etc/web.conf") == "good"


def test_one_that_is_done_each_time_has_nothing_against_it(host: Host) -> None:
    run = "/bin/sh -c 'cat /etc/web.conf >/run/web.saw; sleep 0.3'"
    host.unit(WEB, f"[Service]\nType=oneshot\nExecStart={run}\n")
    host.drop(host.image("site_1", {"web.conf": "one"}), WEB, "site.raw.v/site_1.raw")
    host.watch()
    journal = host.journal()
    for _ in range(4):
        host.systemctl("start", WEB)
    host.drop(host.image("site_2", {"web.conf": "two"}), WEB, "site.raw.v/site_2.raw")
    journal.until(lambda entry: "1 -> 2, accepted" in entry["MESSAGE"])
    host.systemctl("start", WEB)
    assert host.bed.run(["cat", "/run/web.saw"]).stdout == "two"
    assert "rolled-back" not in [entry.get("CONFEXT_OUTCOME") for entry in journal.seen]
