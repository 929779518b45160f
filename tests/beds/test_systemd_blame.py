# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is not the image's fault is not put down to it, and the way back does no more than it says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host, Journal
from beds.site import WEB, drop, kept, run, sees
from support import needs
from support.place import eventually
from watcher.rounds.facts import AFTERGLOW_USEC

pytestmark = [needs.bed, needs.tool("mksquashfs")]

SERVES = """[Service]
ExecStart=/bin/sh -c 'trap : HUP; while :; do sleep 0.05; done'
ExecReload=/bin/kill -HUP $MAINPID
[X-Confext]
SettleSec=0
"""
# Goes down when it is told of what is bad, and cannot be started on that.
FALLS = """[Service]
ExecStart=/usr/bin/python3 /run/served.py
Restart=no
[X-Confext]
Reload=signal:HUP
SettleSec=0
"""
SERVED = """import os, signal, socket
def look(*_):
    if "bad" in open("/etc/web.conf").read():
        os._exit(1)
signal.signal(signal.SIGHUP, look)
look()
fds = os.environ.get("LISTEN_FDS", "")
open("/run/web.fds", "w").write(fds)
server = socket.socket(fileno=3) if fds else None
while True:
    server.accept()[0].close() if server else signal.pause()
"""
SOCKET = "[Socket]\nListenStream=/run/web.socket\nTriggerLimitIntervalSec=0\n"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def outcomes(journal: Journal) -> list[str]:
    return [entry["CONFEXT_OUTCOME"] for entry in journal.said() if "CONFEXT_OUTCOME" in entry]


def stopped_with_another(host: Host, text: str = SERVES) -> Journal:
    """It has run well on version 1, and gets version 2 while it is stopped."""
    journal = run(host, text, {"web.conf": "1"})
    time.sleep(AFTERGLOW_USEC / 1e6)
    host.systemctl("stop", WEB)
    drop(host, 2, {"web.conf": "2"})
    journal.until(lambda entry: "1 -> 2, accepted" in entry["MESSAGE"])
    return journal


def add(host: Host, name: str, text: str) -> None:
    directory = host.bed.path(f"{UNITS}/{WEB}.d")
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    host.systemctl("daemon-reload")


def starts_on(host: Host, journal: Journal, text: str) -> None:
    """What is wrong is mended: it starts on its image."""
    host.systemctl("reset-failed", WEB)
    host.systemctl("start", WEB)
    sees(host, text)
    journal.until(lambda entry: f"{WEB}: started well on site 2" in entry["MESSAGE"])
    assert "rolled-back" not in outcomes(journal)


@pytest.mark.parametrize("setting", ["BindPaths=/missing", "ExecStartPre=/bin/true\nBindPaths=/missing"])
def test_a_start_that_systemd_itself_cannot_make_leaves_the_image_on_trial(host: Host, setting: str) -> None:
    journal = stopped_with_another(host)
    slot = kept(host)
    add(host, "binds.conf", f"[Service]\n{setting}\n")
    host.bed.run(["systemctl", "start", WEB], check=False)
    eventually(lambda: host.bed.property(WEB, "ActiveState") == "failed")
    journal.until(lambda entry: "not by its stack: exit status 226" in entry["MESSAGE"])
    assert (kept(host), host.bed.property(WEB, "ActiveState")) == (slot, "failed")
    host.bed.path(f"{UNITS}/{WEB}.d/binds.conf").unlink()
    host.systemctl("daemon-reload")
    starts_on(host, journal, "2")


def test_a_reload_that_systemd_itself_cannot_make_is_tried_again(host: Host) -> None:
    journal = run(host, SERVES.replace("/bin/kill", "/bin/true; /bin/kill"), {"web.conf": "1"})
    add(host, "binds.conf", "[Service]\nExecReload=\nExecReload=/bin/true\nBindPaths=/missing\n")
    drop(host, 2, {"web.conf": "2"})
    journal.until(lambda entry: "it is not told yet: reload failed: /bin/true exited" in entry["MESSAGE"])
    sees(host, "2")
    host.bed.path("/missing").mkdir()
    host.stack.callback(host.bed.path("/missing").rmdir)
    assert "reload done" in journal.applied(WEB)["MESSAGE"]


def test_a_start_limit_that_somebody_else_has_run_into_stays_and_is_not_the_images(host: Host) -> None:
    journal = stopped_with_another(host)
    slot = kept(host)
    for _ in range(7):
        host.bed.run(["systemctl", "restart", WEB], check=False)
    assert host.bed.property(WEB, "Result") == "start-limit-hit"
    journal.until(lambda entry: "not by its stack: start-limit-hit" in entry["MESSAGE"])
    assert (kept(host), host.bed.property(WEB, "ActiveState")) == (slot, "failed")
    host.systemctl("reset-failed", WEB)
    host.systemctl("start", WEB)
    sees(host, "2")
    assert "rolled-back" not in outcomes(journal)


@pytest.mark.parametrize("restart", ["no", "always"])
@pytest.mark.parametrize("number", ["KILL", "TERM"])
def test_a_kill_from_outside_just_after_an_outcome_is_not_the_images(
    host: Host, restart: str, number: str
) -> None:
    journal = run(host, SERVES.replace("[X-", f"Restart={restart}\nRestartSec=300ms\n[X-"), {"web.conf": "1"})
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    slot, pid = kept(host), host.main_pid(WEB)
    host.systemctl("kill", f"--signal={number}", WEB)
    eventually(lambda: host.main_pid(WEB) != pid)
    if restart == "always":
        sees(host, "2")
    time.sleep(AFTERGLOW_USEC / 1e6)
    drop(host, 3, {"web.conf": "3"})
    journal.until(lambda entry: "2 -> 3" in entry["MESSAGE"])
    assert kept(host) != slot and "rolled-back" not in outcomes(journal)


def test_how_a_service_takes_a_restart_just_after_an_outcome_is_not_the_images(host: Host) -> None:
    text = SERVES.replace("trap : HUP", 'trap : HUP; trap "exit 3" TERM')
    journal = run(host, text, {"web.conf": "1"})
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    slot, pid = kept(host), host.main_pid(WEB)
    host.systemctl("restart", WEB)
    assert host.main_pid(WEB) not in (0, pid)
    sees(host, "2")
    time.sleep(AFTERGLOW_USEC / 1e6)
    drop(host, 3, {"web.conf": "3"})
    journal.until(lambda entry: "2 -> 3" in entry["MESSAGE"])
    assert kept(host) != slot and "rolled-back" not in outcomes(journal)


def test_what_came_while_it_ran_on_another_is_not_put_down_to_what_its_next_start_gets(host: Host) -> None:
    """It has no main process that systemd knows of, so it runs on version 1 to its end."""
    host.unit(
        WEB,
        "[Service]\nType=forking\nGuessMainPID=no\nExecStart=/bin/sh -c 'sleep infinity & exit 0'\n"
        "ExecStopPost=/bin/test ! -e /run/ill\n[X-Confext]\nSettleSec=0\n",
    )
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/ill"])
    drop(host, 1, {"web.conf": "1"})
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    drop(host, 2, {"web.conf": "2"})
    journal.until(lambda entry: "1 -> 2, accepted" in entry["MESSAGE"])
    slot = kept(host)
    host.bed.path("/run/ill").touch()
    host.systemctl("stop", WEB)
    assert host.bed.property(WEB, "ActiveState") == "failed"
    host.bed.path("/run/ill").unlink()
    drop(host, 3, {"web.conf": "3"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") is not None)
    assert "2 -> 3, accepted" in entry["MESSAGE"] and kept(host) != slot


def test_one_that_is_not_to_be_started_now_has_nothing_against_it(host: Host) -> None:
    journal = stopped_with_another(
        host, SERVES.replace("ExecReload", "ExecCondition=/bin/test ! -e /run/no\nExecReload")
    )
    host.bed.path("/run/no").touch()
    host.systemctl("start", WEB)
    assert host.main_pid(WEB) == 0
    host.bed.path("/run/no").unlink()
    host.systemctl("start", WEB)
    sees(host, "2")
    journal.until(lambda entry: f"{WEB}: started well on site 2" in entry["MESSAGE"])
    assert "rolled-back" not in outcomes(journal)


def test_the_way_back_runs_into_the_start_limit_itself_and_gets_over_it(host: Host) -> None:
    text = "[Unit]\nStartLimitBurst=2\nStartLimitIntervalSec=1h\n" + FALLS.replace(
        "Restart=no", "Restart=always"
    )
    journal = falls(host, text)
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    # On a busy machine systemd's own restart comes first: what that has started gets its stack by a swap.
    assert "back on site 1" in entry["MESSAGE"]
    sees(host, "good")
    assert host.bed.property(WEB, "ActiveState") == "active"


def test_a_way_back_that_does_not_come_up_is_not_said_to(host: Host) -> None:
    journal = falls(host, FALLS)
    add(host, "binds.conf", "[Service]\nBindPaths=/missing\n")
    drop(host, 2, {"web.conf": "bad"})
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert "start done" not in entry["MESSAGE"] and "exit status 226" in entry["MESSAGE"], entry["MESSAGE"]


def test_one_that_its_socket_starts_comes_back_with_its_socket(host: Host) -> None:
    journal = by_its_socket(host)
    pid = host.main_pid(WEB)
    drop(host, 2, {"web.conf": "bad"})
    journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert host.bed.property("web.socket", "ActiveState") == "active"
    connect(host)
    sees(host, "good")
    assert host.main_pid(WEB) != pid
    eventually(lambda: host.bed.path("/run/web.fds").read_text() == "1")


def test_a_socket_that_went_down_with_its_service_comes_back_before_it(host: Host) -> None:
    journal = by_its_socket(host)
    host.systemctl("stop", WEB)  # its socket goes on
    time.sleep(AFTERGLOW_USEC / 1e6)
    drop(host, 2, {"web.conf": "bad"})
    journal.until(lambda entry: "1 -> 2, accepted" in entry["MESSAGE"])
    # While the connection waits, its socket starts the service until that is started too often, and fails.
    connect(host)
    journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    eventually(lambda: host.bed.property("web.socket", "ActiveState") == "active")
    connect(host)
    sees(host, "good")
    eventually(lambda: host.bed.path("/run/web.fds").read_text() == "1")


def falls(host: Host, text: str) -> Journal:
    host.bed.path("/run/served.py").write_text(SERVED)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/web.fds", "/run/served.py"])
    return run(host, text, {"web.conf": "good"})


def by_its_socket(host: Host) -> Journal:
    """It runs well on version 1, started by its socket."""
    host.bed.path("/run/served.py").write_text(SERVED)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/web.fds", "/run/served.py"])
    host.units({"web.socket": SOCKET}, takes_part=False)
    host.unit(WEB, FALLS)
    drop(host, 1, {"web.conf": "good"})
    host.watch()
    journal = host.journal()
    host.systemctl("start", "web.socket")
    connect(host)
    journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
    return journal


def connect(host: Host) -> None:
    words = "import socket; socket.socket(socket.AF_UNIX).connect('/run/web.socket')"
    host.bed.run(["python3", "-c", words])
