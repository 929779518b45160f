# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of the host that change below those of an image, with real services, on an `/etc` of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from scenarios.place import Place, Service

pytestmark = pytest.mark.parametrize("place", ["trees"], indirect=True)

DRIFT = "own files have changed"


@pytest.fixture
def etc(place: Place) -> Path:
    """The host's `/etc`, for all that runs in the place."""
    made = place.path / "etc"
    made.mkdir()
    for name in ("passwd", "group", "os-release", "nsswitch.conf", "ld.so.cache"):
        if os.path.exists(f"/etc/{name}"):
            shutil.copy(f"/etc/{name}", made)
    (made / "web.conf").write_text("the host's\n")
    place.inside("mount", "--bind", str(made), "/etc")
    return made


def replaced(file: Path, text: str) -> None:
    """As apt and most editors do it."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.rename(file)


def on(place: Place, version: str = "1.4") -> Service:
    place.start_daemon()
    service = place.start()
    service.put(version)
    service.reloaded(version)
    noted(service)
    return service


def covers(service: Service) -> dict[str, Any]:
    """What the record says of the accepted stack."""
    path = service.place.state / "units" / f"{service.name}.exec" / ".state.json"
    record = json.loads(path.read_text())
    found = record.get("covers") or {}
    return found if found.get("when") == record["accepted"]["when"] else {}


def noted(service: Service) -> None:
    deadline = time.monotonic() + 30
    while not covers(service):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drifted(service: Service) -> list[tuple[str, str, str]]:
    """As `status` has it without a new look."""
    answer = json.loads(service.place.run("status", "--json").stdout)
    (found,) = (one for one in answer["services"] if one["service"] == service.name)
    return [(one["path"], one["image"], one["change"]) for one in found["drifted"]]


def said(service: Service) -> int:
    return sum(DRIFT in line for line in service.log_lines())


def test_a_file_of_the_host_changes_below_one_of_an_image(place: Place, etc: Path) -> None:
    service = on(place)
    assert drifted(service) == [] and said(service) == 0
    replaced(etc / "web.conf", "upgraded\n")
    line = service.logged(DRIFT)
    assert "/etc/web.conf changed (web 1.4 covers it)" in line
    assert f"confext-watcher diff {service.name} --from none" in line
    assert "level=warning" in line or "warning" in line
    assert drifted(service) == [("/etc/web.conf", "web 1.4", "changed")]
    for words in (["status"], ["status", service.name]):
        shown = place.run(*words).stdout
        assert "/etc/web.conf changed (web 1.4)" in shown
        assert f"confext-watcher diff {service.name} --from none" in shown
    compared = place.run("diff", service.name, check=False).stdout
    assert (
        "/etc/web.conf: the host's own file changed since web 1.4, which covers it, was accepted" in compared
    )
    assert "-upgraded\n+1.4\n" in place.run("diff", service.name, "--from", "none", check=False).stdout
    assert service.has("1.4")
    # Once, also over a restart of the watcher.
    assert place.daemon is not None
    assert said(service) == 1
    place.daemon.stop()
    place.start_daemon()
    assert drifted(service) == [("/etc/web.conf", "web 1.4", "changed")]
    place.run("status", service.name)
    assert said(service) == 0
    # Each further change again, and it is over with a newer stack.
    replaced(etc / "web.conf", "upgraded again\n")
    service.logged(DRIFT)
    service.put("1.5")
    service.reloaded("1.5")
    noted(service)
    assert drifted(service) == []


def test_one_that_comes_and_one_that_goes(place: Place, etc: Path) -> None:
    (etc / "web.conf").unlink()
    service = on(place)
    (etc / "unrelated").write_text("x")
    replaced(etc / "web.conf", "new\n")
    assert "/etc/web.conf came (web 1.4 covers it)" in service.logged(DRIFT)
    (etc / "web.conf").unlink()
    deadline = time.monotonic() + 30
    while drifted(service):  # as it was
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said(service) == 1


def test_the_same_content_is_no_drift_and_what_happens_while_the_watcher_is_down_is(
    place: Place, etc: Path
) -> None:
    service = on(place)
    os.utime(etc / "web.conf", (1, 1))
    replaced(etc / "web.conf", "the host's\n")
    place.run("status", service.name)
    assert drifted(service) == [] and said(service) == 0
    assert place.daemon is not None
    place.daemon.stop()
    (etc / "web.conf").unlink()
    place.start_daemon()
    assert "/etc/web.conf went (web 1.4 covers it)" in service.logged(DRIFT)


def test_what_is_written_in_place_is_found_by_status(place: Place, etc: Path) -> None:
    service = on(place)
    (etc / "web.conf").write_text("by hand\n")
    found = place.run("status", service.name).stdout
    assert "/etc/web.conf changed (web 1.4)" in found
    service.logged(DRIFT)


def test_a_record_of_an_older_version_has_nothing_and_counts_from_now_on(place: Place, etc: Path) -> None:
    service = on(place)
    assert place.daemon is not None
    place.daemon.stop()
    path = place.state / "units" / f"{service.name}.exec" / ".state.json"
    record = json.loads(path.read_text())
    del record["covers"]
    path.write_text(json.dumps(record))
    replaced(etc / "web.conf", "before it was noted\n")
    place.start_daemon()
    noted(service)
    assert drifted(service) == []
    replaced(etc / "web.conf", "after\n")
    service.logged(DRIFT)
