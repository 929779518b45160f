# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bad configuration never takes a service down: real services on real systemd."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop, kept, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

NGINX = """[Service]
Type=forking
PIDFile=/run/web.pid
ExecStart=/usr/sbin/nginx -c /etc/web.conf
ExecReload=/usr/sbin/nginx -c /etc/web.conf -s reload
[X-Confext]
Check=/usr/sbin/nginx -t -c /etc/web.conf
HealthCheck=/bin/sh -c 'test "$(curl -sf --max-time 1 http://127.0.0.1:8080/)" = "$(cat /etc/web.version)"'
HealthCheckSec=2s
SettleSec=0
"""
SSHD = """[Service]
ExecStart=/usr/sbin/sshd -D -f /etc/web.conf
ExecReload=/usr/sbin/sshd -t -f /etc/web.conf
ExecReload=/bin/kill -HUP $MAINPID
RuntimeDirectory=sshd
[X-Confext]
Check=/usr/sbin/sshd -t -f /etc/web.conf
"""
# What the program does when it is told to reload and finds something bad.
PROGRAM = """[Service]
ExecStart=/bin/sh -c 'trap "! grep -q bad /etc/web.conf || {{ {bad}; }}" HUP; while :; do sleep 0.05; done'
{unit}
[X-Confext]
Reload={reload}
{settings}
"""


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def nginx(text: str, more: str = "") -> dict[str, str]:
    server = f"listen 127.0.0.1:8080; location / {{ return 200 {text}; }} {more}"
    main = f"pid /run/web.pid;\nevents {{}}\nhttp {{ access_log off; server {{ {server} }} }}\n"
    return {"web.conf": main, "web.version": text}


class Load:
    """A client that requests without pause."""

    SCRIPT = """
import http.client, json, sys, threading
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
good = bad = 0
last = ""
while not stop.is_set():
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=5)
        connection.request("GET", "/")
        answer = connection.getresponse()
        ok = answer.status == 200 and bool(answer.read())
        connection.close()
    except OSError as error:
        ok, last = False, repr(error)
    good, bad = good + ok, bad + (not ok)
print(json.dumps([good, bad, last]))
"""

    def __init__(self, bed: Bed) -> None:
        self._client = bed.popen(
            ["python3", "-c", self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def end(self) -> str:
        said, _ = self._client.communicate()
        return str(said).strip()


def test_nginx_answers_every_request_whatever_is_dropped(host: Host) -> None:
    journal = run(host, NGINX, nginx("one"))
    load, pid, slot = Load(host.bed), host.main_pid(WEB), kept(host)
    drop(host, 2, nginx("two", "nonsense;"))
    assert "nonsense" in journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    drop(host, 3, nginx("three", "listen 127.0.0.1:8443 ssl; ssl_certificate /etc/no.pem;"))
    assert "no.pem" in journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    assert kept(host) == slot
    listener = "import socket; s = socket.create_server(('127.0.0.1', 8082)); import sys; sys.stdin.read()"
    taken = host.bed.popen(["python3", "-c", listener], stdin=subprocess.PIPE)
    host.bed.run(["sh", "-c", "until grep -q ':1F92 ' /proc/net/tcp; do sleep 0.02; done"])
    drop(host, 4, nginx("four", "listen 127.0.0.1:8082;"))  # `nginx -t` and the reload say nothing of it
    assert "health check" in journal.outcome(WEB, "rolled-back")["MESSAGE"]
    taken.communicate()
    assert (host.main_pid(WEB), kept(host)) == (pid, slot)
    drop(host, 5, nginx("five"))
    journal.applied(WEB)
    good, bad, last = json.loads(load.end())
    print(f"systemd {host.bed.version}: {good} requests answered, {bad} failed {last}")
    assert (bad, good > 100) == (0, True), last
    assert host.bed.run(["curl", "-sf", "http://127.0.0.1:8080/"]).stdout == "five"


def test_sshd_never_sees_what_it_would_not_start_with(host: Host) -> None:
    config = "Port 2222\nListenAddress 127.0.0.1\nHostKey /etc/web.key\n"
    host.bed.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/web.key"])
    key = host.bed.path("/root/web.key").read_text()
    host.stack.callback(host.bed.run, ["rm", "/root/web.key", "/root/web.key.pub"])
    host.unit(WEB, SSHD)
    files = {"web.conf": config, "web.key": key}
    source = host.image("site_1", files, mode={"web.key": (0, 0o600)})
    host.drop(source, WEB, "site.raw.v/site_1.raw")
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    journal.until(lambda entry: "started well" in entry["MESSAGE"])
    drop(host, 2, files | {"web.conf": config + "Nonsense yes\n"})
    assert "Nonsense" in journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    source = host.image(
        "site_3", files | {"web.conf": config + "Banner none\n"}, mode={"web.key": (0, 0o600)}
    )
    host.drop(source, WEB, "site.raw.v/site_3.raw")
    assert "reload done" in journal.applied(WEB)["MESSAGE"]


HANG = "ExecReload=/bin/sh -c 'grep -q bad /etc/web.conf && sleep 60; true'\nTimeoutStartSec=1"


@pytest.mark.parametrize(
    ("bad", "unit", "reload", "settings", "reason"),
    [
        ("exit 1", "", "signal:HUP", "", "its main process ended soon after the reload"),
        ("true", HANG, "unit", "", "reload timed out"),
        (
            "(sleep 3; kill -KILL $$$$) & true",
            "",
            "signal:HUP",
            "HealthWatchSec=6s",
            "within 6 s of its reload",
        ),
        ("exit 1", "Restart=always\nRestartSec=300ms", "signal:HUP", "", "its main process ended"),
    ],
    ids=["dies", "hangs", "dies-later", "restarts"],
)
def test_a_service_is_back_on_what_it_ran_well_on(
    host: Host, bad: str, unit: str, reload: str, settings: str, reason: str
) -> None:
    text = PROGRAM.format(bad=bad, unit=unit, reload=reload, settings=settings)
    journal = run(host, text, {"web.conf": "good"})
    slot = kept(host)
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert re.search(reason, entry["MESSAGE"])
    sees(host, "good")
    assert (host.bed.property(WEB, "ActiveState"), kept(host)) == ("active", slot)


def test_what_is_kept_out_stays_out_over_a_kill_a_restart_and_a_boot(host: Host) -> None:
    unit = "ExecReload=/bin/sh -c '! grep -q bad /etc/web.conf'"
    journal = run(
        host, PROGRAM.format(bad="true", unit=unit, reload="auto", settings=""), {"web.conf": "good"}
    )
    drop(host, 2, {"web.conf": "bad"})
    assert "reload failed" in journal.outcome(WEB, "rolled-back")["MESSAGE"]
    host.systemctl("kill", "--signal=KILL", "confext-watcher")
    journal.until(lambda entry: "watching for" in entry["MESSAGE"])
    host.systemctl("restart", WEB)
    sees(host, "good")
    # As a boot does it: nothing runs, /run is empty, and the watcher comes by its dependency.
    host.systemctl("stop", WEB, "confext-watcher")
    host.bed.run(["rm", "-rf", "/run/confext-watcher"])
    host.systemctl("start", WEB)
    sees(host, "good")
    drop(host, 3, {"web.conf": "fine"})
    journal.applied(WEB)
    sees(host, "fine")


def test_a_first_stack_on_which_a_service_does_not_start_is_taken_out_again(host: Host) -> None:
    host.unit(WEB, "[Service]\nExecStart=/bin/sh -c '! grep -q bad /etc/web.conf && exec sleep 1000'\n")
    drop(host, 1, {"web.conf": "bad"})
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    assert "back on its own /etc" in journal.outcome(WEB, "rolled-back")["MESSAGE"]
    host.bed.run(["sh", "-c", f"until systemctl is-active {WEB}; do sleep 0.02; done"])
