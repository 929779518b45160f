# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said of a reload is true: one that never ends, one that tells nobody, one that the service answers badly."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop, run, sees
from support import needs
from watcher.rounds.facts import AFTERGLOW_USEC

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


NGINX = """[Service]
Type=forking
PIDFile=/run/web.pid
ExecStartPre=/usr/sbin/nginx -t -c /etc/web.conf
ExecStart=/usr/sbin/nginx -c /etc/web.conf
ExecReload={reload}
[X-Confext]
{settings}
SettleSec=0
"""
BY_KILL, BY_COMMAND = "/bin/kill -HUP $MAINPID", "/usr/sbin/nginx -c /etc/web.conf -s reload"


def nginx(listen: str) -> dict[str, str]:
    """The configuration of an nginx that says what it listens to."""
    config = f"""pid /run/web.pid; worker_processes 1;
    error_log syslog:server=unix:/dev/log,nohostname crit;
    events {{}} http {{ access_log off; server {{ {listen} location / {{ return 200 "{listen}"; }} }} }}"""
    return {"web.conf": config}


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


@pytest.mark.parametrize("reload", [BY_KILL, BY_COMMAND], ids=["signal", "command"])
def test_an_nginx_that_keeps_its_old_configuration_says_so_in_its_log(host: Host, reload: str) -> None:
    settings = "ReloadErrors=fail"
    journal = run(host, NGINX.format(reload=reload, settings=settings), nginx("listen 8080;"))
    drop(host, 2, nginx("listen 127.0.0.1:8080;"))
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert re.search(r"it logged an error \(.*bind\(\) to 127.0.0.1:8080 failed", entry["MESSAGE"])
    assert entry["CONFEXT_VERDICT"] == "reload-failed" and "Address already in use" in entry["CONFEXT_OUTPUT"]
    assert "but that failed too" not in entry["MESSAGE"]
    drop(host, 3, nginx("listen 8080; listen 8081;"))
    assert "site 1 -> 3" in journal.applied(WEB)["MESSAGE"]
    assert "listen 8081" in host.bed.run(["curl", "-sf", "http://127.0.0.1:8081"]).stdout


def test_the_first_start_on_what_only_a_reload_has_seen_is_on_trial(host: Host) -> None:
    """Without ReloadErrors= nginx takes a port that it cannot have for good, until it is started anew."""
    journal = run(host, NGINX.format(reload=BY_KILL, settings=""), nginx("listen 8080;"))
    taken = "python3 -m http.server 8083"
    host.bed.run(["systemd-run", "--unit=taken", "--collect", *taken.split()])
    host.stack.callback(host.systemctl, "stop", "taken")
    host.bed.run(["sh", "-c", "until curl -s -o /dev/null http://127.0.0.1:8083; do sleep 0.1; done"])
    for version in (2, 3):  # two that only a reload has seen; the first of them is the bad one
        drop(host, version, nginx(f"listen 8080; listen 8083; # {version}\n"))
        assert f"{version - 1} -> {version}" in journal.applied(WEB)["MESSAGE"]
        time.sleep(AFTERGLOW_USEC / 1e6)
    host.bed.run(["systemctl", "restart", WEB], check=False)
    for version in (3, 2):
        entry = journal.outcome(WEB, "rolled-back")
        assert (
            f"site {version} taken out again: the service failed at its first start on it" in entry["MESSAGE"]
        )
    assert "back on site 1" in entry["MESSAGE"] and "start done" in entry["MESSAGE"]
    assert "Address already in use" in entry["CONFEXT_OUTPUT"]
    assert "listen 8080" in host.bed.run(["curl", "-sf", "http://127.0.0.1:8080"]).stdout
    time.sleep(AFTERGLOW_USEC / 1e6)
    host.systemctl("restart", WEB)
    assert host.bed.property(WEB, "ActiveState") == "active"


def test_a_reload_that_tells_the_process_nothing_is_not_called_done(host: Host) -> None:
    """systemd refreshes the credentials, and calls that a reload."""
    if host.bed.version != "262":
        pytest.skip("only from systemd 260 on there is such a reload")
    unit = "[Service]\nExecStart=/bin/sleep 1000\nSetCredential=a:b\nRefreshOnReload=credentials\n"
    journal = run(host, unit, {"web.conf": "one"})
    assert host.bed.property(WEB, "CanReload") == "yes"
    drop(host, 2, {"web.conf": "two"})
    said = journal.applied(WEB)["MESSAGE"]
    assert "reload done" not in said and "tells the process nothing" in said
    sees(host, "two")


def test_what_a_service_logs_as_errors_is_shown_beside_the_outcome(host: Host) -> None:
    script = "echo '<3>no such module: foo'; echo '<6>all is well'; echo '<2>'$(cat /etc/web.conf)"
    unit = f'[Service]\nExecStart=/bin/sleep 1000\nExecReload=/bin/sh -c "{script}"\n'
    journal = run(host, unit, {"web.conf": "one"})
    drop(host, 2, {"web.conf": "two"})
    assert journal.applied(WEB)["CONFEXT_OUTPUT"] == "no such module: foo\ntwo"
    history = ["confext-watcher", "history", WEB]
    assert "foo" not in host.bed.run(history).stdout
    assert "    no such module: foo\n    two\n" in host.bed.run([*history, "-v"]).stdout


@pytest.mark.parametrize("reload", [BY_KILL, BY_COMMAND], ids=["signal", "command"])
def test_the_old_workers_of_an_nginx_are_not_taken_for_the_new_ones(host: Host, reload: str) -> None:
    settings = (
        "HealthCheck=/usr/bin/curl -sf --max-time 1 -o /dev/null http://127.0.0.1:8080/\nHealthCheckSec=5s"
    )
    journal = run(host, NGINX.format(reload=reload, settings=settings), nginx("listen 8080;"))
    drop(host, 2, nginx("listen 8082;"))
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert entry["CONFEXT_VERDICT"] == "health-check-failed"
    assert "listen 8080" in host.bed.run(["curl", "-sf", "http://127.0.0.1:8080"]).stdout
