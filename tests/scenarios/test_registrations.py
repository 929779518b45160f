# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registrations that are not what they seem: nothing is mounted anywhere because of one, and no signal is sent.

Covers managers/registration.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.place import Place, until
from support.needs import root
from watcher.mounts.process import start_time

# From a user namespace no process outside of it can be looked at.
pytestmark = [root, pytest.mark.parametrize("place", ["images"], indirect=True)]


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host, which a signal would end."""
    process = subprocess.Popen(["sleep", "infinity"])
    yield process
    process.kill()
    process.wait()


def register(
    place: Place, process: subprocess.Popen[bytes], started: int, wrong: dict[str, object] | None = None
) -> None:
    """A registration of a process that `exec` has not started."""
    status = os.stat("/proc/self/ns/mnt")
    registration = {
        "name": "web.service",
        "pid": process.pid,
        "started": started,
        "namespace": [status.st_dev, status.st_ino],
        "confext_dirs": [str(place.drops("web.service"))],
        "reload_signal": "SIGHUP",
        **(wrong or {}),
    }
    services = place.runtime / "services"
    services.mkdir(parents=True, exist_ok=True)
    (services / "web.service.json").write_text(json.dumps(registration))


def drop(place: Place) -> None:
    versions = place.versions("web.service")
    versions.mkdir(parents=True, exist_ok=True)
    place.bring(place.confext("1"), versions / f"web_1{place.suffix}")


def test_a_process_in_the_hosts_namespace_is_never_touched(
    place: Place, bystander: subprocess.Popen[bytes]
) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    register(place, bystander, start_time(bystander.pid))
    drop(place)
    daemon = place.start_daemon(wait=False)
    line = daemon.log.wait_for("needs-restart")
    assert "web.service: not touched" in line and "restart it once" in line
    assert bystander.poll() is None
    assert Path("/proc/self/mountinfo").read_text() == before
    daemon.stop()
    assert sum("needs-restart" in line for line in daemon.log.wait_for_end()) == 1


def test_nobody_is_told_to_restart_what_has_no_images_yet(
    place: Place, bystander: subprocess.Popen[bytes]
) -> None:
    """By the time that it has some, its manager knows that its next start is to have them."""
    register(place, bystander, start_time(bystander.pid))
    place.versions("web.service").mkdir(parents=True, exist_ok=True)
    place.configure("SettleSec=20ms", "LogLevel=debug")
    daemon = place.start_daemon()
    until(lambda: any("web.service: round over" in line for line in daemon.log.read()))
    assert not any("needs-restart" in line for line in daemon.log.lines)
    drop(place)
    daemon.log.wait_for("needs-restart")


def test_a_pid_that_is_another_process_by_now_is_not_the_service(
    place: Place, bystander: subprocess.Popen[bytes]
) -> None:
    register(place, bystander, start_time(bystander.pid) - 1)
    drop(place)
    daemon = place.start_daemon(wait=False)
    daemon.log.wait_for("it is not running, its next start gets it")
    assert bystander.poll() is None
    daemon.stop()
    assert not any("needs-restart" in line for line in daemon.log.wait_for_end())


def test_what_is_no_registration_is_told_and_passed_over(place: Place) -> None:
    services = place.runtime / "services"
    services.mkdir(parents=True)
    (services / "web.service.json").write_text("[")
    (services / "link.service.json").symlink_to("/etc/shadow")
    daemon = place.start_daemon(wait=False)
    assert "ignored" in daemon.log.wait_for("link.service.json")
    assert "ignored" in daemon.log.wait_for("web.service.json")


WRONG: dict[str, dict[str, object]] = {
    "a PID that is text": {"pid": "7"},
    "a PID below 0": {"pid": -1},
    "PID 0": {"pid": 0},
    "a PID too large": {"pid": 2**40},
    "a start time that is text": {"started": "7"},
    "true for a number": {"started": True},
    "numbers for paths": {"images": [3]},
    "a text for paths": {"confext_dirs": "/srv"},
    "a NUL in a path": {"images": ["/srv/a\0b"]},
    "half a namespace": {"namespace": 4},
    "an unknown signal": {"reload_signal": "NOPE"},
    "an unknown key": {"colour": "blue"},
    "another's name": {"name": "other.service"},
    "deep nesting": {"settings": "deep"},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_registration_is_one_line(
    place: Place, bystander: subprocess.Popen[bytes], wrong: dict[str, object]
) -> None:
    register(place, bystander, start_time(bystander.pid), wrong)
    path = place.runtime / "services/web.service.json"
    path.write_text(path.read_text().replace('"deep"', "[" * 100_000 + "]" * 100_000))
    daemon = place.start_daemon()
    place.start().put("1.3")
    daemon.log.wait_for("web 1.3 added, applied")
    said = [line for line in daemon.log.lines if f"{path}: ignored, start the service again" in line]
    assert len(said) == 1, daemon.log.lines
    assert not any("Traceback" in line for line in daemon.log.lines)
    assert bystander.poll() is None


def test_no_descriptor_for_a_registration(place: Place) -> None:
    """What cannot be read for a while is not gone, and what came meanwhile is not missed."""
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    other = place.start()
    daemon.log.wait_for("cannot be read, it is tried again: Too many open files")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
    other.put("1.3")
    other.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    assert not any("ignored" in line for line in daemon.log.lines)


def test_one_of_an_older_version_is_told_to_be_renewed_before_anything_is_run(place: Place) -> None:
    """It does not say in which user namespace the service's capabilities count."""
    service = place.start("--check", "true")
    path = place.runtime / f"services/{service.name}.json"
    registration = json.loads(path.read_text())
    del registration["user_namespace"], registration["environment"]
    path.write_text(json.dumps(registration))
    place.start_daemon()
    service.put("1.3")
    service.logged("check 'true' could not be run: start the service again with `exec`")
    assert not service.etc("web.conf").exists()
