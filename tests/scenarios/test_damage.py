# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy in the store that is not any more what it was: found before it is used, taken again, and a service starts."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scenarios.place import Daemon, Place, Service, tree, until
from support.needs import root, tool
from watcher.rounds.facts import AFTERGLOW_USEC

pytestmark = [root, tool("mksquashfs"), pytest.mark.parametrize("place", ["images"], indirect=True)]

NAME = "web.service"


def flipped(path: Path, offset: int) -> None:
    """Sixteen bytes are other ones."""
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(16)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in before))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "superblock": lambda path: flipped(path, 0),
    "data": lambda path: flipped(path, 100),
    "truncated": truncated,
    "removed": Path.unlink,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def copy_of(place: Place, dropped: Path) -> Path:
    return place.state / "store" / hashlib.sha256(dropped.read_bytes()).hexdigest()


def is_whole(copy: Path) -> bool:
    return copy.exists() and hashlib.sha256(copy.read_bytes()).hexdigest() == copy.name


def ran(place: Place, *versions: str) -> list[Path]:
    """Once on each of these versions, one after another, without a daemon; the files."""
    dropped = []
    for version in versions:
        place.versions(NAME).mkdir(parents=True, exist_ok=True)
        target = place.versions(NAME) / f"web_{version}.raw"
        place.bring(place.confext(version), target)
        dropped.append(target)
        service = place.start(name=NAME)
        assert service.heard == [version]
        place.services.pop().kill()
    return dropped


def starts(place: Place) -> Service:
    return place.start(name=NAME)


@damages
def test_it_is_taken_from_the_dropped_file_again(place: Place, damage: Callable[[Path], None]) -> None:
    (dropped,) = ran(place, "1.3")
    damage(copy_of(place, dropped))
    service = starts(place)
    assert service.heard == ["1.3"]
    assert is_whole(copy_of(place, dropped))
    said = [line for line in service.errors.read() if "is damaged and not used any more" in line]
    assert len(said) == (0 if damage is Path.unlink else 1)


@damages
def test_where_the_dropped_file_is_damaged_too_the_stack_before_it_is_used(
    place: Place, damage: Callable[[Path], None]
) -> None:
    old, dropped = ran(place, "1.2", "1.3")
    old.unlink()
    damage(copy_of(place, dropped))
    truncated(dropped)
    service = starts(place)
    assert service.heard == ["1.2"]
    service.errors.wait_for("the copy of web 1.3 in the store is damaged", "web 1.2 is used instead")
    # And it stays so, whoever looks again.
    service.kill()
    assert starts(place).heard == ["1.2"]
    place.start_daemon()
    assert place.services[-1].status()["layers"][0]["version"] == "1.2"


@damages
@pytest.mark.parametrize("gone", [False, True], ids=["damaged too", "gone"])
def test_a_service_starts_though_nothing_is_whole(
    place: Place, damage: Callable[[Path], None], gone: bool
) -> None:
    (dropped,) = ran(place, "1.3")
    damage(copy_of(place, dropped))
    if gone:
        dropped.unlink()
    else:
        truncated(dropped)
    service = starts(place)
    assert service.heard == ["nothing"]
    if not gone:
        service.errors.wait_for("nothing in the store is whole, it starts with the host's /etc")


def test_a_service_with_a_check_starts_on_what_is_whole(place: Place) -> None:
    """What is new waits for its check, and what it had is damaged."""
    old, dropped = ran(place, "1.2", "1.3")
    damaged = copy_of(place, dropped)
    flipped(damaged, 0)
    dropped.unlink()
    place.bring(place.confext("1.4"), place.versions(NAME) / "web_1.4.raw")
    old.unlink()
    service = place.start("--check", "/bin/true", "--reload-signal", "SIGHUP", name=NAME)
    assert service.heard == ["1.2"]


@damages
def test_the_same_file_dropped_again_mends_it(place: Place, damage: Callable[[Path], None]) -> None:
    place.start_daemon()
    service = starts(place)
    dropped = service.put("1.3")
    service.reloaded("1.3")
    copy = copy_of(place, dropped)
    damage(copy)
    service.put("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    service.remove("1.4")
    service.reloaded("1.3")
    assert is_whole(copy)


@damages
def test_a_daemon_looks_at_all_copies_before_it_is_ready(
    place: Place, damage: Callable[[Path], None]
) -> None:
    (dropped,) = ran(place, "1.3")
    service = starts(place)
    damage(copy_of(place, dropped))
    place.start_daemon()
    service.put("1.4")
    service.reloaded("1.4")
    service.remove("1.4")
    service.reloaded("1.3")
    assert is_whole(copy_of(place, dropped))


def test_a_file_is_missing_in_the_copy_of_a_tree(place: Place) -> None:
    place.drops(NAME).mkdir()
    shutil.copytree(tree("web", "whole"), place.drops(NAME) / "web")
    service = starts(place)
    assert service.heard == ["whole"]
    service.kill()
    (copy,) = (path for path in (place.state / "store").iterdir() if path.is_dir() and path.name[0] != ".")
    (copy / "etc/web.conf").unlink()
    assert starts(place).heard == ["whole"]
    assert (copy / "etc/web.conf").read_text().strip() == "whole"


def test_what_a_running_service_sees_of_a_damaged_tree_stays(place: Place) -> None:
    daemon = place.start_daemon()
    place.drops(NAME).mkdir()
    shutil.copytree(tree("web", "whole"), place.drops(NAME) / "web")
    service = starts(place)
    daemon.log.wait_for("started well on web")  # it has read the copy
    (copy,) = (path for path in (place.state / "store").iterdir() if path.is_dir() and path.name[0] != ".")
    (copy / "etc/extra").touch()
    place.bring(tree("other", "1", name="other"), place.drops(NAME) / "other")
    service.reloaded("whole")
    assert service.has("1", "other.conf") and service.has("whole")


# --- found in the background ---


def scrubbing(place: Place) -> Daemon:
    place.configure("SettleSec=20ms", "ScrubSec=1s")
    return place.start_daemon()


def store_of(place: Place) -> list[str]:
    return [path.name for path in (place.state / "store").iterdir() if path.name not in (".lock", ".names")]


@pytest.mark.parametrize("kind", ["image", "tree"])
def test_a_running_service_gets_the_copy_that_was_made_anew(place: Place, kind: str) -> None:
    daemon = scrubbing(place)
    service = starts(place)
    dropped = service.put("1.3")
    service.reloaded("1.3")
    copy = copy_of(place, dropped)
    damaged = copy
    if kind == "tree":
        dropped.unlink()
        service.reloaded("nothing")
        place.bring(tree("web_1.3", "1.3"), place.drops(NAME) / "web")
        service.reloaded("1.3")
        (copy,) = (path for path in (place.state / "store").iterdir() if path.is_dir())
        damaged = copy / "etc/web.large"
    inode = copy.stat().st_ino
    flipped(damaged, 100)
    service.logged("its copy in the store was damaged and is whole again, same stack applied anew", "SIGHUP")
    service.reloaded("1.3")
    assert service.has("1.3") and copy.stat().st_ino != inode
    assert service.etc("web.large").read_bytes() == (tree("web_1.3", "1.3") / "etc/web.large").read_bytes()
    assert len([line for line in daemon.log.read() if "is damaged and not used any more" in line]) == 1
    until(lambda: copy.name in store_of(place) and not [one for one in store_of(place) if one[0] == "."])
    assert service.heard.count("1.3") == (2 if kind == "image" else 3)


def test_one_damaged_copy_that_services_share_is_made_anew_once_for_all(place: Place) -> None:
    daemon = scrubbing(place)
    services = [place.start(name=f"web-{number}.service") for number in range(3)]
    for service in services:
        dropped = service.put("1.3")
    for service in services:
        service.reloaded("1.3")
    flipped(copy_of(place, dropped), 100)
    for service in services:
        service.reloaded("1.3")
    said = [line for line in daemon.log.read() if "was made anew, in the place of the damaged one" in line]
    assert len(said) == 1


def test_a_running_service_goes_back_where_its_file_is_damaged_too(place: Place) -> None:
    scrubbing(place)
    service = starts(place)
    older = service.put("1.2")
    service.reloaded("1.2")
    dropped = service.put("1.3")
    service.reloaded("1.3")
    copy = copy_of(place, dropped)
    older.unlink()
    truncated(dropped)
    flipped(copy, 100)
    service.reloaded("1.2")
    service.logged("1.3 -> 1.2", "is damaged")
    service.put("1.3")
    service.reloaded("1.3")
    assert is_whole(copy)


def test_a_service_gets_the_new_copy_though_the_watcher_was_away_when_that_was_made(place: Place) -> None:
    daemon = place.start_daemon()
    service = starts(place)
    dropped = service.put("1.3")
    service.reloaded("1.3")
    daemon.kill()
    flipped(copy_of(place, dropped), 100)
    place.versions("other.service").mkdir(parents=True)
    place.bring(place.confext("1.3"), place.versions("other.service") / "web_1.3.raw")
    other = place.start(name="other.service")
    assert other.heard == ["1.3"] and is_whole(copy_of(place, dropped))
    assert len(store_of(place)) == 2  # what the service shows is still there
    place.start_daemon()
    service.logged("its copy in the store was damaged and is whole again")
    service.reloaded("1.3")
    until(lambda: store_of(place) == [copy_of(place, dropped).name])


def test_the_copy_that_a_service_may_go_back_to_is_made_anew_too(place: Place) -> None:
    daemon = scrubbing(place)
    service = starts(place)
    older = copy_of(place, service.put("1.2"))
    service.reloaded("1.2")
    service.put("1.3")
    service.reloaded("1.3")
    flipped(older, 100)
    daemon.log.wait_for("was made anew, in the place of the damaged one")
    assert is_whole(older)
    service.remove("1.3")
    service.reloaded("1.2")
    assert service.heard == ["nothing", "1.2", "1.3", "1.2"]


def test_what_one_of_many_may_go_back_to_is_made_anew_though_the_others_have_the_same_files(
    place: Place,
) -> None:
    place.configure("SettleSec=20ms", "ScrubSec=4s")
    daemon = place.start_daemon()
    versions = place.path / "shared/web.raw.v"
    versions.mkdir(parents=True)

    def start(name: str) -> Service:
        options = ("--confext-dir", str(versions.parent), "--reload-signal", "HUP")
        return place.start(*options, name=name, declared=False)

    service = start(NAME)
    for version in ("1.2", "1.3"):
        place.bring(place.confext(version), versions / f"web_{version}.raw")
        service.reloaded(version)
    time.sleep(AFTERGLOW_USEC / 1e6)
    service.kill()
    place.services.remove(service)
    for number in range(8):  # which never had the first version, and are looked at first
        start(f"a{number}.service")
    start(NAME)
    older = copy_of(place, versions / "web_1.2.raw")
    flipped(older, 100)
    daemon.log.wait_for("was made anew, in the place of the damaged one")
    assert is_whole(older)


def test_a_running_service_keeps_what_it_has_where_nothing_is_whole(place: Place) -> None:
    daemon = scrubbing(place)
    service = starts(place)
    dropped = service.put("1.3")
    service.reloaded("1.3")
    copy = copy_of(place, dropped)
    truncated(dropped)
    flipped(copy, 100)
    service.logged("the copy of web 1.3 in the store is damaged", "it keeps what it has")
    assert service.status()["last"]["outcome"] == "failed"
    place.bring(tree("other", "1", name="other"), place.drops(NAME) / "other")
    said = [line for line in daemon.log.read() if "it keeps what it has" in line and "1.3" in line]
    assert len(said) == 1
    service.put("1.4")
    service.reloaded("1.4")
    assert service.has("1", "other.conf")
    assert service.heard == ["nothing", "1.3", "1.4"]
