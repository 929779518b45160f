# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics (control/metrics.py), asked for by systemd's own readers; before systemd 260 there is nothing to ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import WEB, drop, run
from support import needs
from watcher.control.metrics import DESCRIPTION, DIRECTORY, FAMILIES

pytestmark = [needs.bed, needs.tool("mksquashfs")]

SOCKET = f"{DIRECTORY}/io.confext.Watcher"
PREFIX = "io.confext.Watcher."


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def asked(host: Host, method: str, *, user: int = 0) -> list[dict[str, Any]]:
    who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
    call = ["varlinkctl", "--more", "--json=short", "call", SOCKET, f"io.systemd.Metrics.{method}", "{}"]
    return [json.loads(line) for line in host.bed.run([*who, *call]).stdout.replace("\x1e", "").splitlines()]


def values(rows: list[dict[str, Any]], family: str) -> list[Any]:
    return [row["value"] for row in rows if row["name"] == f"{PREFIX}{family}"]


def test_systemd_reads_them_and_drops_none(host: Host) -> None:
    journal = run(host, f"{SLEEP}[X-Confext]\nReload=none\nSettleSec=0\n", {"web.conf": "one"})
    if host.bed.version != "262":
        assert not host.bed.path(DIRECTORY).exists()
        return
    drop(host, "2", {"web.conf": "two"})
    journal.until(lambda entry: entry.get("CONFEXT_VERSION") == "2" and entry["CONFEXT_OUTCOME"] == "applied")
    for user in (0, 65534):
        rows = asked(host, "List", user=user)
        assert values(rows, "ServicesByState")[0] >= 1
        assert {"name": f"{PREFIX}ServiceState", "value": "running", "object": WEB} in rows
        (last,) = (
            row["value"]
            for row in rows
            if row["name"] == f"{PREFIX}LatencyUSecLast" and row["fields"] == {"of": "drop-to-reload"}
        )
        assert 0 < last < 60_000_000
        assert values(rows, "StoreCopies")[0] >= 2
    described = asked(host, "Describe")
    assert [one["name"] for one in described] == [family.name for family in FAMILIES]
    introspected = host.bed.run(["varlinkctl", "introspect", SOCKET, "io.systemd.Metrics"]).stdout
    assert "method List" in introspected and "method Describe" in introspected
    assert "value: object" in DESCRIPTION and "value: object" in introspected
    host.systemctl("stop", "confext-watcher")
    assert not host.bed.path(SOCKET).exists()
