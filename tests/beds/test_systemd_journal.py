# SPDX-License-Identifier: LGPL-2.1-or-later
"""What somebody finds in the journal of a real host: each outcome explained, also beside a dead service's own lines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import WEB, drop, run
from support import needs
from watcher.records.journal import MESSAGE_IDS

pytestmark = [needs.bed, needs.tool("mksquashfs")]

TALKS = """[Service]
ExecStart=/bin/sh -c 'echo a line of its own; exec sleep infinity'
ExecReload=/bin/sh -c '! grep -q bad /etc/web.conf'
[X-Confext]
SettleSec=0
"""
PLAIN, STAYS = "plain.service", "stays.service"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def test_every_outcome_is_in_the_catalog_and_explained_beside_its_line(host: Host) -> None:
    for identity in MESSAGE_IDS.values():
        entry = host.bed.run(["journalctl", "--dump-catalog", identity]).stdout
        assert "Subject: " in entry and "Defined-By: confext-watcher" in entry
    host.unit(STAYS, TALKS + "Rollback=no\n")
    host.unit(PLAIN, SLEEP, takes_part=False)
    journal = run(host, TALKS, {"web.conf": "one"})
    host.systemctl("start", PLAIN, STAYS)
    expected = {}

    def explained(unit: str, outcome: str, subject: str) -> None:
        entry = journal.until(
            lambda entry: (entry.get("CONFEXT_SERVICE"), entry.get("CONFEXT_OUTCOME")) == (unit, outcome)
        )
        expected[entry["MESSAGE"]] = (unit, f"Subject: {subject.format(unit)}")

    drop(host, 2, {"web.conf": "two"})
    explained(WEB, "applied", "A new configuration is in place for {}")
    whole = host.image("site_3", {"web.conf": "three", "noise": os.urandom(20_000).hex()})
    versions = host.confext_dir(WEB) / "site.raw.v"
    (versions / "site_3.raw").write_bytes(whole.read_bytes()[:-4096])
    explained(WEB, "incomplete", "A configuration extension for {} is not complete")
    (versions / "site_3.raw").write_text("no image")
    explained(WEB, "refused", "A configuration extension was refused for {}")
    drop(host, 4, {"web.conf": "bad"})
    explained(WEB, "rolled-back", "A new configuration for {} was taken back")
    drop(host, 1, {"web.conf": "bad"}, STAYS)
    explained(STAYS, "failed", "A new configuration for {} did not work out")
    host.confext_dir(PLAIN).mkdir()
    drop(host, 1, {"web.conf": "one"}, PLAIN)
    explained(PLAIN, "needs-restart", "{} must be restarted once")
    for message, (unit, subject) in expected.items():
        said = host.bed.journal(f"--unit={unit}", "--catalog")
        after = said.partition(message)[2]
        assert after.lstrip("\n ░-").startswith(subject), after[:500]
        assert "@CONFEXT" not in said


def test_a_dead_services_journal_has_our_lines_between_its_own(host: Host) -> None:
    journal = run(host, TALKS, {"web.conf": "one"})
    host.systemctl("stop", WEB)
    drop(host, 2, {"web.conf": "two"})
    entry = journal.applied(WEB)
    assert "it is not running, its next start gets it" in entry["MESSAGE"]
    lines = host.bed.journal(f"--unit={WEB}", "--output=cat").splitlines()
    own, stopped, ours = (
        max(number for number, line in enumerate(lines) if line.startswith(begin))
        for begin in ("a line of its own", "Stopped", entry["MESSAGE"])
    )
    assert own < stopped < ours
