# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory tree has no end of its own: half of one never goes live."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.place import Place, Service, shell
from support.needs import userns
from watcher.resolve.content import MARKER

pytestmark = userns

FILES = 12
RELEASE = "etc/extension-release.d/extension-release.site"


def make(root: Path, value: str) -> Path:
    """A tree whose files all have the same content; its release file is the first."""
    release = root / RELEASE
    release.parent.mkdir(parents=True)
    release.write_text("ID=_any\n")
    for number in range(FILES):
        (root / f"etc/site.d/{number}").mkdir(parents=True)
        (root / f"etc/site.d/{number}/conf").write_text(f"{value}\n")
    (root / "etc/web.conf").write_text(f"{value}\n")
    return root


def slowly(source: Path, target: Path, pause: float = 0.25) -> Iterator[None]:
    """As `cp -r` over a slow link: file by file, in place where there is one. What a reload reads comes first."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    first = [source / RELEASE, source / "etc/web.conf"]
    for path in (*first, *(path for path in files if path not in first)):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("w") as file:  # opened and closed once for each
            file.write(path.read_text())
        time.sleep(pause)
        yield


def shown(service: Service) -> set[str]:
    """What the files of the tree say in the service's `/etc`."""
    paths = [service.etc("web.conf"), *service.etc("site.d").glob("*/conf")]
    return {path.read_text().strip() for path in paths}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path, trees=True) as made:
        yield made


@pytest.fixture
def patient(place: Place) -> Service:
    """A service that is told of a change after a second without another one."""
    place.configure("SettleSec=20ms", "SettleTreeSec=1s")
    place.start_daemon()
    return place.start()


@pytest.fixture
def exact(place: Place) -> Service:
    """A service to which only an exact end matters."""
    place.configure("SettleSec=20ms", "SettleTreeSec=1h", "SettleTreeMaxSec=1h", "LogLevel=debug")
    place.start_daemon()
    return place.start()


def test_a_slow_copy_over_a_live_tree_is_one_reload(patient: Service, tmp_path: Path) -> None:
    live = patient.drops / "site"
    make(tmp_path / "aside", "one").rename(live)
    patient.reloaded("one")
    for _ in slowly(make(tmp_path / "two", "two"), live):
        assert shown(patient) == {"one"}
    patient.reloaded("two")
    assert shown(patient) == {"two"}
    assert patient.heard.count("two") == 1


def test_a_new_version_that_comes_slowly(patient: Service, tmp_path: Path) -> None:
    versions = patient.drops / "site.v"
    versions.mkdir()
    make(tmp_path / "aside", "11").rename(versions / "site_11")
    patient.reloaded("11")
    for _ in slowly(make(tmp_path / "made", "12"), versions / "site_12"):
        assert shown(patient) == {"11"}
    patient.reloaded("12")
    assert shown(patient) == {"12"}
    assert not [line for line in patient.log_lines() if "refused" in line or "incomplete" in line]


def test_a_file_that_is_open_for_writing_keeps_a_tree_out(patient: Service, tmp_path: Path) -> None:
    with (make(tmp_path / "aside", "one") / "etc/more.conf").open("w") as file:
        (tmp_path / "aside").rename(patient.drops / "site")
        patient.put("7")
        patient.logged("web 7 added, applied")
        assert not patient.etc("site.d").exists()
        file.write("whole\n")
    patient.logged("site added, applied")
    assert patient.etc("more.conf").read_text() == "whole\n"


@pytest.mark.parametrize(
    "bring",
    [
        "mv {0} {1}",
        "cp -r {0} {1}.part; sleep 0.05; mv {1}.part {1}",
        "cp -r {0} {2}/target; sleep 0.05; ln -s {2}/target {1}",
        "ln -s {2} {2}/link; cp -r {0} {2}/new; sleep 0.05; ln -s {2}/link/new {1}",
        "cp -r {0} {1}; sleep 0.05; touch {1}/" + MARKER,
    ],
)
def test_an_exact_end_is_not_waited_for(exact: Service, tmp_path: Path, bring: str) -> None:
    shell(bring, make(tmp_path / "made", "one"), exact.drops / "site", tmp_path)
    exact.reloaded("one")
    assert shown(exact) == {"one"}


@pytest.mark.parametrize(
    "bring",
    [
        "cp -r {0} {1}",
        "mkdir {1}; touch {1}/" + MARKER + "; sleep 0.05; cp -r {0}/etc {1}",
        "ln -s {2}/target {1}; sleep 0.05; cp -r {0} {2}/target",
        "mkdir {1}; cp -r {0}/etc {1}; chmod 0711 {1}",
    ],
)
def test_what_is_no_end_is_waited_for(exact: Service, tmp_path: Path, bring: str) -> None:
    heard = len(exact.heard)
    shell(bring, make(tmp_path / "made", "one"), exact.drops / "site", tmp_path)
    exact.put("7")  # which is renamed
    exact.logged("web 7 added, applied")
    exact.reloaded("7")
    assert not exact.etc("site.d").exists()
    assert len(exact.heard) == heard + 1
    if not (exact.drops / "site").is_symlink():
        shell("sleep 0.05; mv {0} {0}.part; mv {0}.part {0}", exact.drops / "site")
        exact.logged("site added, applied")


def test_a_link_that_is_flipped(exact: Service, tmp_path: Path) -> None:
    for value in ("one", "two"):
        make(tmp_path / value, value)
        shell("sleep 0.05; ln -sfn {0} {1}", tmp_path / value, exact.drops / "site")
        exact.reloaded(value)
        assert shown(exact) == {value}


def test_who_uses_markers_is_waited_for(place: Place, tmp_path: Path) -> None:
    """However quiet it has been: the tree before had a marker."""
    place.configure("SettleSec=20ms", "SettleTreeSec=20ms")
    place.start_daemon()
    service = place.start()
    versions = service.drops / "site.v"
    versions.mkdir()
    make(tmp_path / "one", "one")
    (tmp_path / "one" / MARKER).touch()
    (tmp_path / "one").rename(versions / "site_1")
    service.reloaded("one")
    shutil.copytree(make(tmp_path / "two", "two"), versions / "site_2")
    line = service.logged(
        "site_2 incomplete", f"has a {MARKER}, and this one has none yet", "it keeps site 1"
    )
    assert "level=warning" in line
    assert shown(service) == {"one"}
    (versions / "site_2" / MARKER).touch()
    service.reloaded("two")
    assert MARKER not in os.listdir(service.etc("."))
    (versions / "site_2" / MARKER).unlink()  # as one begins to change it in place
    (versions / "site_2/etc/web.conf").write_text("three\n")
    service.logged("site_2 incomplete", f"has a {MARKER}")
    assert shown(service) == {"two"}
    (versions / "site_2" / MARKER).touch()
    service.reloaded("three")


def test_a_service_that_is_started_on_a_new_tree_has_it_from_the_start(place: Place, tmp_path: Path) -> None:
    place.configure("SettleSec=20ms", "SettleTreeSec=1s")
    place.start_daemon()
    drops = place.drops("own.service")
    drops.mkdir()
    shutil.copytree(make(tmp_path / "made", "one"), drops / "site")
    service = place.start(name="own.service")
    assert service.heard == ["one"]
    service.errors.wait_for("waits until .*/site is complete")


def test_a_start_does_not_wait_for_a_tree_without_end(place: Place, tmp_path: Path) -> None:
    place.configure("SettleTreeSec=100ms", "SettleTreeMaxSec=1h")
    drops = place.drops("own.service")
    drops.mkdir()
    live = drops / "site"
    shutil.copytree(make(tmp_path / "made", "one"), live)
    os.utime(live / "etc/web.conf")
    shell(
        "(while [ -e {0}/go ]; do touch {1}/etc/web.conf; sleep 0.02; done) & echo $! > {0}/pid",
        make_go(tmp_path),
        live,
    )
    try:
        service = place.start(name="own.service", wait=False)
        service.said.wait_for("^started")
    finally:
        (tmp_path / "go").unlink()


def make_go(path: Path) -> Path:
    (path / "go").touch()
    return path
