# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that does not answer keeps nobody waiting but the services whose configuration is on it.

Each test hangs one step of a round, or of what is done between rounds, on a real FUSE file system, and has a healthy
service get its drop meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hangs import Hanging, hanging

from needs import root, tool
from standalone.place import Place, Service

pytestmark = [root, tool("mksquashfs")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


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


def works(place: Place, service: Service, version: str) -> None:
    """A healthy one has its drop, and whoever asks has an answer."""
    service.put(version)
    service.reloaded(version)
    service.logged("applied in", f"version={version} ")
    assert service.status()["layers"][0]["version"] == version


@pytest.mark.parametrize("count", [1, 50])
def test_a_healthy_service_gets_its_drop_while_others_hang(place: Place, count: int) -> None:
    daemon = place.start_daemon()
    good = place.start(name="good.service")
    works(place, good, "1")
    with on_fuse(place, "hung.service") as dead:
        hung = place.start(name="hung.service")
        hung.put("1", at=dead.shown / "web.raw.v")
        daemon.send(signal.SIGHUP)
        hung.reloaded("1")
        before = threads(place)
        dead.hang()
        multiply(place, hung, [f"hung-{number}.service" for number in range(1, count)])
        daemon.send(signal.SIGHUP)
        daemon.log.wait_for("settings read again")
        for version in ("2", "3", "4"):
            works(place, good, version)
        assert threads(place) <= before + count + 5  # one each; the rest is for what is shared
        assert hung.has("1")
        assert hung.status()["state"] == "running"
        dead.answer()
        for number in range(1, count):
            place.runtime.joinpath(f"services/hung-{number}.service.json").unlink()
        hung.put("2", at=dead.shown / "web.raw.v")
        daemon.send(signal.SIGHUP)
        hung.reloaded("2")
        hung.kill()


def test_the_daemon_ends_while_a_service_hangs(place: Place) -> None:
    daemon = place.start_daemon()
    good = place.start(name="good.service")
    works(place, good, "1")
    with on_fuse(place, "hung.service") as dead:
        hung = place.start(name="hung.service")
        dead.hang()
        daemon.send(signal.SIGHUP)
        daemon.log.wait_for("settings read again")
        works(place, good, "2")
        daemon.send(signal.SIGTERM)
        assert daemon.wait() == 0
        hung.kill()
