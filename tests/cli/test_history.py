# SPDX-License-Identifier: LGPL-2.1-or-later
"""`history`: which outcomes are asked for, and what is said of a word that is none."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.fork_server import COMMAND
from support.screens import keep, look
from watcher.cli import history, main
from watcher.model import Event, Outcome, Verdict
from watcher.records.ledger import Ledger

HOUR = 3_600_000_000


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory without a daemon, with outcomes of two images and services."""
    for variable, name in (
        ("STATE_DIRECTORY", "state"),
        ("RUNTIME_DIRECTORY", "run"),
        ("CONFIGURATION_DIRECTORY", "c"),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    now = time.time_ns() // 1000
    with Ledger(str(tmp_path / "state")) as ledger:
        ledger.append(
            Event(
                "web.service",
                Outcome.APPLIED,
                "first",
                now - 50 * HOUR,
                image="web",
                version="1",
                digest="ab" * 32,
            ),
            Event(
                "db.service",
                Outcome.REFUSED,
                "second",
                now - 3 * HOUR,
                image="db",
                version="7",
                digest="cd" * 32,
            ),
            Event(
                "web.service",
                Outcome.REFUSED,
                "third",
                now - HOUR,
                image="web",
                version="2",
                digest="ef" * 32,
            ),
        )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["first", "second", "third"]),
        (["web.service"], ["first", "third"]),
        (["web"], ["first", "third"]),
        (["--outcome", "refused"], ["second", "third"]),
        (["--outcome", "refused,applied", "web"], ["first", "third"]),
        (["--outcome", "applied", "--outcome", "refused"], ["first", "second", "third"]),
        (["--since", "2h"], ["third"]),
        (["--since", "2h ago"], ["third"]),
        (["--since", "4h", "--outcome", "refused"], ["second", "third"]),
        (["--since", "infinity"], ["first", "second", "third"]),
        (["--since", "2020-01-01"], ["first", "second", "third"]),
        (["--image", "web"], ["first", "third"]),
        (["--image", "web_2"], ["third"]),
        (["--image", "web_2.raw"], ["third"]),
        (["--image", "cdcdcdcd"], ["second"]),
        (["--image", "cd"], []),
        (["--image", "%"], []),
        (["--image", "web", "-n", "1"], ["third"]),
    ],
    ids=" ".join,
)
def test_outcomes_are_chosen(
    state: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    assert main.main(["history", "--json", *words]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert [event["message"] for event in reversed(events)] == messages


def test_it_is_called_log_as_well_and_says_that_nothing_of_that_kind_happened(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["log", "--outcome", "failed"]) == 0
    assert capsys.readouterr().out == "nothing of that kind has happened\n"


def test_json_has_the_time_as_logs_write_it(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["history", "--json", "-n", "1"])
    (event,) = json.loads(capsys.readouterr().out)["events"]
    assert event["time"].endswith("Z") and "T" in event["time"]
    assert round(datetime.fromisoformat(event["time"]).timestamp() * 1_000_000) == event["when"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--outcome", "refuse"], "--outcome: refuse is none; did you mean refused?"),
        (["--outcome", "x\n"], "--outcome: x\\n is none; did you mean applied, unchanged, refused,"),
        (
            ["--since", "last week"],
            '--since: not a time span such as 2h, a date such as 2026-11-30 or "2026-11-30 12:00"',
        ),
        (["--since", "2026-13-01"], "--since: not a time span"),
        (["-n", "0"], "--lines: at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_line(
    state: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main.main(["history", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"confext-watcher: {said}") and error.count("\n") == 1


def test_a_name_that_no_service_has_is_told_with_the_one_that_is_like_it(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["history", "wbe"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "confext-watcher: no service wbe takes part; did you mean web.service?\n"
    assert main.main(["history", "web", "--outcome", "failed"]) == 0
    assert capsys.readouterr().out == "nothing of that kind has happened\n"


def happened(state: Path) -> None:
    """What a service says when it gets a version, when one is refused, and when it goes back."""
    now, stack = time.time_ns() // 1000, "5" * 16
    told = "web.service: web 1.3 -> 1.4 applied in 2 ms, SIGHUP sent in 80 us"
    check = "web.service: web 1.5 refused: check: exit status 1"
    back = "web.service: web 1.6 -> 1.4, rolled back: the health check failed: exit status 7"
    verdict = Verdict.HEALTH_CHECK_FAILED
    printed = 'nginx: [emerg] unknown directive "bad" in /etc/nginx/conf.d/site.conf:1'
    with Ledger(str(state / "state")) as ledger:
        ledger.append(
            Event("web.service", Outcome.APPLIED, told, now - 49 * HOUR, stack),
            Event("web.service", Outcome.REFUSED, check, now - 5 * HOUR, stack, output=printed),
            Event("web.service", Outcome.ROLLED_BACK, back, now - HOUR, stack, verdict=verdict),
        )


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_it_says_how_long_ago_that_was(state: Path, columns: int) -> None:
    happened(state)
    seen = look([COMMAND, "history", "-n", "3"], columns=columns)
    keep(f"history-{columns}", seen)
    said = [line[:10].strip() for line in seen.text.splitlines() if not line.startswith(" ")]
    assert said == ["2 days ago", "5 h ago", "1 h ago"]
    exact = look([COMMAND, "history", "--verbose"], columns=columns).text
    assert " ago" not in exact and exact.startswith(datetime.now().strftime("%Y-"))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_days_are_those_of_this_host(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        today, yesterday = history._since("today"), history._since("yesterday")
        assert (today - yesterday) // HOUR in (23, 24, 25)
        assert time.localtime(today / 1_000_000)[3:6] == (0, 0, 0)
        moment = history._since("2026-11-30 12:00")
        assert time.localtime(moment / 1_000_000)[:5] == (2026, 11, 30, 12, 0)
        assert (
            history._since("2026-11-30T12:00:00Z") == datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp() * 1e6
        )
    finally:
        monkeypatch.undo()
        time.tzset()
