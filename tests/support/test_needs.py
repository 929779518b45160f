# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests' own net: what is lacking is named, what is left behind is found."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from support import needs
from support.leaks import Snapshot, settled
from support.needs import root, tool


def test_a_missing_program_is_the_reason_to_skip() -> None:
    assert needs.lacking(tool("no-such-program").mark) == "needs no-such-program"
    assert needs.lacking(tool("sh").mark) is None


def test_a_kernel_of_the_future_is_the_reason_to_skip() -> None:
    assert needs.lacking(needs.kernel("99.0").mark) == "needs Linux 99.0 or newer"
    assert needs.lacking(needs.kernel("2.6").mark) is None


def test_a_process_left_behind_is_found_when_nobody_is_its_parent_any_more(tmp_path: Path) -> None:
    before = Snapshot.take(tmp_path)
    orphan = int(subprocess.check_output(["sh", "-c", "sleep 60 >/dev/null & echo $!"]))
    try:
        assert f"process {orphan}: sleep 60 " in Snapshot.take(tmp_path).since(before)
    finally:
        os.kill(orphan, 9)
    assert settled(before, tmp_path) == []


@root
@tool("mount")
def test_a_mount_and_a_loop_device_left_behind_are_found(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    before = Snapshot.take(tmp_path)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True)
    try:
        assert any(str(tmp_path) in thing for thing in Snapshot.take(tmp_path).since(before))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    device = subprocess.check_output(["losetup", "--find", "--show", str(image)], text=True).strip()
    try:
        assert f"loop device {Path(device).name} on {image}" in Snapshot.take(tmp_path).since(before)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert settled(before, tmp_path) == []


@root
@tool("mount")
def test_what_others_mount_and_attach_meanwhile_is_not_this_runs(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    others.mkdir()
    image = others / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    before = Snapshot.take(ours)
    device = subprocess.check_output(["losetup", "--find", "--show", str(image)], text=True).strip()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(others)], check=True)
    try:
        assert Snapshot.take(ours).since(before) == []
    finally:
        subprocess.run(["umount", str(others)], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)


@root
@tool("mount")
def test_the_bed_of_another_run_is_not_this_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as cache:
        bed = Path(cache, "bed")
        bed.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(bed)], check=True)
        try:
            assert any(str(bed) in thing for thing in Snapshot.take(tmp_path).things)
            monkeypatch.setenv("CONFEXT_BEDS_CACHE", cache)
            assert not any(str(bed) in thing for thing in Snapshot.take(tmp_path).things)
        finally:
            subprocess.run(["umount", str(bed)], check=True)


def test_a_descriptor_left_open_is_found(tmp_path: Path) -> None:
    before = Snapshot.take(tmp_path)
    descriptor = os.memfd_create("left")
    try:
        assert any("/memfd:left" in thing for thing in Snapshot.take(tmp_path).since(before))
    finally:
        os.close(descriptor)
    assert Snapshot.take(tmp_path).since(before) == []


async def test_trio_runs_async_tests(autojump_clock: object) -> None:
    assert autojump_clock is not None


def test_an_unknown_need_is_a_mistake_in_the_test() -> None:
    with pytest.raises(KeyError):
        needs.lacking(pytest.mark.needs("luck").mark)
