# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a check has refused is tried again when somebody acts on it (rounds/retry.py); on systemd: tests/beds/."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scenarios.place import Place, Service, until
from support.needs import root

pytestmark = root


def copy(source: Path, target: Path) -> None:
    """As `cp -r` does it, also over what is there."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def copied_over(file: Path) -> None:
    aside = file.with_name(f".aside-{time.monotonic_ns()}")
    copy(file, aside)
    copy(aside, file)


def moved_away_and_back(file: Path) -> None:
    file.rename(file.with_name(".aside"))
    file.with_name(".aside").rename(file)


def removed_and_copied(file: Path) -> None:
    aside = file.with_name(f".aside-{time.monotonic_ns()}")
    file.rename(aside)
    copy(aside, file)


def copied_under_a_new_name(file: Path) -> None:
    copy(file, file.with_name(f"web_{time.monotonic_ns()}{file.suffix}"))


ACTS: dict[str, Callable[[Path], None]] = {
    "touch": os.utime,
    "cp": copied_over,
    "rm-cp": removed_and_copied,
    "mv": moved_away_and_back,
    "new-name": copied_under_a_new_name,
}


def refused(place: Place) -> tuple[Service, Path, Path]:
    """A service whose check waits for a file that is not there; that file, and the image that was refused for it."""
    place.start_daemon()
    cause = place.path / "dns-up"
    service = place.start("--reload-signal", "SIGHUP", "--check", f"test -e {cause}")
    image = service.put("4")
    service.logged("refused: check")
    return service, cause, image


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_the_same_content_is_checked_again_when_its_file_is_touched(
    place: Place, act: Callable[[Path], None]
) -> None:
    service, cause, image = refused(place)
    act(image)
    service.logged("refused: check")  # said anew, because somebody asks
    cause.touch()
    act(image)
    service.logged("web [0-9]+ added, applied")
    assert kept_out(service) == []


def test_what_is_not_there_any_more_is_not_kept_out(place: Place) -> None:
    service, _, image = refused(place)
    until(lambda: kept_out(service) == [str(image)])
    image.rename(image.with_name(".aside"))
    until(lambda: kept_out(service) == [])
    other = service.put("3")
    service.logged("web 3 added, refused: check")
    until(lambda: kept_out(service) == [str(other)])


def kept_out(service: Service) -> list[str]:
    return [one["source"] for one in service.status()["quarantined"]]


def test_another_check_is_another_judge(place: Place) -> None:
    service, cause, _ = refused(place)
    service.kill()
    service = place.start("--reload-signal", "SIGHUP", "--check", "true", name=service.name)
    service.logged("web 4 added, applied")
    assert not cause.exists()


def test_a_script_that_the_check_runs_is_part_of_it(place: Place) -> None:
    script = place.path / "check"
    script.write_text("exit 3\n")
    place.start_daemon()
    service = place.start("--reload-signal", "SIGHUP", "--check", f"/bin/sh {script}")
    service.put("4")
    service.logged("refused: check", "status 3")
    script.write_text("exit 0\n")
    service.logged("web 4 added, applied")


@pytest.mark.parametrize("again", ["touch", "start"])
def test_what_the_service_does_no_better_without_is_not_to_blame(place: Place, again: str) -> None:
    """A reload that fails with the image and without it, until its cause is mended."""
    cause = place.path / "dns-up"
    cause.touch()
    place.start_daemon()
    options = ("--reload-command", f"test -e {cause}")
    service = place.start(*options)
    service.put("1")
    service.logged("web 1 added, applied")
    cause.unlink()
    image = service.put("2")
    service.logged("that failed too", "so web 2 is not to blame")
    until(lambda: kept_out(service) == [])  # it is recorded after it was said
    cause.touch()
    if again == "touch":
        os.utime(image)
    else:
        service.kill()
        service = place.start(*options, name=service.name)
    service.logged("web 1 -> 2 applied" if again == "touch" else "web 2")
    until(lambda: [layer["version"] for layer in service.status()["layers"]] == ["2"])
