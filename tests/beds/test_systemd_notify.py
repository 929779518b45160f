# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Notify=` on systemd (managers/systemd/aside.py): a command in a unit of its own, or a template unit."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import drop, run
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

WEB = """[Service]
Type=exec
ExecStart=/bin/sleep infinity
[X-Confext]
Reload=none
SettleSec=0
Check=/bin/grep -qv bad /etc/web.conf
{notify}
"""
# What the watcher's own unit may not: the network, and a user's file.
COMMAND = "Notify=/bin/sh -c 'cat >/root/told.new; ip -br link | wc -l >/root/links; mv /root/told.new /root/told-%N'"
ALERT = """[Service]
Type=oneshot
User=nobody
StandardInput=file:/run/confext-watcher/notify/%i.json
StandardOutput=file:/root/told-web
ExecStart=/bin/cat
"""
LEFT = (
    "(ls -A /run/confext-watcher/notify 2>/dev/null;"
    " systemctl list-units --all --plain --no-legend 'confext-watcher-check-*')"
)


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def told(host: Host) -> dict[str, object]:
    host.bed.run(["sh", "-c", "until test -s /root/told-web; do sleep 0.05; done"])
    event: dict[str, object] = json.loads(host.bed.run(["cat", "/root/told-web"]).stdout)
    return event


@pytest.mark.parametrize("notify", [COMMAND, "Notify=alert@.service"], ids=["command", "unit"])
def test_who_is_to_know_is_told_what_was_refused(host: Host, notify: str) -> None:
    host.bed.path("/etc/systemd/system/alert@.service").write_text(ALERT)
    host.stack.callback(host.bed.run, ["rm", "-f", "/root/told-web", "/root/links"])
    run(host, WEB.format(notify=notify), {"web.conf": "good"})
    drop(host, 2, {"web.conf": "bad"})
    event = told(host)
    assert (event["service"], event["outcome"]) == ("web.service", "refused")
    assert "the service was not touched" in str(event["message"])
    if notify == COMMAND:
        ours = host.bed.run(["sh", "-c", "ip -br link | wc -l"]).stdout
        assert host.bed.run(["cat", "/root/links"]).stdout == ours
    # Nothing is left, neither of what was read nor of a unit.
    host.bed.run(["sh", "-c", f"while {LEFT} | grep -q .; do sleep 0.05; done"])


def test_a_unit_that_fails_is_a_line_in_the_services_journal(host: Host) -> None:
    host.bed.path("/etc/systemd/system/alert@.service").write_text(ALERT.replace("/bin/cat", "/bin/false"))
    journal = run(host, WEB.format(notify="Notify=alert@.service"), {"web.conf": "good"})
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: "nobody was told that it was refused" in entry["MESSAGE"])
    assert "Notify=alert@.service could not be started as alert@" in entry["MESSAGE"]
