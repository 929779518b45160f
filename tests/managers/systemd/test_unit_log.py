# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of journalctl's answer; a real journal is in tests/beds/."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import trio

from watcher.managers.systemd.unit_log import KEPT_MAX, UnitLog, cut, entries_of


def entry(unit: str, when: int, message: object) -> dict[str, object]:
    return {"_SYSTEMD_UNIT": unit, "__REALTIME_TIMESTAMP": str(when), "MESSAGE": message}


def printed(*entries: dict[str, object]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in entries)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("bind() failed", "bind() failed"),
        ([98, 105, 255], "bi\\xff"),
        (["one", "two"], "one\ntwo"),
        (None, ""),
    ],
)
def test_messages_of_all_kinds_are_read(message: object, text: str) -> None:
    assert list(entries_of(printed(entry("web.service", 7, message)))) == [("web.service", 7, text)]


def test_the_first_lines_are_kept_in_whole_characters() -> None:
    assert cut("x" + "\u00e9" * KEPT_MAX) == "x" + "\u00e9" * ((KEPT_MAX - 1) // 2)


async def test_all_who_ask_at_the_same_time_share_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets its own unit's lines, from its own time on."""
    answer = printed(
        entry("a.service", 10, "early"), entry("b.service", 20, "of b"), entry("a.service", 30, "late")
    )
    (tmp_path / "answer").write_bytes(answer)
    program = tmp_path / "journalctl"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n[ "$1" = --sync ] && sleep 0.1 || cat {tmp_path}/answer\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    log, found = UnitLog(), {}

    async def ask(unit: str, since: int) -> None:
        found[unit, since] = await log.errors(unit, since)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "c.service", 1)
        await trio.sleep(0.05)  # the others share the next answer
        for unit, since in (("a.service", 1), ("a.service", 20), ("b.service", 20), ("b.service", 21)):
            nursery.start_soon(ask, unit, since)
    assert found == {
        ("c.service", 1): "",
        ("a.service", 1): "early\nlate",
        ("a.service", 20): "late",
        ("b.service", 20): "of b",
        ("b.service", 21): "",
    }
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and "_SYSTEMD_UNIT=a.service _SYSTEMD_UNIT=b.service" in calls[-1]


@pytest.mark.parametrize("script", ["exit 1", "echo no JSON"])
async def test_a_journal_that_cannot_be_read_is_said_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    program = tmp_path / "journalctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert await UnitLog().errors("web.service", 1) == ""
    said = capsys.readouterr()
    assert "what web.service logged could not be read" in said.out + said.err


async def test_without_a_journal_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(*args: object, **kwargs: object) -> subprocess.CompletedProcess[bytes]:
        raise FileNotFoundError("journalctl")

    monkeypatch.setattr(trio, "run_process", missing)
    assert await UnitLog().errors("web.service", 1) == ""
