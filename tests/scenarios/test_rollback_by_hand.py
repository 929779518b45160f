# SPDX-License-Identifier: LGPL-2.1-or-later
"""`rollback` (control/commands.py): where it goes, who asked, and that it is done or not done."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from scenarios.place import Place, Service

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)


def put(service: Service, *versions: str) -> None:
    for version in versions:
        service.put(version)
        service.reloaded(version)
        service.logged(f"{version}.* applied")


def history(service: Service) -> list[dict[str, Any]]:
    done = service.place.run("history", "--json", service.name)
    events: list[dict[str, Any]] = json.loads(done.stdout)["events"]
    return events


def test_it_says_where_it_goes_before_it_goes_and_who_asked_is_in_the_history(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    put(service, "1", "2")
    before = history(service)[1]["stack"]
    asked, came, stays = place.run("rollback", service.name).stdout.splitlines()
    assert asked == f"{service.name}: back from web 2 to web 1 ({before}), asked for by root"
    assert "web 2 -> 1 applied in" in came and "--forget" in stays
    outcome, request = history(service)[:2]
    assert (request["outcome"], request["message"], request["stack"]) == ("requested", asked, before)
    assert (outcome["outcome"], outcome["stack"]) == ("applied", before)
    place.run("rollback", "--forget", service.name)
    service.reloaded("2")
    assert any("newest again, asked for by root" in one["message"] for one in history(service)[:2])


def test_a_second_one_goes_further_back_and_not_forward_again(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    put(service, "1", "2", "3")
    for version in ("2", "1"):
        assert f"to web {version} (" in place.run("rollback", service.name).stdout
        service.reloaded(version)
    done = place.run("rollback", service.name, check=False)
    assert (done.returncode, "has no stack before the present one" in done.stderr) == (1, True)
    assert service.has("1")
    place.run("rollback", "--forget", service.name)
    service.reloaded("3")
    newest = service.status()["stack"]
    place.run("rollback", service.name)
    service.reloaded("1")
    place.run("rollback", "--to", newest, service.name)
    service.reloaded("3")


@pytest.fixture
def cramped(place: Place) -> Iterator[Place]:
    """The state directory on a file system of one megabyte, in memory."""
    place.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=755", "state", place.state], check=True)
    yield place
    for service in place.services:
        service.kill()
    if place.daemon:
        place.daemon.stop()
        place.daemon = None
    subprocess.run(["umount", "--lazy", place.state], check=True)


@images_only
def test_on_a_full_disk_it_is_not_done_nor_later_when_there_is_space(cramped: Place) -> None:
    cramped.start_daemon()
    service = cramped.start()
    put(service, "1", "2")
    with pytest.raises(OSError, match="No space left"):
        (cramped.state / "fill").write_bytes(bytes(2 << 20))
    done = cramped.run("rollback", service.name, check=False)
    assert done.returncode == 1
    assert "not done" in done.stderr and "It stays there" not in done.stdout
    (cramped.state / "fill").unlink()
    assert service.status()["pinned"] is None
    service.put("3")
    service.reloaded("3")
    assert service.heard == ["nothing", "1", "2", "3"]
    assert "to web 2 (" in cramped.run("rollback", service.name).stdout
    service.reloaded("2")
