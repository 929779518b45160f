# SPDX-License-Identifier: LGPL-2.1-or-later
"""`wait` on real systemd: the answers for services that systemd does not run, or runs elsewhere, and its own restart.

All others are in `tests/scenarios/test_wait.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, UNITS, Host
from beds.test_systemd_services import RELOADS, drop_version
from support import needs
from support.place import eventually

pytestmark = needs.bed


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def asked(host: Host, unit: str, version: str) -> dict[str, Any]:
    """The answer, whose exit status was as it says."""
    words = ["confext-watcher", "wait", "--timeout=30", "--json", unit, f"web_{version}.raw"]
    done = host.bed.run(words, check=False)
    answer: dict[str, Any] = json.loads(done.stdout)["answer"]
    assert done.returncode == answer["status"], done
    return answer


def test_a_service_that_does_not_run_gets_it_at_its_next_start(host: Host) -> None:
    host.unit("stopped.service", SLEEP)
    once = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'cat /etc/web.txt >>/run/once; echo >>/run/once'\n"
    host.unit("once.service", once)
    host.unit("stays.service", once + "RemainAfterExit=yes\n")
    host.unit("socket.socket", "[Socket]\nListenStream=/run/socket\n", takes_part=False)
    host.unit("socket.service", SLEEP)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/once"])
    host.watch()
    host.systemctl("start", "socket.socket", "once.service", "stays.service")
    for unit in ("stopped.service", "once.service", "stays.service", "socket.service"):
        drop_version(host, unit, "1")
        found = asked(host, unit, "1")
        assert (found["kind"], found["status"]) == ("accepted", 0), found
        assert "its next start gets it" in found["text"]
    host.systemctl("start", "once.service")
    assert host.bed.path("/run/once").read_text().split()[-1] == "1"
    assert asked(host, "once.service", "1")["status"] == 0
    host.systemctl("start", "stopped.service")
    assert host.see("stopped.service", "/etc/web.txt") == "1"
    assert asked(host, "stopped.service", "1")["kind"] == "applied"
    host.systemctl("stop", "socket.socket")


def test_what_needs_a_restart_says_which_command_helps_and_it_does(host: Host) -> None:
    host.unit("plain.service", SLEEP, takes_part=False)
    host.systemctl("start", "plain.service")
    host.watch()
    host.confext_dir("plain.service").mkdir()
    drop_version(host, "plain.service", "1")
    found = asked(host, "plain.service", "1")
    assert (found["kind"], found["status"]) == ("needs-restart", 1)
    host.bed.run(found["command"].split())
    assert host.see("plain.service", "/etc/web.txt") == "1"
    assert asked(host, "plain.service", "1")["kind"] == "applied"


def test_the_first_start_on_a_stack_is_waited_for(host: Host) -> None:
    """A reload has seen it, and no start yet."""
    check = "[X-Confext]\nHealthCheck=/bin/test -e /run/well\nHealthStableSec=100ms\nHealthCheckSec=60s\n"
    host.unit("web.service", RELOADS + check)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/reloads", "/run/well"])
    host.bed.run(["touch", "/run/well"])
    host.watch()
    host.systemctl("start", "web.service")
    drop_version(host, "web.service", "1")
    assert asked(host, "web.service", "1")["kind"] == "applied"
    host.bed.run(["rm", "/run/well"])
    host.systemctl("restart", "web.service")
    words = ["confext-watcher", "wait", "--timeout=2", "web.service", "web_1.raw"]
    done = host.bed.run(words, check=False)
    assert (done.returncode, "on trial" in done.stderr) == (4, True), done
    host.bed.run(["touch", "/run/well"])
    assert asked(host, "web.service", "1")["kind"] == "applied"


def test_a_restart_of_the_daemon_during_a_wait(host: Host) -> None:
    host.unit("web.service", RELOADS)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/reloads", "/run/waited"])
    host.watch()
    host.systemctl("start", "web.service")
    drop_version(host, "web.service", "1")
    assert asked(host, "web.service", "1")["kind"] == "applied"
    # An upload that goes on keeps it waiting.
    (host.confext_dir("web.service") / "web.raw.v/.web_2.raw.part").touch()
    wait = "confext-watcher wait --timeout=60 web.service web_2.raw >/run/waited 2>&1; echo status $? >>/run/waited"
    host.bed.run(["systemd-run", "--quiet", "--unit=waiting", "/bin/sh", "-c", wait])
    said = host.bed.path("/run/waited")

    def waited() -> str:
        return said.read_text() if said.exists() else ""

    eventually(lambda: "looks like its upload" in waited())
    host.systemctl("restart", "confext-watcher")
    host.systemctl("stop", "confext-watcher")
    drop_version(host, "web.service", "2")
    host.systemctl("start", "confext-watcher")
    eventually(lambda: "status" in waited())
    assert "status 0" in waited() and "web 1 -> 2 applied" in waited(), waited()


def test_two_uploads_at_once_through_the_sandbox_of_the_daemon(host: Host) -> None:
    host.unit("web.service", RELOADS)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/reloads"])
    host.watch()
    host.systemctl("start", "web.service")
    drop_version(host, "web.service", "1")
    assert asked(host, "web.service", "1")["kind"] == "applied"
    one, two = (host.image(f"web_{value}", {"web.txt": value}) for value in ("one", "two"))
    name = f"{UNITS}/web.service.confext.d/web.raw.v/web_2.raw"
    for source in (one, two):
        shutil.copy(source, host.bed.path(f"{os.path.dirname(name)}/.{source.name}"))
    first = f"(exec 3>{name}; sleep 1; cat .{one.name} >&3)"
    second = f"(sleep 0.3; exec 3>{name}; sleep 1; cat .{two.name} >&3)"
    host.bed.run(["sh", "-c", f"cd $(dirname {name}); {first} & {second} & wait"])
    found = asked(host, "web.service", "2")
    assert (found["kind"], found["status"]) == ("refused", 1), found
    assert "two programs wrote to it at once (" in found["text"], found
    host.bed.run(["touch", name])
    assert asked(host, "web.service", "2")["kind"] == "applied"
