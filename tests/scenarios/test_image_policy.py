# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies decide what gets in: `ImagePolicy=` of all services and of one, on real mounts."""

from __future__ import annotations

import json
import re
import signal

from scenarios.place import Daemon, Place


def read_again(place: Place, daemon: Daemon, *lines: str) -> None:
    place.configure(*lines)
    daemon.send(signal.SIGHUP)
    daemon.log.wait_for("settings read again")


def assert_status_tells(place: Place, service: str, stays: str) -> None:
    said = place.run("status", service).stdout
    assert re.search(stays, said)
    assert "web 1: unprotected" in said
    (told,) = json.loads(place.run("status", "--json", service).stdout)["services"]
    assert [one["path"].endswith(f"/web_1{place.suffix}") for one in told["notAllowed"]] == [True]
    assert told["layers"][0]["trust"]["protection"] == "unprotected"


def test_what_a_policy_does_not_allow_is_refused_by_name_and_line_and_gets_in_once_it_may(
    place: Place,
) -> None:
    place.configure("ImagePolicy=any")
    daemon = place.start_daemon()
    service = place.start(name="web.service")
    service.put("1")
    service.logged("web 1 added, applied")

    read_again(place, daemon, "ImagePolicy=verity")
    stays = (
        f"web_1{place.suffix}: stays, but would not get in now: (it|a directory tree) is unprotected, and Im"
    )
    service.logged(stays)
    service.put("2")
    said = service.logged("web_2.*refused: (it|a directory tree) is unprotected, and ImagePolicy=verity")
    assert f"({place.conf}/watcher.conf:2) asks for signed or verity: " in said
    assert "it keeps web 1" in said
    assert service.has("1")
    # No other program knows this reason: so `wait` and `plan` say it too.
    waited = place.run("wait", "--timeout", "5", service.name, f"web_2{place.suffix}", check=False)
    assert waited.returncode == 1 and "ImagePolicy=verity" in waited.stdout + waited.stderr
    planned = place.run("plan", service.name).stdout
    assert "no change" in planned and re.search(stays, planned)
    assert "ImagePolicy=verity" in planned
    assert_status_tells(place, service.name, stays)
    assert len([line for line in service.log_lines() if re.search(stays, line)]) == 1

    place.configure("ImagePolicy=singed")
    daemon.send(signal.SIGHUP)
    daemon.log.wait_for("watcher.conf:2: nothing new gets in: ImagePolicy= is no policy: singed")
    service.put("3")
    service.logged("web_3.*refused: nothing new gets in, ImagePolicy= .* is no policy: singed has no =")
    assert service.has("1")

    daemon.stop()
    place.configure("ImagePolicy=verity")
    assert_status_tells(place, service.name, stays)  # it needs no daemon for that

    place.configure("ImagePolicy=*")
    place.start_daemon()
    service.logged("web 1 -> 3 applied")
    assert service.has("3")


def test_the_policy_of_one_service_is_for_that_one(place: Place) -> None:
    place.start_daemon()
    strict = place.start("--set", "ImagePolicy=root=signed+absent", name="strict.service")
    free = place.start(name="free.service")
    for service in (strict, free):
        service.put("1")
    free.logged("web 1 added, applied")
    strict.logged(
        r"refused: .* is unprotected, and ImagePolicy=root=signed\+absent \(--set\) asks for signed: "
    )
    assert not strict.etc("web.conf").exists()


def test_a_policy_may_name_file_systems(place: Place) -> None:
    """The images of these tests are squashfs; a tree has no file system that the kernel has to read."""
    place.configure("ImagePolicy=root=erofs+ext4")
    daemon = place.start_daemon()
    service = place.start(name="web.service")
    service.put("1")
    if place.suffix == ".raw":
        service.logged("refused: it is squashfs, and ImagePolicy=.* asks for erofs or ext4: build it so")
        read_again(place, daemon, "ImagePolicy=root=erofs+squashfs")
    service.logged("web 1 added, applied")
