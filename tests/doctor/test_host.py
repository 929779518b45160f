# SPDX-License-Identifier: LGPL-2.1-or-later
"""The doctor's findings on the host (doctor/findings.py, doctor/host.py); some are to be had here in words alone.

On systemd: tests/beds/test_systemd_doctor.py; with services: tests/scenarios/test_doctor.py.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from watcher.doctor import host
from watcher.doctor.findings import Finding, Level, error, examine, ok, warning
from watcher.settings.config import Settings


def only(name: str, settings: Settings | None = None) -> list[Finding]:
    """What one examination finds."""
    return [*dict(host.EXAMINATIONS)[name](settings or Settings())]


def test_loop_devices_beyond_those_made_at_boot_are_no_finding() -> None:
    """max_loop= is how many are there from the start; the kernel makes more."""
    (found,) = only("loop devices")
    assert found.level is not Level.OK or re.fullmatch(r"\d+ in use", found.text)


@pytest.mark.parametrize("release", ["6.1.0-37-amd64", "5.15", "6.7"])
def test_an_old_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    helps = "use Linux 6.8 or newer: overlayfs has lowerdir+ then"
    assert only("kernel")[0] == error("kernel", f"Linux {release} is too old", helps)


def test_a_kernel_that_has_what_is_needed_is_well() -> None:
    assert only("kernel")[0] == ok("kernel", f"Linux {platform.release()}")


def test_a_kernel_without_a_file_system_is_told_what_not_to_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_file_systems", lambda: {"ext4", "squashfs"})
    monkeypatch.setattr(host, "_has_module", lambda name: False)
    first, overlay, formats = only("kernel")
    assert first.level is Level.OK
    assert (overlay.level, overlay.text) == (Level.ERROR, "has no overlayfs")
    assert (formats.level, formats.text) == (Level.WARNING, "cannot mount erofs")


@pytest.mark.parametrize(
    ("value", "level"), [(100, Level.WARNING), (65536, Level.OK), (1_000_000, Level.OK)], ids=str
)
def test_few_inotify_watches_are_a_warning(monkeypatch: pytest.MonkeyPatch, value: int, level: Level) -> None:
    monkeypatch.setattr(host, "_number", lambda path: value)
    (found,) = only("inotify")
    assert found.level is level
    assert ("sysctl fs.inotify.max_user_watches=" in found.helps) == (level is Level.WARNING)


def test_leases_that_are_turned_off_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only("leases") == []
    monkeypatch.setattr(host, "_number", lambda path: 0 if path == "/proc/sys/fs/leases-enable" else None)
    (found,) = only("leases")
    assert (found.level, found.helps) == (Level.WARNING, "sysctl fs.leases-enable=1")


def test_a_clock_from_before_this_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = only("clock")
    assert found.level is not Level.ERROR
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    (found,) = only("clock")
    assert (found.level, found.text) == (Level.ERROR, "says 1970-01-02: the history will be wrong")


@pytest.mark.parametrize(
    ("free", "level"), [(1 << 20, Level.ERROR), (500 << 20, Level.WARNING), (50 << 30, Level.OK)], ids=str
)
def test_space_is_what_the_store_may_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: Level
) -> None:
    real = os.statvfs(tmp_path)
    changed = {"f_bavail": free // 4096, "f_frsize": 4096}

    class Status:
        def __getattr__(self, name: str) -> int:
            return changed.get(name) or getattr(real, name)

    monkeypatch.setattr(os, "statvfs", lambda path: Status())
    (found,) = only("space", replace(Settings(), state_directory=str(tmp_path)))
    assert found.level is level and f"{free >> 20} MiB free" in found.text


@pytest.mark.parametrize("user", [0, 1000])
def test_an_examination_that_fails_is_a_finding_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    why = "/proc/1/root: Permission denied"
    failed = (
        warning("first", f"not examined: {why}", "sudo confext-watcher doctor")
        if user
        else error("first", f"could not be examined: {why}", "mend that, and ask again")
    )

    def broken(settings: Settings) -> Iterator[Finding]:
        yield ok("first", "well")
        raise PermissionError(13, "Permission denied", "/proc/1/root")

    def fine(settings: Settings) -> Iterable[Finding]:
        return [ok("second", "well")]

    assert [*examine(Settings(), [("first", broken), ("second", fine)])] == [
        ok("first", "well"),
        failed,
        ok("second", "well"),
    ]


def test_a_command_that_is_not_there_has_failed() -> None:
    assert host._run(["/nowhere/systemctl"]).returncode == 127
