# SPDX-License-Identifier: LGPL-2.1-or-later
"""`[X-Confext]` of a unit on real systemd: what stands in the files counts, whether systemd has loaded it or not; and
what `status` says of units that do not just run on their stack."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, UNITS, Host
from beds.site import WEB, drop, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

PLAIN = "[Service]\nExecStart=/bin/sleep infinity\n[X-Confext]\nSettleSec=0\nReload=none\n"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def setting(host: Host, lines: str, name: str = "web.service.d/check.conf", place: str = UNITS) -> None:
    """Write a drop-in of a unit, as `systemctl edit` does; no daemon-reload."""
    path = host.bed.path(f"{place}/{name}")
    path.parent.mkdir(exist_ok=True, parents=True)
    path.with_name("coming").write_text(f"[X-Confext]\n{lines}\n")
    path.with_name("coming").rename(path)


def test_what_stands_in_the_files_counts_for_the_next_drop_without_a_daemon_reload(host: Host) -> None:
    journal = run(host, PLAIN, {"web.conf": "1"})
    setting(host, "Check=/bin/false")
    drop(host, 2, {"web.conf": "2"})
    assert "check '/bin/false' failed" in journal.outcome(WEB, "refused")["MESSAGE"]
    status = host.bed.run(["confext-watcher", "status", "web"]).stdout
    assert f"  Check=/bin/false  ({UNITS}/web.service.d/check.conf:2)" in status
    # Also one that was there before, for all services, and in the unit file.
    setting(host, "")
    drop(host, 3, {"web.conf": "3"})
    # What the check had refused is tried again, and may be the first of the two.
    journal.until(lambda entry: "-> 3 applied" in entry["MESSAGE"])
    host.stack.callback(host.bed.run, ["rm", "-rf", "/run/systemd/system/service.d"])
    setting(host, "Check=/bin/sh -c 'exit 4'", "service.d/all.conf", "/run/systemd/system")
    drop(host, 4, {"web.conf": "4"})
    assert "status 4" in journal.outcome(WEB, "refused")["MESSAGE"]
    os.unlink(host.bed.path("/run/systemd/system/service.d/all.conf"))
    unit = host.bed.path(f"{UNITS}/{WEB}")
    unit.write_text(f"{unit.read_text()}Check=/bin/sh -c 'exit 5'\n")
    drop(host, 5, {"web.conf": "5"})
    assert "status 5" in journal.outcome(WEB, "refused")["MESSAGE"]
    setting(host, "Enabled=no")
    drop(host, 6, {"web.conf": "6"})
    gone = "until confext-watcher status | grep -q 'no service takes part'; do sleep 0.1; done"
    host.bed.run(["sh", "-c", gone], timeout=SECONDS)
    sees(host, "3")
    setting(host, "Enabled=yes")
    assert "status 5" in journal.outcome(WEB, "refused")["MESSAGE"]


def test_a_unit_file_that_is_a_link_is_watched_where_it_leads_to(host: Host) -> None:
    journal = run(host, PLAIN, {"web.conf": "1"})
    unit, elsewhere = host.bed.path(f"{UNITS}/{WEB}"), host.bed.path("/srv/web.service")
    host.stack.callback(host.bed.run, ["rm", "-f", "/srv/web.service"])
    unit.rename(elsewhere)
    unit.symlink_to("/srv/web.service")
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    elsewhere.write_text(f"{PLAIN}Check=/bin/false\n")
    drop(host, 3, {"web.conf": "3"})
    journal.outcome(WEB, "refused")


def test_what_a_check_refused_is_tried_again_when_the_check_or_the_hosts_files_change(host: Host) -> None:
    host.stack.callback(host.bed.run, ["rm", "-f", "/etc/dns-up"])
    journal = run(host, PLAIN, {"web.conf": "1"})
    setting(host, "Check=/usr/bin/test -e /etc/dns-up")
    drop(host, 2, {"web.conf": "2"})
    assert "check '/usr/bin/test -e /etc/dns-up' failed" in journal.outcome(WEB, "refused")["MESSAGE"]
    host.bed.path("/etc/other-file").touch()
    host.stack.callback(host.bed.run, ["rm", "-f", "/etc/other-file"])
    host.bed.path("/etc/dns-up").touch()
    assert "site 1 -> 2" in journal.applied(WEB)["MESSAGE"]  # and nothing was said in between
    # A check that was wrong, and is corrected.
    setting(host, "Check=/bin/false")
    drop(host, 3, {"web.conf": "3"})
    journal.outcome(WEB, "refused")
    setting(host, "Check=/bin/true")
    assert "site 2 -> 3" in journal.applied(WEB)["MESSAGE"]


def last(host: Host, unit: str) -> tuple[str, str]:
    """What `status` says of its state and its last outcome."""
    (found,) = json.loads(host.bed.run(["confext-watcher", "status", "--json", unit]).stdout)["services"]
    return found["state"], found["last"]["message"]


def test_needs_restart_goes_away_with_the_restart(host: Host) -> None:
    host.unit(WEB, takes_part=False)
    host.watch()
    host.systemctl("start", WEB)
    journal = host.journal()
    host.confext_dir(WEB).mkdir()
    drop(host, 1, {"web.conf": "1"})
    journal.outcome(WEB, "needs-restart")
    assert last(host, WEB)[0] == "needs-restart"
    host.systemctl("restart", WEB)
    journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
    state, said = last(host, WEB)
    assert state == "running" and "site 1 added, accepted; it" in said


def test_a_template_is_not_a_stopped_service(host: Host) -> None:
    host.unit("web@.service")
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "1"}, "web@.service")
    assert "a template, its next instance gets it" in journal.applied("web@.service")["MESSAGE"]
    assert last(host, "web@")[0] == "template"
