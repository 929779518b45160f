# SPDX-License-Identifier: LGPL-2.1-or-later
"""`LogLevel=debug` tells each step of a round in one line, with what it decided: rounds/round.py, rounds/observe.py,
rounds/messages.py, rounds/memory.py, rounds/tools.py."""

from __future__ import annotations

import re

import pytest

from scenarios.place import Place, Service

DEBUG = ("SettleSec=20ms", "LogLevel=debug")
OVER = "round over: nothing left to wait for"
CHECK = "grep -qv bad /etc/web.conf"
FAILED = f"'{CHECK}' failed with exit status 1"


@pytest.fixture
def place(place: Place) -> Place:
    place.configure(*DEBUG)
    place.start_daemon()
    return place


def first_round(service: Service) -> Service:
    for line in ("looked: 0 candidates, desired its own /etc .as accepted.", "shows its stack already", OVER):
        service.logged(line)
    return service


def round_after(service: Service, version: str, value: str | None = None) -> list[str]:
    """What the daemon says of the service from a drop to the end of the round, without times that differ."""
    begin = len(service.log_lines())
    service.put(version, value=value)
    service.logged("round over")
    said = [re.sub(r"\d+ (us|ms)", "N us", line) for line in service.log_lines()[begin:]]
    return [re.sub(r'.* msg="\S+: (.*?)" (service|message_id)=.*', r"\1", line) for line in said]


def test_a_drop_and_one_that_its_check_refuses(place: Place) -> None:
    service = first_round(place.start("--reload-signal", "SIGHUP", "--check", CHECK))
    assert round_after(service, "1.3") == [
        "looked: 1 candidate, desired web 1.3 (new)",
        "check passed",
        "accepted web 1.3, on trial",
        "swapped in N us",
        "reload: SIGHUP sent",
        "judged good",
        "web 1.3 added, applied in N us, SIGHUP sent in N us",
        OVER,
    ]
    assert round_after(service, "1.4", "bad") == [
        "looked: 2 candidates, desired web 1.4 (new)",
        f"check failed: check {FAILED}",
        f"kept out: web 1.4: check {FAILED}",
        f"web 1.3 -> 1.4, refused: check {FAILED}; the service was not touched",
        "looked: 2 candidates, desired web 1.3 (as accepted)",
        f"{service.versions}/web_1.4{place.suffix} kept out: check {FAILED}",
        "shows its stack already",
        OVER,
    ]


def test_one_that_is_undone(place: Place) -> None:
    watched = ("--health-check", "true", "--set", "HealthWatchSec=0.1s")
    service = first_round(place.start("--reload-command", CHECK, *watched))
    assert round_after(service, "1.3")[3:7] == [
        "reload: reload done",
        "health check passed",
        "on trial for 0.1 s more",
        "judged good",
    ]
    why = f"reload command {CHECK} failed with exit status 1"
    steps = round_after(service, "1.4", "bad")
    assert steps[3:10] == [
        "reload failed",
        f"judged bad: {why}",
        f"kept out: web 1.4: {why}",
        "looked: 2 candidates, desired web 1.3 (rolling back)",
        f"{service.versions}/web_1.4{place.suffix} kept out: {why}",
        "accepted web 1.3",
        "swapped in N us",
    ]
    assert steps[-1] == OVER


def test_one_that_waits_for_its_turn(place: Place) -> None:
    options = ("--reload-signal", "SIGHUP", "--set", "Rollout=rolling", "--health-check")
    first = first_round(place.start(*options, "sleep 1000", name="first.service"))
    second = first_round(place.start(*options, "true", name="second.service"))
    first.put("1.3")
    first.logged("accepted web 1.3, on trial")
    assert round_after(second, "1.3") == [
        "looked: 1 candidate, desired web 1.3 (new)",
        "shows its stack already",
        "waits: it waits for its turn (Rollout=rolling)",
        OVER,
    ]
