# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that does not answer keeps nobody waiting but the services whose configuration is on it.

Each test hangs one step of a round, or of what is done between rounds, on a real FUSE file system, and has a healthy
service get its drop meanwhile. The starting program finds out with watch/comes_back.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scenarios.place import Place, Service
from support.hangs import LOOKUP, OPEN, OPENDIR, READ, READDIR, RENAME2, Hanging, hanging
from support.needs import root, tool

pytestmark = [root, tool("mksquashfs"), pytest.mark.parametrize("shared", ["images"], indirect=True)]


def look(place: Place) -> None:
    """Have every service looked at."""
    assert place.daemon is not None
    place.daemon.send(signal.SIGHUP)
    place.daemon.log.wait_for("settings read again")


def threads(place: Place) -> int:
    assert place.daemon is not None
    return len(os.listdir(f"/proc/{place.daemon.pid}/task"))


@contextmanager
def on_fuse(place: Place, name: str) -> Iterator[Hanging]:
    """A service's drop directory, still empty, on a file system that answers for now."""
    shown, where = place.path / f"shown-{name}", place.drops(name)
    (shown / "web.raw.v").mkdir(parents=True)
    where.mkdir()
    with hanging(shown, where) as mounted:
        yield mounted


def multiply(place: Place, service: Service, names: list[str]) -> None:
    """So many services as it is one: their processes are the same, their paths are not looked at."""
    registrations = place.runtime / "services"
    facts = json.loads((registrations / f"{service.name}.json").read_text())
    for name in names:
        temporary = place.path / "registration"
        temporary.write_text(json.dumps(facts | {"name": name}))
        temporary.rename(registrations / f"{name}.json")


def works(service: Service, version: str) -> None:
    """A healthy one has its drop, and whoever asks has an answer."""
    service.put(version)
    service.reloaded(version)
    service.logged("applied in", f"version={version} ")
    assert service.status()["layers"][0]["version"] == version


@contextmanager
def hung_service(place: Place, name: str) -> Iterator[tuple[Service, Hanging]]:
    """A service that runs on version 1 from a file system that answers, for now."""
    with on_fuse(place, name) as dead:
        service = place.start(name=name)
        service.put("1", at=dead.shown / "web.raw.v")
        look(place)
        service.reloaded("1")
        service.logged("applied in", "version=1 ")
        try:
            yield service, dead
        finally:
            place.services.remove(service)
            service.kill()


@pytest.mark.parametrize("count", [1, 50])
def test_a_healthy_service_gets_its_drop_while_others_hang(service: Service, count: int) -> None:
    place = service.place
    with hung_service(place, f"hung-{count}.service") as (hung, dead):
        before = threads(place)
        dead.hang()
        names = [f"hung-{count}-{number}.service" for number in range(1, count)]
        multiply(place, hung, names)
        look(place)
        for version in ("2", "3", "4"):
            works(service, version)
        assert threads(place) <= before + count + 5  # one each; the rest is for what all share
        assert hung.has("1")
        assert hung.status()["state"] == "running"
        dead.answer()
        for name in names:
            (place.runtime / f"services/{name}.json").unlink()
        hung.put("2", at=dead.shown / "web.raw.v")
        look(place)
        hung.reloaded("2")


STEPS = {
    "look-up": (LOOKUP, "2"),
    "opening a directory": (OPENDIR, "2"),
    "reading a directory": (READDIR, "2"),
    "opening an image": (OPEN, "2"),
    "reading an image": (READ, "2"),
    "counting a try": (RENAME2, "2+3"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_round_that_hangs_goes_on_when_it_is_answered(service: Service, step: str) -> None:
    operation, version = STEPS[step]
    with hung_service(service.place, f"{operation}.service") as (hung, dead):
        hung.put(version, value="2", at=dead.shown / "web.raw.v")
        dead.hang(operation)
        look(service.place)
        dead.wait_until_asked()
        works(service, "1")
        assert hung.has("1")
        dead.answer()
        hung.reloaded("2")


def test_a_hanging_file_system_is_mounted_over_what_is_watched(service: Service) -> None:
    """The mount table changes, and every path that leads there is followed anew."""
    place = service.place
    over = place.start(name="over.service")
    over.put("1")
    over.reloaded("1")
    shown = place.path / "over"
    (shown / "web.raw.v").mkdir(parents=True)
    with hanging(shown, over.drops) as dead:
        dead.hang()
        for version in ("1", "2", "3"):
            works(service, version)
        assert over.has("1")
        dead.end()
    over.put("2")  # unmounted, and there is its own directory again
    over.reloaded("2")


def test_the_daemon_ends_while_a_service_hangs(shared: Place, tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        daemon = place.start_daemon()
        with hung_service(place, "hung.service") as (_, dead):
            dead.hang()
            look(place)
            (dead.where.parent / "mounted").mkdir()
            with hanging(dead.shown, dead.where.parent / "mounted"):
                daemon.send(signal.SIGTERM)
                assert daemon.wait() == 0


def test_a_service_starts_while_its_drop_directory_hangs(shared: Place) -> None:
    """Takes the five seconds after which `exec` stops waiting, and holds nothing of the program's open."""
    with on_fuse(shared, "start.service") as dead:
        options = ("--confext-dir", str(shared.drops("start.service")), "--reload-signal", "SIGHUP")
        made = shared.confext("1", "1")
        shared.bring(made, dead.shown / "web.raw.v/web_1.raw")
        shared.start(*options, name="start.service", declared=False).kill()
        dead.hang(LOOKUP)  # read by its server: who waits for that cannot even be killed
        service = shared.start(*options, name="start.service", declared=False, wait=False)
        service.said.wait_for("^started 1$")
        service.errors.wait_for("start.service: starts on its last accepted stack: ", "does not answer")
        service.send(signal.SIGKILL)
        service.errors.wait_for_end()
        dead.answer()
