# SPDX-License-Identifier: LGPL-2.1-or-later
"""`plan --debug` (control/report.py) prints what a look finds, and the step that then is taken."""

from __future__ import annotations

import json
import os
import signal

import pytest

from scenarios.place import Place, Service
from support.from_report import from_report
from watcher.rounds.decide import Accept, Check, Step, Swap
from watcher.rounds.facts import Facts

LATER = ("SettleSec=1h", "SettleMaxSec=1h", "LogLevel=debug")
"""A drop is looked at when the settings are read again, not before."""


@pytest.fixture
def place(place: Place) -> Place:
    place.configure(*LATER)
    place.start_daemon()
    return place


def debugged(service: Service) -> tuple[Facts, Step]:
    printed = service.place.run("plan", "--debug", service.name).stdout
    plain = service.place.run("plan", service.name).stdout
    assert plain.startswith(f"{service.name}: ") and printed.startswith(plain)
    return from_report(printed)


def steps_of_next_round(service: Service) -> list[str]:
    """What the daemon says of the next round, after the look."""
    begin = len(service.log_lines())
    assert service.place.daemon is not None
    service.place.daemon.send(signal.SIGHUP)
    service.logged("looked: ")
    service.logged("round over")
    lines = [line.partition('msg="')[2] for line in service.log_lines()[begin:]]
    said = [line.removeprefix(f"{service.name}: ") for line in lines]
    return said[[line.startswith("looked: ") for line in said].index(True) + 1 :]


@pytest.mark.parametrize(
    ("options", "dropped", "stopped", "step", "said"),
    [
        ((), False, False, Swap, "shows its stack already"),
        ((), True, False, Accept, "accepted web 1.3, on trial"),
        (("--check", "true"), True, False, Check, "check passed"),
        (("--check", "false"), True, False, Check, "check failed: "),
        ((), True, True, Accept, "accepted web 1.3"),
    ],
    ids=["nothing new", "new", "its check passes", "its check fails", "not running"],
)
def test_the_step_is_the_one_that_is_taken(
    place: Place, options: tuple[str, ...], dropped: bool, stopped: bool, step: type[Step], said: str
) -> None:
    service = place.start("--reload-signal", "HUP", *options)
    service.logged("round over")
    if stopped:
        service.kill()
        service.logged("round over")
    if dropped:
        service.put("1.3")
    facts, came_to = debugged(service)
    assert type(came_to) is step
    assert (facts.running, facts.first, facts.offered) == (not stopped, False, dropped)
    if isinstance(came_to, Accept | Check):
        assert came_to.stack == facts.wanted
    assert steps_of_next_round(service)[0].startswith(said)
    if dropped and "false" not in options:
        assert service.status()["accepted"] == facts.wanted.id != ""


def test_names_that_are_not_utf8_are_in_it_exactly(place: Place) -> None:
    drops = place.path / os.fsdecode(b"\xff\xc3\xa4.d")
    drops.mkdir()
    service = place.start("--confext-dir", str(drops), "--reload-signal", "HUP", declared=False)
    service.logged("round over")
    path = service.put("1.3", at=drops)
    path = path.rename(drops / f"web{place.suffix}")
    facts, _ = debugged(service)
    assert [layer.source for layer in facts.wanted.layers] == [str(path)]


def test_it_is_in_the_json_as_well(place: Place) -> None:
    service = place.start()
    service.logged("round over")
    answer = json.loads(place.run("plan", "--debug", "--json", service.name).stdout)
    (change,) = answer["changes"]
    assert from_report(change["report"])[1] == Swap()
    assert answer["redacted"] is False
    assert json.loads(place.run("plan", "--json").stdout)["changes"] == [{**change, "report": None}]
    assert place.run("plan", "--debug", "none.service", check=False).returncode == 1
