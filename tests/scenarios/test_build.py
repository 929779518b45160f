# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `build` makes is a drop: made in the directory of a service that runs, it is applied, once and whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from scenarios.place import Place
from support.needs import tool

pytestmark = [
    tool("mksquashfs"),
    # An image needs root.
    pytest.mark.parametrize("place", ["images"], indirect=True),
]


@pytest.fixture
def web(place: Place) -> Path:
    (place.path / "web/etc").mkdir(parents=True)
    return place.path / "web"


@pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=tool("mkfs.erofs"))])
def test_an_image_that_is_made_in_the_drop_directory_is_applied(place: Place, web: Path, fstype: str) -> None:
    place.start_daemon()
    service = place.start()
    for number, (version, value) in enumerate((("1", "one"), ("2", "two"), ("3", "three"))):
        (web / "etc/web.conf").write_text(f"{value}\n")
        drops = f"{place.versions(service.name)}/"
        said = place.run("build", str(web), "-o", drops, "--version", version, "--format", fstype).stdout
        assert said.startswith(f"{drops}web_{version}.raw: good: web {version}, {fstype}, ")
        service.logged(
            f"web.* (added|-> {version}), applied" if number == 0 else f"web {number} -> {version} applied"
        )
        service.reloaded(value)
    assert sorted(os.listdir(place.versions(service.name))) == ["web_1.raw", "web_2.raw", "web_3.raw"]
    # Nothing of what was on its way has been looked at, or said.
    assert not [line for line in service.log_lines() if ".#" in line or "incomplete" in line]


def test_what_is_built_again_is_the_same_and_no_reload(place: Place, web: Path) -> None:
    place.start_daemon()
    service = place.start()
    path = place.versions(service.name) / "web_1.raw"
    (web / "etc/web.conf").write_text("one\n")
    place.run("build", str(web), "-o", str(path))
    service.reloaded("one")
    (web / "etc/web.conf").write_text("one\n")  # another time, and that is all
    place.run("build", str(web), "-o", str(path))
    (web / "etc/web.conf").write_text("two\n")
    place.run("build", str(web), "-o", str(path.with_name("web_2.raw")))
    service.reloaded("two")
    assert service.heard == ["nothing", "one", "two"]


def test_a_secret_is_for_root_alone_all_the_way(place: Place, web: Path) -> None:
    place.start_daemon()
    service = place.start()
    (web / "etc/web.conf").write_text("one\n")
    (web / "etc/web.key").write_text("secret\n")
    (web / "etc/web.key").chmod(0o400)
    path = place.versions(service.name) / "web_1.raw"
    said = place.run("build", str(web), "-o", str(path)).stdout
    assert f"{path}: note: for root alone, as not all may read it here: etc/web.key\n" in said
    service.reloaded("one")
    assert stat.S_IMODE(service.etc("web.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(service.etc().stat().st_mode) == 0o755


def test_a_service_that_would_refuse_it_is_told_as_of_any_image(place: Place, web: Path) -> None:
    """It is made for another system, as it was asked for; here it is refused."""
    place.start_daemon()
    service = place.start()
    (web / "etc/web.conf").write_text("one\n")
    drops = f"{place.versions(service.name)}/"
    said = place.run("build", str(web), "-o", drops, "--version", "1", "--for", "plan9:4").stdout
    assert "note: it would be refused on this host: made for ID=plan9, and here it is ID=" in said
    service.logged("web_1.raw.*refused: made for ID=plan9")
