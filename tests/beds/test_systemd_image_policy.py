# SPDX-License-Identifier: LGPL-2.1-or-later
"""`ExtensionImagePolicy=` of a unit on real systemd: what would fail its start does not get in (226/NAMESPACE)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host
from beds.site import WEB, drop, kept, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
REFUSED = "it is unprotected, and ExtensionImagePolicy=root=signed ({}/web.service.d/policy.conf:2) asks for signed: "


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def policy(host: Host, text: str) -> None:
    """As `systemctl edit` does it."""
    path = host.bed.path(f"{UNITS}/web.service.d/policy.conf")
    path.parent.mkdir(exist_ok=True, parents=True)
    path.with_name("coming").write_text(f"[Service]\nExtensionImagePolicy={text}\n")
    path.with_name("coming").rename(path)
    host.systemctl("daemon-reload")


def start_fails(host: Host) -> bool:
    host.bed.run(["systemctl", "restart", WEB], check=False)
    status = host.bed.run(["systemctl", "show", "--property=ExecMainStatus", WEB]).stdout
    host.bed.run(["systemctl", "reset-failed", WEB], check=False)
    return status.strip() == "ExecMainStatus=226"


def test_an_image_that_would_fail_the_start_is_refused_before_and_gets_in_once_it_may(host: Host) -> None:
    host.unit(WEB, UNIT)
    policy(host, "root=signed")
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "1"})
    entry = journal.outcome(WEB, "refused")
    assert REFUSED.format(UNITS) in entry["MESSAGE"]
    assert kept(host) == ""
    host.systemctl("start", WEB)  # it does, with the host's /etc
    policy(host, "root=signed+unprotected")
    journal.until(lambda entry: "site 1 added, applied" in entry["MESSAGE"])
    sees(host, "1")
    host.systemctl("restart", WEB)
    sees(host, "1")


def test_a_stricter_policy_takes_nothing_away_and_that_the_next_start_would_fail_is_said(host: Host) -> None:
    journal = run(host, UNIT, {"web.conf": "1"})
    policy(host, "root=signed")
    stays = "stays, but would not get in now, and systemd will not start the unit on it: it is unprotected"
    journal.until(lambda entry: stays in entry["MESSAGE"])
    sees(host, "1")
    for command in ("status", "plan"):
        assert stays in host.bed.run(["confext-watcher", command, "web"]).stdout
    assert start_fails(host)  # so it is
    policy(host, "root=verity+unprotected")
    host.systemctl("restart", WEB)
    sees(host, "1")


def test_words_that_only_newer_versions_know_count_all_the_same(host: Host) -> None:
    """systemd 257 passes over such a line in a drop-in: then nothing but the watcher goes by it."""
    journal = run(host, UNIT, {"web.conf": "1"})
    policy(host, "root=unprotected+erofs")
    assert start_fails(host) == (host.bed.version != "257")
    journal.until(
        lambda entry: "systemd will not start the unit on it: it is squashfs, and" in entry["MESSAGE"]
    )
    drop(host, 2, {"web.conf": "2"})
    entry = journal.outcome(WEB, "refused")
    assert "it is squashfs, and ExtensionImagePolicy=root=unprotected+erofs (" in entry["MESSAGE"]
