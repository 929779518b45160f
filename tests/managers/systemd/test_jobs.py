# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of the ends that a unit's job can come to; jobs of a real systemd are in tests/beds/."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus
from watcher.managers.systemd.jobs import UnitJobs, _command
from watcher.managers.systemd.systemd1 import JobResults, Systemd1

WEB, INVOCATION, JOB = "web.service", "1" * 32, "/job/1"


class Answers(Systemd1):
    """systemd with one running unit; each job has ended by the time that its name is known.

    Args:
        result: how each job ends, or the error that refuses it; "never".
        state: what a job is that does not end.
    """

    def __init__(self, jobs: JobResults, result: str | dbus.Error, state: str = "") -> None:
        self._state = state
        self.commands: list[object] = ["a command"]
        self.type = "simple"
        self._jobs = jobs
        self._result = result
        self.asked: list[str] = []

    async def manager(self, member: str, signature: str = "", *arguments: Any, timeout: float = 30.0) -> Any:
        self.asked.append(member)
        if member == "ResetFailedUnit":
            return None
        if isinstance(self._result, dbus.Error):
            raise self._result
        if self._result != "never":
            self._jobs.ended(JOB, self._result)
        return JOB

    async def cancel_job(self, job: str) -> str:
        self.asked.append(f"cancel {job}")
        return self._state

    async def get(self, unit: str, name: str) -> Any:
        return {"ActiveState": "active", "Job": (0, "/"), "ExecReload": self.commands, "Type": self.type}[
            name
        ]

    async def service_properties(self, unit: str) -> dict[str, Any]:
        return {}


def unit_jobs(result: str | dbus.Error) -> UnitJobs:
    jobs = JobResults()
    systemd = Answers(jobs, result)

    def connection() -> Systemd1:
        return systemd

    return UnitJobs(connection, jobs)


async def reload(result: str | dbus.Error) -> Reloaded | None:
    return await unit_jobs(result).reload(WEB, INVOCATION, 90)


@pytest.mark.parametrize("result", ["failed", "timeout"])
async def test_a_reload_that_the_service_did_not_take_is_a_verdict(result: str) -> None:
    reloaded = await reload(result)
    assert reloaded and not reloaded.ok and not reloaded.interrupted


@pytest.mark.parametrize(
    "result", ["canceled", "dependency", "assert", "unsupported", "frozen", "concurrency", "not known yet"]
)
async def test_a_reload_that_came_to_nothing_without_the_service_is_no_verdict(result: str) -> None:
    for reloaded in (
        await reload(result),
        await unit_jobs(result).restart(WEB),
        await unit_jobs(result).start(WEB),
    ):
        assert reloaded and not reloaded.ok and reloaded.interrupted and reloaded.reason


async def test_a_reload_that_systemd_does_not_begin_is_no_verdict() -> None:
    reloaded = await reload(dbus.Error("org.freedesktop.systemd1.ShuttingDown", "going down"))
    assert reloaded == Reloaded(False, "reload", "reload was not possible: going down", interrupted=True)


@pytest.mark.parametrize("result", ["skipped", "invalid", "collected", "once"])
async def test_a_reload_that_is_no_longer_needed_is_none(result: str) -> None:
    assert await reload(result) == Reloaded(
        ok=True, reason="it was not told to reload, it does not run any more"
    )
    again = await unit_jobs(result).restart(WEB)
    assert again == Reloaded(ok=True, reason=f"its restart was {result}")


@pytest.mark.parametrize(
    ("commands", "kind", "told"),
    [(["a command"], "simple", "reload"), ([], "notify-reload", "reload"), ([], "simple", "")],
)
async def test_a_reload_is_said_to_be_done_only_where_the_process_was_told(
    commands: list[object], kind: str, told: str
) -> None:
    jobs = JobResults()
    systemd = Answers(jobs, "done")
    systemd.commands, systemd.type = commands, kind

    async def connection() -> Systemd1:
        return systemd

    reloaded = await UnitJobs(connection, jobs).reload(WEB, INVOCATION, 90)
    assert reloaded and reloaded.ok and reloaded.told == told
    assert told or "tells the process nothing" in reloaded.reason


@pytest.mark.parametrize(
    ("state", "words"), [("running", "did not end within 90 s"), ("waiting", "not tried")]
)
async def test_a_reload_that_never_ends_is_canceled_and_one_that_was_not_begun_is_no_verdict(
    autojump_clock: trio.testing.MockClock, state: str, words: str
) -> None:
    jobs = JobResults()
    systemd = Answers(jobs, "never", state)

    async def connection() -> Systemd1:
        return systemd

    reloaded = await UnitJobs(connection, jobs).reload(WEB, INVOCATION, 90)
    assert reloaded and not reloaded.ok and words in reloaded.reason
    assert reloaded.interrupted is reloaded.blocked is (state == "waiting")
    assert systemd.asked[-1] == f"cancel {JOB}"


@pytest.mark.parametrize(
    ("pid", "code", "status", "ignored", "failed"),
    [
        (10, 1, 0, False, False),
        (10, 1, 3, False, True),
        (10, 2, 9, False, True),
        (10, 1, 3, True, False),
        (0, 0, 0, False, False),
    ],
)
def test_the_command_that_failed_is_told_from_those_that_did_not(
    pid: int, code: int, status: int, ignored: bool, failed: bool
) -> None:
    row = ("/bin/x", ["x"], ignored, 1, 1, 1, 1, pid, code, status)
    assert _command(row).failed is failed
