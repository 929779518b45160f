# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of services fits the terminal, and no command is folded. How it looks: tests/screens/."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from watcher.cli import show_status, terminal
from watcher.model import Event, Kind, Layer, Outcome, Remark
from watcher.records.schema import CandidateStatus, EntryStatus, Quarantined, ServiceStatus

LAST = Event("web.service", Outcome.ROLLED_BACK, "web.service: said", 1)
WEB, BASE = (Layer(f"{name}.raw", name, "1.4", "a" * 64, Kind.IMAGE, "") for name in ("web", "base"))
NOW = 1_800_000_000
SINCE = (NOW - 200) * 1_000_000
LONG = ServiceStatus(
    "postgresql@16-main.service",
    "systemd",
    "running",
    7,
    "5" * 16,
    layers=(BASE, WEB),
    since=SINCE,
    last=LAST,
)


@pytest.fixture
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    width: int = request.param
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "columns", lambda: width)
    monkeypatch.setattr(terminal, "coloured", lambda: False)
    monkeypatch.setattr(time, "time", lambda: NOW)
    return width


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (120, "postgresql@16-main.service  web 1.4, base 1.4  5555555555555555    3 min ago  rolled-back"),
        (80, "postgresql@16-main  web 1.4 +1  55555555    3 min ago  rolled-back"),
        (60, "postgresql@16-main  web 1.4 +1    3 min ago  rolled-back"),
        (45, "postgresql@16-main  web 1.4 +1  rolled-back"),
        (20, "postgresql@16-main  web 1.4 +1  rolled-back"),
    ],
    indirect=["columns"],
)
def test_a_service_is_one_line_in_the_widest_form_that_fits(columns: int, row: str) -> None:
    head, line = show_status.table([LONG])
    assert line == row
    assert len(line) <= columns or columns == 20
    assert head.split() == ["SERVICE", "RUNS", "ON", *head.split()[3:]]


@pytest.mark.parametrize("columns", [80], indirect=True)
def test_signs_that_take_two_columns_are_counted_so(columns: int) -> None:
    wide = replace(LONG, service="網.service", layers=())
    narrow = replace(LONG, service="web.service", layers=())
    first, second = list(show_status.table([wide, narrow]))[1:]
    assert first.index("its own") + 1 == second.index("its own")


@pytest.mark.parametrize("columns", [40], indirect=True)
def test_a_command_is_never_folded(columns: int) -> None:
    pinned = replace(LONG, pinned="5" * 16)
    said = list(show_status.glance([pinned]))
    assert "    confext-watcher rollback --forget postgresql@16-main.service" in said
    assert terminal.folded("say `a command to copy` and " + "word " * 9, 20)[1] == "`a command to copy`"


def test_what_a_client_or_a_file_is_called_cannot_command_the_terminal() -> None:
    evil = "\x1b[2J\nweb"
    candidate = CandidateStatus(f"/srv/{evil}", "1", "", "refused", evil, evil, evil)
    service = ServiceStatus(
        evil,
        "systemd",
        "running",
        pid=7,
        last=replace(LAST, message=evil),
        newer=(candidate,),
        quarantined=(Quarantined(evil, "c" * 64, evil, 5, evil),),
        step=evil,
        step_since=1,
        entries=(EntryStatus("web.raw", evil, "image", True, (candidate,)),),
        remarks=(Remark("info", evil, evil),),
        not_allowed=(Remark("warning", evil, evil * 2),),
    )
    for lines in (
        show_status.glance([service]),
        show_status.in_depth(service, [replace(LAST, message=evil)]),
    ):
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (47 * 3600, "47 h"),
        (50 * 3600, "2 days"),
        (-9, "0 s"),
    ],
)
def test_how_long_it_lasts(seconds: int, said: str) -> None:
    assert terminal.lasting(time.time_ns() // 1000 - seconds * 1_000_000) == said
