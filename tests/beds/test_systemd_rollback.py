# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way back on real systemd: after a restart (`Reload=restart`), where it fails too, and over a reboot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host, Journal
from beds.site import WEB, drop, kept, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

RESTARTED = """[Service]
ExecStart=/bin/sh -c '! grep -q bad /etc/web.conf && exec sleep infinity'
[X-Confext]
Reload=restart
SettleSec=0
"""
# Takes a reload on what is bad so ill that it cannot even be started any more.
RUINED = """[Unit]
StartLimitIntervalSec=0
[Service]
ExecStartPre=/bin/sh -c 'echo >>/run/starts; ! test -e /run/ruined'
ExecStart=/bin/sh -c 'trap "! grep -q bad /etc/web.conf || { touch /run/ruined; exit 1; }" HUP;\
    while :; do sleep 0.05; done'
[X-Confext]
Reload=signal:HUP
SettleSec=0
"""

# Reads its configuration a while after its start, so that systemd is starting it when the watcher looks.
RETRIED = """[Unit]
StartLimitBurst=5
StartLimitIntervalSec=1h
[Service]
ExecStart=/bin/sh -c 'grep -q bad /etc/web.conf && { sleep 0.05; exit 1; }; exec sleep infinity'
Restart=on-failure
RestartSec=%s
[X-Confext]
Reload=restart
SettleSec=0
"""


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def looked(host: Host, journal: Journal) -> None:
    """Something that is no image makes for a round, and is what that says last."""
    host.confext_dir(WEB).joinpath("site.raw.v/site_9.raw").write_text("no image")
    assert "site_9.raw" in journal.outcome(WEB, "refused")["MESSAGE"]


def test_a_service_that_reloads_by_a_restart_is_started_again_on_what_it_starts_with(host: Host) -> None:
    journal = run(host, RESTARTED, {"web.conf": "good"})
    pid, slot = host.main_pid(WEB), kept(host)
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert "site 2 taken out again" in entry["MESSAGE"]
    sees(host, "good")
    assert (host.bed.property(WEB, "ActiveState"), kept(host)) == ("active", slot)
    looked(host, journal)
    drop(host, 3, {"web.conf": "fine"})
    assert "site 1 -> 3" in journal.applied(WEB)["MESSAGE"]
    sees(host, "fine")
    assert host.main_pid(WEB) != pid


@pytest.mark.parametrize("delay", ["0", "100ms", "1s"])
@pytest.mark.parametrize("prepares", ["", "ExecStartPre=/bin/sleep 0.05\n"])
def test_one_that_systemd_starts_again_by_itself_is_up_again_on_the_stack_before(
    host: Host, delay: str, prepares: str
) -> None:
    """Its start limit must not take it down for good, once the good stack is back."""
    journal = run(host, (RETRIED % delay).replace("Restart=", prepares + "Restart=", 1), {"web.conf": "good"})
    slot = kept(host)
    for version in range(2, 5):
        host.systemctl("reset-failed", WEB)
        drop(host, version, {"web.conf": f"bad {version}"})
        entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
        assert "failed too" not in entry["MESSAGE"] and "it is not running" not in entry["MESSAGE"]
        sees(host, "good")
        assert (host.bed.property(WEB, "ActiveState"), kept(host)) == ("active", slot)


def test_where_the_way_back_fails_too_it_is_said_once_and_not_tried_again(host: Host) -> None:
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/starts", "/run/ruined"])
    journal = run(host, RUINED, {"web.conf": "good"})
    slot = kept(host)
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert "but that failed too" in entry["MESSAGE"] and "it is not tried again" in entry["MESSAGE"]
    assert (entry["PRIORITY"], kept(host)) == ("2", slot)
    starts = host.bed.path("/run/starts").read_text()
    assert starts.count("\n") == 2  # by hand, and by the way back
    looked(host, journal)
    assert host.bed.path("/run/starts").read_text() == starts
    assert host.bed.property(WEB, "ActiveState") == "failed"
    # Whoever mends it finds the good stack.
    host.bed.path("/run/ruined").unlink()
    host.systemctl("start", WEB)
    sees(host, "good")


def test_what_was_bad_stays_out_after_a_reboot(new_bed: Callable[[str], Bed]) -> None:
    # In one of its own: the other tests have more in theirs than outlives a reboot.
    with site.host(new_bed("257")) as host:
        journal = run(host, RESTARTED, {"web.conf": "good"})
        slot = kept(host)
        drop(host, 2, {"web.conf": "bad"})
        journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
        host.systemctl("enable", "confext-watcher")
        host.systemctl("add-wants", "multi-user.target", WEB)
        host.bed.reboot()
        host.systemctl("is-active", WEB, "confext-watcher")
        sees(host, "good")
        assert kept(host) == slot
        journal = host.journal()
        drop(host, 3, {"web.conf": "fine"})
        assert "site 1 -> 3" in journal.applied(WEB)["MESSAGE"]
