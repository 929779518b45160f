# SPDX-License-Identifier: LGPL-2.1-or-later
"""Discoverable disk images (GPT): applied as a bare file system is, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest

from scenarios.place import Place, Service, image, until
from support.disks import disk
from support.needs import filesystem, tool
from support.signed import protected

images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
formats = pytest.mark.parametrize(
    "fstype",
    ["squashfs"]
    + [pytest.param(one, marks=[tool(f"mkfs.{one}"), filesystem(one)]) for one in ("erofs", "ext4", "btrfs")],
)


@pytest.fixture
def service(shared: Place) -> Service:
    return shared.start()


def made(version: str, fstype: str = "squashfs", sector: int = 512) -> bytes:
    return disk(image(f"web_{version}", version, fstype=fstype).read_bytes(), sector=sector)


def loops(copy: str) -> int:
    """How many loop devices there are over a copy in the store."""
    found = 0
    for one in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found += one.read_text().strip() == copy
    return found


@images_only
@formats
@pytest.mark.parametrize("sector", [512, 4096])
def test_it_is_applied_and_undone_like_any_image(service: Service, fstype: str, sector: int) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    path = service.versions / "web_1.4.raw"
    path.write_bytes(made("1.4", fstype=fstype, sector=sector))
    service.reloaded("1.4")
    (layer,) = service.status()["layers"]
    assert layer["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    service.put("1.5")
    service.reloaded("1.5")
    (service.versions / "web_1.5.raw").unlink()
    service.reloaded("1.4")


@images_only
@tool("veritysetup")
def test_an_upload_is_incomplete_until_its_last_byte(service: Service) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    content = protected(image("web_1.4", "1.4").read_bytes())
    path = service.versions / "web_1.4.raw"
    there = 0
    for end in (600, 700, 30_000, len(content) - 512, len(content) - 1):
        with path.open("ab") as upload:
            upload.write(content[there:end])
        there = end
        service.logged("web_1.4.raw", f"incomplete: {end} (of {len(content)} )?bytes are here")
        assert service.has("1.3")
    with path.open("ab") as upload:
        upload.write(content[there:])
    service.reloaded("1.4")


@images_only
@tool("veritysetup")
def test_a_flipped_bit_is_refused_and_the_stack_stays(service: Service) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    content = bytearray(protected(image("web_1.4", "1.4").read_bytes()))
    good = bytes(content)
    content[40960 + 200] ^= 1  # behind the superblock
    path = service.versions / "web_1.4.raw"
    path.write_bytes(content)
    service.logged("web_1.4.raw", "its file system is damaged at byte 0 or soon after, by its hash tree")
    assert service.has("1.3")
    path.write_bytes(good)
    service.reloaded("1.4")


@pytest.mark.parametrize("place", ["images"], indirect=True)
def test_killed_the_daemon_leaves_a_loop_device_only_to_what_runs_on_it(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    path = service.versions / "web_1.4.raw"
    path.write_bytes(made("1.4"))
    service.reloaded("1.4")
    copy = f"{place.path}/state/store/{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert place.daemon is not None
    place.daemon.kill()
    until(lambda: loops(copy) == 1)
    assert service.has("1.4")
    service.kill()
    until(lambda: loops(copy) == 0)
