# SPDX-License-Identifier: LGPL-2.1-or-later
"""A failed start that is on trial waits; on real systemd: tests/beds/test_systemd_first.py."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from watcher.managers.systemd.held_starts import COMMAND, HeldStarts

WEB = "web.service"


def stop_post(path: Path, result: str = "exit-code", start: str = "second") -> subprocess.Popen[bytes]:
    """What systemd runs after the start of that InvocationID, with the file at `path` instead of ours."""
    *argv, unit = shlex.split(COMMAND.removeprefix("-+").replace("$$", "$"))
    assert unit == "/run/confext-watcher/starts/%n"
    return subprocess.Popen(
        [*argv, str(path)], env={"SERVICE_RESULT": result, "INVOCATION_ID": start}, stderr=subprocess.PIPE
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "starts" / WEB


@pytest.fixture
def held(tmp_path: Path) -> HeldStarts:
    return HeldStarts(str(tmp_path))


def ends(process: subprocess.Popen[bytes]) -> bool:
    _, said = process.communicate(timeout=60)
    return process.returncode in (0, 2) and said == b""


def test_it_waits_until_it_is_let_go(held: HeldStarts, path: Path) -> None:
    held.hold(WEB, "first")
    process = stop_post(path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    held.let_go(WEB)
    assert ends(process)
    held.let_go(WEB)


def test_it_waits_until_that_start_is_no_longer_on_trial(held: HeldStarts, path: Path) -> None:
    held.hold(WEB, "")
    process = stop_post(path)
    held.hold(WEB, "second")
    assert ends(process)


@pytest.mark.parametrize(
    ("result", "start"), [("success", "second"), ("exec-condition", "second"), ("exit-code", "first")]
)
def test_what_is_not_meant_does_not_wait(held: HeldStarts, path: Path, result: str, start: str) -> None:
    held.hold(WEB, "first")
    assert ends(stop_post(path, result, start))


def test_nothing_waits_where_nothing_is_on_trial(path: Path) -> None:
    assert ends(stop_post(path))


def test_nothing_is_left_that_would_be_waited_for(held: HeldStarts, path: Path) -> None:
    held.hold(WEB, "")
    held.hold("other.service", "first")
    held.close()
    assert list(path.parent.iterdir()) == []


def test_the_files_of_a_daemon_that_was_killed_are_gone_with_the_next(held: HeldStarts, path: Path) -> None:
    held.hold(WEB, "")
    HeldStarts(str(path.parent.parent)).begin()
    assert not path.exists()
