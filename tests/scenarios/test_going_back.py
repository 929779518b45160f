# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service does not go back to less while what comes next is on its way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scenarios.place import Place, Service, shell
from support.needs import tool


def start(place: Place, *settings: str) -> Service:
    place.configure("SettleSec=20ms", "LogLevel=debug", *settings)
    place.start_daemon()
    return place.start()


def batch(place: Place, path: Path, *versions: str) -> Path:
    """A directory of versions, to be uploaded."""
    path.mkdir()
    for version in versions:
        place.bring(place.confext(version), path / f"web_{version}{place.suffix}")
    return path


def test_the_last_version_stays_for_a_moment(place: Place) -> None:
    service = start(place, "RemoveSec=1h", "SettleMaxSec=50ms")
    service.put("1")
    service.reloaded("1")
    service.remove("1")
    service.logged("web_1.* gone, and stays for now")
    assert service.has("1")
    service.put("2")
    service.reloaded("2")
    assert service.heard == ["nothing", "1", "2"]


@pytest.mark.parametrize("what", ["{0}/web.*v/web_1*", "{0}/web.*v"])
def test_and_then_it_goes(place: Place, what: str) -> None:
    service = start(place, "RemoveSec=300ms", "SettleMaxSec=50ms")
    service.put("1")
    service.reloaded("1")

    shell(f"rm -r {what}", service.drops)
    service.logged("web_1.* gone, and stays for now")
    service.reloaded("nothing")
    service.logged("web 1 removed, applied")
    assert not service.etc("web.conf").exists()


def test_an_older_version_comes_back_at_once(place: Place) -> None:
    service = start(place, "RemoveSec=1h", "SettleMaxSec=50ms")
    for version in ("1", "2"):
        service.put(version)
        service.reloaded(version)
    service.remove("2")
    service.reloaded("1")


@tool("rsync")
@pytest.mark.parametrize("order", ["--delete-before", "--delete-during", "--delete-after"])
def test_rsync_with_delete(place: Place, tmp_path: Path, order: str) -> None:
    service = start(place, "RemoveSec=10s", "SettleMaxSec=2s")
    for version in ("1", "2"):
        made = batch(place, tmp_path / version, version)
        shell(f"rsync -a {order} --bwlimit=20 {{0}}/ {{1}}", made, service.versions)
        service.reloaded(version)
    assert service.heard == ["nothing", "1", "2"]


@tool("rsync")
def test_an_older_version_waits_for_an_upload(place: Place, tmp_path: Path) -> None:
    service = start(place, "RemoveSec=0", "SettleMaxSec=1h")
    service.put("1")
    service.reloaded("1")
    upload = service.versions / ".web_3.Xa81b2"
    upload.touch()
    service.put("2")
    service.reloaded("2")
    service.remove("2")
    service.logged("web_2.* gone, and stays for now")
    assert service.has("2")
    place.bring(place.confext("3"), tmp_path / "made")
    if (tmp_path / "made").is_dir():
        upload.unlink()
    shutil.move(tmp_path / "made", upload)
    upload.rename(service.versions / f"web_3{place.suffix}")
    service.reloaded("3")
    assert service.heard == ["nothing", "1", "2", "3"]


def test_an_upload_that_was_given_up_holds_nothing_for_ever(place: Place) -> None:
    service = start(place, "RemoveSec=0", "SettleMaxSec=500ms")
    for version in ("1", "2"):
        service.put(version)
        service.reloaded(version)
    with (service.versions / ".web_3.raw.Xa81b2").open("w"):
        service.remove("2")
        service.logged("web_2.* gone, and stays for now")
        assert service.has("2")
    service.reloaded("1")
