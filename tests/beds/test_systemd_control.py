# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line and the Varlink interface, asked about units on real systemd."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, UNITS, Host
from beds.site import WEB, drop, kept, run, sees
from support import needs
from support.from_report import from_report

pytestmark = [needs.bed, needs.tool("mksquashfs")]

# What is dropped waits until somebody asks for a look.
PATIENT = """[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'grep -q bad /etc/web.conf || exit 0; sleep 1; exit 1'
[X-Confext]
SettleSec=1h
"""
SOCKET = "/run/confext-watcher/io.confext.Watcher"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def told(host: Host, *words: str, status: int = 0) -> Any:
    """What a command says as JSON."""
    done = host.bed.run(["confext-watcher", *words, "--json"], check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)


def only(host: Host, unit: str = WEB) -> Any:
    (service,) = told(host, "status", unit)["services"]
    return service


def versions(layers: list[dict[str, str]]) -> list[str]:
    return [layer["version"] for layer in layers]


def call(host: Host, method: str, parameters: dict[str, Any], *, user: int = 0) -> tuple[int, str]:
    who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
    words = [
        "varlinkctl",
        "call",
        "--json=short",
        SOCKET,
        f"io.confext.Watcher.{method}",
        json.dumps(parameters),
    ]
    done = host.bed.run([*who, *words], check=False)
    return done.returncode, done.stdout + done.stderr


def test_plan_says_what_a_look_would_change_and_status_what_there_is(host: Host) -> None:
    conf = host.bed.path("/etc/confext-watcher/watcher.conf.d/patient.conf")
    conf.parent.mkdir(parents=True, exist_ok=True)
    conf.write_text("[Watcher]\nSettleMaxSec=1h\n")
    host.stack.callback(conf.unlink)
    host.unit("plain.service", SLEEP, takes_part=False)
    journal = run(host, PATIENT, {"web.conf": "one"})
    drop(host, 2, {"web.conf": "two"})
    (change,) = told(host, "plan", WEB)["changes"]
    assert (versions(change["layers"]), versions(change["wantedLayers"])) == (["1"], ["2"])
    now = only(host)
    assert (now["state"], now["pid"], versions(now["layers"])) == ("running", host.main_pid(WEB), ["1"])
    assert now["stack"] == now["accepted"] == change["stack"] and host.see(WEB, "/etc/web.conf") == "one"
    host.systemctl("restart", "confext-watcher")
    journal.applied(WEB)
    now = only(host)
    assert (now["stack"], now["last"]["outcome"]) == (change["wanted"], "applied")
    assert told(host, "plan", WEB)["changes"][0]["changes"] is False

    host.systemctl("stop", WEB)
    assert (only(host)["state"], only(host)["accepted"]) == ("stopped", change["wanted"])
    host.systemctl("start", WEB)
    host.systemctl("start", "plain.service")
    host.confext_dir("plain.service").mkdir()
    host.systemctl("restart", "confext-watcher")
    assert only(host, "plain.service")["state"] == "running"  # a restart would bring nothing
    drop(host, 1, {"web.conf": "one"}, "plain.service")
    journal.until(lambda entry: "plain.service" in entry["MESSAGE"] and "restart it once" in entry["MESSAGE"])
    assert only(host, "plain.service")["state"] == "needs-restart"
    # All of that is known without the daemon too.
    services = told(host, "status")
    host.systemctl("stop", "confext-watcher")
    assert [one for one in told(host, "status")["services"] if one["service"] == WEB] == [
        one for one in services["services"] if one["service"] == WEB
    ]
    assert host.bed.run(["confext-watcher", "plan"], check=False).returncode == 3


def test_a_report_with_a_name_that_is_not_utf8_gets_through_varlinkctl(host: Host) -> None:
    run(host, PATIENT, {"web.conf": "one"})
    odd = os.fsdecode(b"\xff.raw")
    host.drop(host.image("site_2", {"web.conf": "two"}), WEB, odd)
    status, said = call(host, "Plan", {"service": WEB, "debug": True})
    assert status == 0, said
    facts, _ = from_report(json.loads(said)["changes"][0]["report"])
    assert f"{UNITS}/{WEB}.confext.d/{odd}" in [entry.path for entry in facts.entries]
    assert facts.running and facts.explained


def test_back_by_hand_stays_until_it_is_undone(host: Host) -> None:
    journal = run(host, PATIENT.replace("1h", "0"), {"web.conf": "one"})
    first = kept(host)
    drop(host, 2, {"web.conf": "two"})
    assert told(host, "wait", WEB, "site_2.raw", "--timeout=20")["outcome"] == "applied"
    drop(host, 3, {"web.conf": "bad"})
    assert told(host, "wait", WEB, "site_3.raw", "--timeout=20", status=1)["outcome"] == "rolled-back"
    assert told(host, "rollback", WEB)["outcome"] == "applied"
    assert (host.see(WEB, "/etc/web.conf"), kept(host)) == ("one", first)
    pinned = only(host)
    assert pinned["pinned"] == pinned["stack"] and len(pinned["quarantined"]) == 1
    drop(host, 4, {"web.conf": "four"})
    host.systemctl("restart", "confext-watcher", WEB)
    sees(host, "one")
    assert kept(host) == first
    (forgotten,) = told(host, "rollback", WEB, "--forget")["forgotten"]
    assert forgotten["source"] == f"{UNITS}/{WEB}.confext.d/site.raw.v/site_3.raw"
    assert told(host, "wait", WEB, "site_4.raw", "--timeout=20")["outcome"] == "applied"
    sees(host, "four")
    assert only(host)["pinned"] is None
    journal.until(lambda entry: "-> 4 applied" in entry["MESSAGE"])
    events = [event["outcome"] for event in told(host, "history", WEB)["events"]]
    asked = ["applied", "requested"]
    assert events == [*asked, *asked, "rolled-back", "applied", "applied"]


def test_varlinkctl_may_ask_as_anybody_and_change_as_root(host: Host) -> None:
    journal = run(host, PATIENT.replace("1h", "0"), {"web.conf": "one"})
    drop(host, 2, {"web.conf": "two"})
    journal.applied(WEB)
    described = host.bed.run(["varlinkctl", "introspect", SOCKET, "io.confext.Watcher"]).stdout
    assert "method Rollback(" in described.replace(" (", "(")
    for user in (0, 65534):
        status, said = call(host, "Status", {"service": WEB}, user=user)
        assert (status, json.loads(said)["services"][0]["state"]) == (0, "running")
        for method in ("Plan", "History"):
            status, said = call(host, method, {"service": WEB}, user=user)
            assert status == 0, said
    status, said = call(host, "Plan", {"service": WEB, "debug": True}, user=65534)
    assert (status, json.loads(said)["changes"][0]["report"]) == (0, None)
    status, said = call(host, "Plan", {"debug": True})
    assert status != 0 and '"parameter":"service"' in said
    slot = kept(host)
    for method in ("Rollback", "Forget"):
        status, said = call(host, method, {"service": WEB}, user=65534)
        assert status != 0 and "NotPermitted" in said
    status, said = call(host, "Reload", {}, user=65534)
    assert status != 0 and "NotPermitted" in said
    assert (kept(host), host.see(WEB, "/etc/web.conf"), only(host)["pinned"]) == (slot, "two", None)
    status, said = call(host, "Rollback", {"service": WEB})
    assert (status, json.loads(said)["event"]["outcome"]) == (0, "applied")
    assert (kept(host) != slot, host.see(WEB, "/etc/web.conf")) == (True, "one")
    status, said = call(host, "Rollback", {"service": "nobody.service"})
    assert status != 0 and "ServiceNotFound" in said
