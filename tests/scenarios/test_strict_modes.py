# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may write to a drop directory, and what such a user can make root do: attacked as `nobody`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scenarios.place import Place, Service
from support.needs import root, tool
from support.nobody import AS_NOBODY, NOBODY

pytestmark = [root, tool("mksquashfs"), tool("setpriv")]


@pytest.fixture
def place(open_place: Place) -> Place:
    open_place.start_daemon()
    return open_place


@pytest.fixture
def secret(place: Place) -> Path:
    """An image that only root can read, in a directory that only root may enter."""
    directory = place.path / "secret"
    directory.mkdir(mode=0o700)
    path = directory / "web_9.raw"
    shutil.copyfile(place.confext("9", "password"), path)
    path.chmod(0o600)
    return path


def as_nobody(*words: str | Path) -> None:
    subprocess.run([*AS_NOBODY, *map(str, words)], check=True, stdin=subprocess.DEVNULL)


def given_away(service: Service) -> None:
    """To `nobody`, so that he may drop things."""
    os.chown(service.versions, NOBODY, NOBODY)


TRUSTED = ("--reload-signal", "SIGHUP", "--set", "TrustedUsers=nobody")


def test_nobody_reads_no_image_of_roots_through_a_link(place: Place, secret: Path) -> None:
    service = place.start(*TRUSTED)
    given_away(service)
    as_nobody("ln", "-s", secret, service.versions / "web_9.raw")
    service.logged("web_9.raw", "refused: ")
    service.put("1")
    service.reloaded("1")
    assert service.heard == ["nothing", "1"]


def test_nobody_reads_no_file_of_roots_in_a_tree_through_a_link(place: Place) -> None:
    place.trees, place.suffix = True, ""
    tree = place.path / "secret" / "web_9"
    shutil.copytree(place.confext("9", "password"), tree, symlinks=True)
    (tree / "etc/web.conf").chmod(0o600)
    service = place.start(*TRUSTED)
    given_away(service)
    as_nobody("ln", "-s", tree, service.versions / "web_9")
    service.logged("web_9", "refused: ")
    assert service.heard == ["nothing"]


def test_a_directory_of_nobodys_is_refused_unless_he_is_trusted(place: Place) -> None:
    service = place.start()
    service.put("1")
    service.reloaded("1")
    given_away(service)
    service.put("2")
    line = service.logged("web_2.raw", "refused: ")
    assert "TrustedUsers=nobody" in line and f"chown root {service.versions}" in line
    os.chown(service.versions, 0, 0)  # and by that alone
    service.reloaded("2")


def test_whom_the_service_names_may_drop(place: Place) -> None:
    service = place.start(*TRUSTED)
    given_away(service)
    path = service.put("1")
    service.reloaded("1")
    assert path.stat().st_uid == 0  # readable by everybody: root's own may lie there too
    made = place.path / "made.raw"
    shutil.copyfile(place.confext("2", "his"), made)
    as_nobody("install", "-m", "600", made, service.versions / ".web")
    as_nobody("mv", service.versions / ".web", service.versions / "web_2.raw")
    service.reloaded("his")


def test_a_way_that_others_can_change_is_refused_until_it_is_mended(place: Place) -> None:
    """By a directory far above, by a link of somebody else's, and for the images and the directory itself: a `chmod` is
    noticed, without a further drop."""
    above = place.path / "above"
    (above / "drops/web.raw.v").mkdir(parents=True)
    service = place.start("--reload-signal", "SIGHUP", "--confext-dir", str(above / "drops"), declared=False)
    versions = above / "drops/web.raw.v"
    service.put("1", at=versions)
    service.reloaded("1")
    service.put("2", at=versions)
    service.reloaded("2")
    for number, path in enumerate((above, above / "drops", versions), 3):
        path.chmod(0o777)
        service.put(str(number), at=versions)
        service.logged(f"web_{number}.raw refused: {path} is writable by everybody")
        path.chmod(0o755)
        service.reloaded(str(number))
    image = service.put("6", at=versions)
    service.reloaded("6")
    image = versions / "web_7.raw"
    shutil.copyfile(place.confext("7"), versions / ".7")
    (versions / ".7").chmod(0o666)
    (versions / ".7").rename(image)
    service.logged(f"web_7.raw refused: {image} is writable by everybody")
    image.chmod(0o644)
    service.reloaded("7")


def test_what_strangers_remove_stays_and_what_they_bring_is_answered(place: Place) -> None:
    service = place.start()
    service.put("1")
    service.reloaded("1")
    service.drops.chmod(0o777)
    service.versions.chmod(0o777)
    other = place.start(name="other.service")
    as_nobody("rm", service.versions / "web_1.raw")
    service.put("2")
    answer = place.run("wait", "--timeout", "30", service.name, "web_2.raw", check=False)
    assert answer.returncode == 1 and "is writable by everybody" in answer.stdout + answer.stderr
    assert "is writable by everybody" in place.run("plan", service.name).stdout
    assert "is writable by everybody" in place.run("history", service.name).stdout
    as_nobody("rm", "-r", service.versions)
    other.put("1")
    other.reloaded("1")
    assert service.has("1") and service.heard == ["nothing", "1"]


def test_the_log_is_no_oracle(place: Place, secret: Path) -> None:
    """What is said of a link does not depend on what is behind it."""
    service = place.start(*TRUSTED)
    given_away(service)
    said = []
    for number, target in enumerate(
        (secret, secret.parent / ".", secret / "none", secret.with_name("none")), 1
    ):
        as_nobody("ln", "-s", target, service.versions / f"web_{number}.raw")
        line = service.logged(f"web_{number}.raw", "refused: ")
        said.append(line.partition("refused: ")[2].partition(";")[0].replace(f"web_{number}.raw", "LINK"))
    assert len(set(said)) == 1
    assert service.heard == ["nothing"]


def test_exec_leaves_out_what_is_unsafe(place: Place) -> None:
    name = "web-late.service"
    place.versions(name).mkdir(parents=True)
    shutil.copyfile(place.confext("1"), place.versions(name) / "web_1.raw")
    place.versions(name).chmod(0o777)
    service = place.start(name=name)
    assert service.heard == ["nothing"]
    service.errors.wait_for("web_1.raw passed over: .* is writable by everybody")


def test_a_user_whom_nobody_knows_is_said_once(place: Place) -> None:
    service = place.start("--reload-signal", "SIGHUP", "--set", "TrustedUsers=no-such-user")
    service.put("1")
    service.reloaded("1")
    service.put("2")
    service.reloaded("2")
    said = [line for line in service.log_lines() if "no user is called no-such-user" in line]
    assert len(said) == 1


@pytest.mark.parametrize("there", [True, False])
def test_wait_does_not_tell_whether_anything_is_there(place: Place, secret: Path, there: bool) -> None:
    """A refusal stands for as long as the link is what it was, whatever has become of its target."""
    service = place.start(*TRUSTED)
    given_away(service)
    if not there:
        secret.unlink()
    as_nobody("ln", "-s", secret, service.versions / "web_9.raw")
    service.logged("web_9.raw", "refused: ")
    if there:
        secret.touch()
    answer = place.run("wait", "--timeout", "5", service.name, "web_9.raw", check=False)
    assert answer.returncode == 1, answer
