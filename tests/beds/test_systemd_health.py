# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said of a reload is true: one that never ends, one that tells nobody, one that the service answers badly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

# Answers a reload only on what is good.
SILENT = """[Service]
Type=notify-reload
NotifyAccess=all
ExecStart=/bin/sh -c 'trap "grep -q bad /etc/web.conf || {{ \\
    systemd-notify --reloading; systemd-notify --ready; }}" HUP; systemd-notify --ready; \\
    while :; do sleep 0.05; done'
TimeoutStartSec={timeout}
[X-Confext]
ReloadSec=2s
SettleSec=0
"""
HANGS = """[Service]
ExecReload=/bin/sh -c 'grep -q bad /etc/web.conf && sleep 1000; true'
ExecStart=/bin/sleep 1000
TimeoutStartSec={timeout}
[X-Confext]
ReloadSec=2s
SettleSec=0
"""


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


@pytest.mark.parametrize("timeout", ["1s", "7s", "infinity"])
@pytest.mark.parametrize("unit", [SILENT, HANGS], ids=["notify-reload", "command"])
def test_a_reload_that_never_ends_is_undone_and_holds_up_nothing(host: Host, unit: str, timeout: str) -> None:
    journal = run(host, unit.format(timeout=timeout), {"web.conf": "good"})
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert ("reload timed out" if timeout == "1s" else "reload did not end within 2 s") in entry["MESSAGE"]
    assert entry["CONFEXT_VERDICT"] == "reload-failed"
    sees(host, "good")
    drop(host, 3, {"web.conf": "fine"})
    sees(host, "fine")
    if timeout != "infinity":
        # systemd lets nobody reload it before it has given up the reload before.
        assert "site 1 -> 3" in journal.until(lambda entry: entry.get("CONFEXT_OUTCOME"))["MESSAGE"]
    assert host.bed.property(WEB, "ActiveState") in ("active", "reloading")
