# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ends of a service say nothing about its configuration; ends of real services are in tests/beds/."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from watcher.managers.systemd import ends

EXITED, KILLED, DUMPED = 1, 2, 3


def row(code: int, status: int, ignored: bool = False) -> tuple[Any, ...]:
    return ("/bin/x", ["x"], ignored, 1, 1, 1, 1, 10, code, status)


def values(result: str, code: int = 0, status: int = 0, **lists: list[Any]) -> dict[str, Any]:
    return {"Result": result, "ExecMainCode": code, "ExecMainStatus": status, **lists}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (values("start-limit-hit"), "start-limit-hit"),
        (values("start-limit-hit", EXITED, 0), "start-limit-hit"),
        (values("start-limit-hit", EXITED, 226), "start-limit-hit"),
        (values("start-limit-hit", KILLED, signal.SIGTERM), "start-limit-hit"),
        (values("start-limit-hit", EXITED, 128 + signal.SIGTERM), "start-limit-hit"),
        (values("resources"), "resources"),
        (values("exec-condition"), "ExecCondition="),
        (values("exit-code", EXITED, 200), "200"),
        (values("exit-code", EXITED, 226), "226"),
        (values("exit-code", EXITED, 243), "243"),
        (values("exit-code", ExecStartPre=[row(EXITED, 0), row(EXITED, 226)]), "226"),
        (values("exit-code", KILLED, signal.SIGTERM, ExecStartPost=[row(EXITED, 217)]), "217"),
    ],
)
def test_what_is_not_its_own_doing_says_so(found: dict[str, Any], why: str) -> None:
    assert why in ends.blameless(found)


@pytest.mark.parametrize(
    "found",
    [
        values("exit-code", EXITED, 1),
        values("exit-code", EXITED, 15),
        # What its socket has started so often has failed each time.
        values("start-limit-hit", EXITED, 1),
        values("start-limit-hit", ExecStartPre=[row(EXITED, 1)]),
        values("exit-code", EXITED, 199),
        values("exit-code", EXITED, 244),
        values("exit-code", ExecStartPre=[row(EXITED, 226, ignored=True), row(EXITED, 1)]),
        # systemd has ended the main process for that of another
        values("exit-code", KILLED, signal.SIGTERM, ExecStartPost=[row(EXITED, 3)]),
        values("signal", KILLED, signal.SIGHUP),
        values("signal", KILLED, signal.SIGKILL),
        values("core-dump", DUMPED, signal.SIGSEGV),
        values("success", KILLED, signal.SIGTERM),
        values("timeout", KILLED, signal.SIGTERM),
        values("timeout", KILLED, signal.SIGKILL),
        values("watchdog", DUMPED, signal.SIGABRT),
        values("oom-kill", KILLED, signal.SIGKILL),
        values("protocol"),
        values("success"),
        values("success", EXITED, 0),
    ],
)
def test_what_may_be_its_own_doing_is_not_excused(found: dict[str, Any]) -> None:
    assert ends.blameless(found) == ""


@pytest.mark.parametrize(
    ("found", "sent", "excused"),
    [
        (values("signal", KILLED, signal.SIGKILL), "SIGKILL", True),
        (values("signal", KILLED, signal.SIGKILL), "SIGHUP", False),
        (values("core-dump", DUMPED, signal.SIGSEGV), "SIGSEGV", True),
        (values("success", KILLED, signal.SIGTERM), "SIGTERM", True),
        # It has a handler for that, and ends as it likes.
        (values("success", EXITED, 0), "SIGTERM", True),
        (values("exit-code", EXITED, 3), "SIGQUIT", True),
        (values("exit-code", EXITED, 3), "SIGHUP", False),
        # Its time-out and its watchdog are its own doing, whatever was sent besides.
        (values("timeout", KILLED, signal.SIGTERM), "SIGTERM", False),
        (values("watchdog", DUMPED, signal.SIGABRT), "SIGABRT", False),
        (values("exit-code", KILLED, signal.SIGTERM, ExecStartPost=[row(EXITED, 3)]), "SIGTERM", False),
    ],
)
def test_what_a_client_had_systemd_send_is_not_its_own_doing(
    found: dict[str, Any], sent: str, excused: bool
) -> None:
    assert ends.blameless(found) == ""
    assert bool(ends.blameless(found, {sent})) is excused


def test_how_it_ended_is_said_in_a_word() -> None:
    assert ends.how(values("exit-code", EXITED, 226)) == "exit status 226"
    assert ends.how(values("signal", KILLED, signal.SIGSEGV)) == "SIGSEGV"
    assert ends.how(values("exit-code", ExecStartPre=[row(EXITED, 3)])) == "exit status 3"
    assert ends.how(values("timeout")) == "timeout"
