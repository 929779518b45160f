# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is taken over from a unit for a check before its start; that a real systemd takes it is in tests/beds/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from watcher.managers.systemd.exec_settings import of_next_start
from watcher.managers.systemd.sandbox_settings import Again
from watcher.managers.systemd.unit_drop_in import AS_IT_IS, MOUNT_OPTIONS
from watcher.model import Copy, Kind
from watcher.settings import device_mapper

SLOTS = "/var/lib/confext-watcher/units/web.service"
IMAGE = Copy("a" * 64, "/store/image", 1, Kind.IMAGE)
TREE = Copy("b" * 64, "/store/tree", 1, Kind.DIRECTORY)
UNIT: dict[str, tuple[str, Any]] = {
    "ExecStart": ("a(sasbttttuii)", [("/bin/web",)]),
    "User": ("s", "nobody"),
    "Group": ("s", ""),
    "PrivateTmp": ("b", True),
    "PrivateTmpEx": ("s", "disconnected"),
    "RestrictAddressFamilies": ("(bas)", (True, [])),
    "SystemCallFilter": ("(bas)", (False, [])),
    "ReadOnlyPaths": ("as", ["/srv"]),
    "RuntimeDirectory": ("as", ["web"]),
    "RuntimeDirectoryPreserve": ("s", "no"),
    "ExtensionImages": ("a(sba(ss))", [("/srv/sysext.raw", False, []), (f"{SLOTS}/web.raw", True, [])]),
    "ExtensionDirectories": ("as", [f"-{SLOTS}/tree"]),
}


def start(unit: dict[str, tuple[str, Any]], *copies: Copy, again: tuple[Again, ...] = ()) -> dict[str, Any]:
    return {key: value for key, (_, value) in of_next_start(unit, copies, SLOTS, again)}


def test_the_new_layers_take_the_place_of_those_in_the_slots() -> None:
    found = start(UNIT, IMAGE, TREE)
    root = [("root", MOUNT_OPTIONS)]
    assert found["ExtensionImages"] == [("/srv/sysext.raw", False, []), ("/store/image", False, root)]
    assert found["ExtensionDirectories"] == ["/store/tree"]


@pytest.mark.parametrize(
    ("there", "policy", "path"),
    [
        (True, "", "/store/protected"),
        (True, "root=signed", "/store/protected"),
        (True, AS_IT_IS, "/store/image"),
        (False, "", "/store/image"),
    ],
)
def test_an_image_is_verified_where_systemd_can_and_may_do_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, policy: str, path: str
) -> None:
    """The device mapper may have come after the generator, which has forbidden it."""
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
    found = start({"ExtensionImagePolicy": ("s", policy)}, replace(IMAGE, protected="/store/protected"))
    assert [one[0] for one in found["ExtensionImages"]] == [path]


def test_what_is_set_is_taken_over_and_nothing_of_the_service_itself() -> None:
    found = start(UNIT)
    assert found["User"] == "nobody" and found["RestrictAddressFamilies"] == (True, [])
    assert not {"ExecStart", "Group", "SystemCallFilter", "PrivateTmp"} & found.keys()
    assert found["PrivateTmpEx"] == "disconnected"
    assert (found["RuntimeDirectory"], found["RuntimeDirectoryPreserve"]) == (["web"], "yes")


def test_what_systemd_would_forget_of_the_sandbox_is_said_again_where_there_are_layers() -> None:
    again = (Again("ReadOnlyPaths", ("/usr/bin",)), Again("BindPaths", ("/srv/a", "/usr/a"), "norbind"))
    assert start(UNIT, again=again)["ReadOnlyPaths"] == ["/srv"]
    found = start(UNIT, IMAGE, again=again)
    assert found["ReadOnlyPaths"] == ["/srv", "-/usr/bin"]
    assert found["BindPaths"] == [("/srv/a", "/usr/a", True, 0)]


def test_loop_devices_of_images_are_allowed_only_where_others_are_not() -> None:
    closed = {**UNIT, "DevicePolicy": ("s", "closed"), "DeviceAllow": ("a(ss)", [("/dev/null", "rw")])}
    loops = [("/dev/null", "rw"), ("/dev/loop-control", "rw"), ("block-loop", "rw")]
    assert start(closed, IMAGE)["DeviceAllow"] == loops
    assert "DeviceAllow" not in start(UNIT, IMAGE)
