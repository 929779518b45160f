# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies decide what gets in: `ImagePolicy=` of all services and of one, on real mounts."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from scenarios.place import Daemon, Place
from support.needs import tool
from support.signed import Key, make_key, protected, trusted

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)


def read_again(place: Place, daemon: Daemon, *lines: str) -> None:
    place.configure(*lines)
    daemon.send(signal.SIGHUP)
    daemon.log.wait_for("settings read again")


def assert_status_tells(place: Place, service: str, stays: str) -> None:
    said = place.run("status", service).stdout
    assert re.search(stays, said)
    assert re.search(r"web 1 \([0-9a-f]{12}, unprotected\)", said)
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
    # An image waits for files beside it that would let it in (test_beside.py).
    word = "incomplete" if place.suffix == ".raw" else "refused"
    said = service.logged(f"web_2.*{word}: .*(it|a directory tree) is unprotected, and ImagePolicy=verity")
    assert f"({place.conf}/watcher.conf:2) asks for signed or verity: " in said
    assert "it keeps web 1" in said
    assert service.has("1")
    # No other program knows this reason: so `wait` and `plan` say it too.
    waited = place.run("wait", "--timeout", "5", service.name, f"web_2{place.suffix}", check=False)
    assert waited.returncode == (4 if place.suffix == ".raw" else 1)
    assert "ImagePolicy=verity" in waited.stdout + waited.stderr
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
        r"(refused|incomplete): .* is unprotected, and ImagePolicy=root=signed\+absent \(--set\) asks for signed: "
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


@images_only
@tool("veritysetup")
def test_of_several_images_only_one_by_an_unknown_key_is_kept_out_until_the_key_is_known(
    place: Place, tmp_path: Path
) -> None:
    known, other = make_key(tmp_path, "known"), make_key(tmp_path, "other")

    def signed(version: str, name: str, key: Key) -> bytes:
        return protected(place.confext(version, f"{name} {version}", name).read_bytes(), key)

    place.configure("ImagePolicy=signed")
    daemon = place.start_daemon()
    service = place.start(name="web.service")
    more = service.drops / "more.raw.v"
    more.mkdir()
    with trusted(known):
        (service.versions / "web_1.raw").write_bytes(signed("1", "web", known))
        service.logged("web 1 added, applied")
        (more / "more_1.raw").write_bytes(signed("1", "more", known))
        service.logged("more 1 added, applied")
        (service.versions / "web_2.raw").write_bytes(signed("2", "web", other))
        said = service.logged("web_2.raw refused: it is verity .*, and ImagePolicy=signed")
        assert "key" in said and "it keeps web 1" in said
        (more / "more_2.raw").write_bytes(signed("2", "more", known))
        service.logged("more 1 -> 2 applied")
        assert service.has("web 1") and service.has("more 2", "more.conf")
        told = place.run("status", service.name).stdout
        assert f" signed by CN=known (certificate sha256 {known.fingerprint}): " in told
        with trusted(other):
            service.logged("web 1 -> 2 applied")  # the certificate has come, nothing else has
            assert service.has("web 2")
        event = json.loads(place.run("history", "--json", service.name).stdout)["events"][0]
        assert [one["trust"]["signer"] for one in event["layers"] if one["name"] == "web"] == ["CN=other"]

    read_again(place, daemon, "ImagePolicy=verity")
    (service.versions / "web_3.raw").write_bytes(signed("3", "web", other))
    service.logged("web_3.raw: .*; let in, since no policy asks for more")
    service.logged("web 2 -> 3 applied")
