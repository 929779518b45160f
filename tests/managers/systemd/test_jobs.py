# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of the ends that a unit's job can come to; jobs of a real systemd are in tests/beds/."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus
from watcher.managers.systemd.ends import command
from watcher.managers.systemd.jobs import UnitJobs
from watcher.managers.systemd.systemd1 import JobResults, Systemd1

WEB, SOCKET, INVOCATION, JOB = "web.service", "web.socket", "1" * 32, "/job/1"


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
        return {
            "ActiveState": "active",
            "Job": (0, "/"),
            "TriggeredBy": [],
            "ExecReload": self.commands,
            "Type": self.type,
        }[name]

    async def invocation(self, unit: str) -> str:
        return INVOCATION

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

    def connection() -> Systemd1:
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

    def connection() -> Systemd1:
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
    assert command(row).failed is failed


class Starting(Answers):
    """systemd with a unit that went down; `results` are of one job after the other.

    Args:
        sockets: ActiveState of each that triggers it.
        wanted: something else than these starts it, too.
        started: whether a start comes as far as to have an InvocationID.
        up: what is found of it: ActiveState and SubState.
        job: of the start that is on its way to fail.
    """

    def __init__(
        self,
        jobs: JobResults,
        *results: str,
        sockets: dict[str, str] | None = None,
        wanted: bool = False,
        started: bool = False,
        up: tuple[str, str] = ("active", "running"),
        job: int = 0,
    ) -> None:
        super().__init__(jobs, "done")
        self._results = list(results)
        self._sockets = sockets or {}
        self._wanted = wanted
        self._started = started
        self._up = up
        self._job = job
        self._begun = 0

    async def manager(self, member: str, signature: str = "", *arguments: Any, timeout: float = 30.0) -> Any:
        self.asked.append(f"{member} {arguments[0]}")
        if member in ("StartUnit", "RestartUnit"):
            result = self._results.pop(0)
            self._begun += result == "done" or self._started
            self._jobs.ended(JOB, "done" if result == "nothing" else result)
        return JOB

    async def get(self, unit: str, name: str) -> Any:
        found: dict[str, Any] = {
            "TriggeredBy": [*self._sockets, "web.timer"],
            "ActiveState": self._sockets.get(unit, self._up[0]),
            "SubState": self._up[1],
            "MainPID": 0,
            "Job": (self._job, "/"),
            "WantedBy": ["multi-user.target"] if self._wanted else [],
            "RequiredBy": [],
        }
        return found[name]

    async def invocation(self, unit: str) -> str:
        return f"{INVOCATION} {self._begun}"

    async def socket_result(self, unit: str) -> str:
        return "service-start-limit-hit"

    async def service_properties(self, unit: str) -> dict[str, Any]:
        return {"Result": "exit-code", "ExecMainCode": 1, "ExecMainStatus": 226}


async def start(*results: str, **more: Any) -> tuple[Reloaded, list[str]]:
    jobs = JobResults()
    systemd = Starting(jobs, *results, **more)
    return await UnitJobs(lambda: systemd, jobs).start(WEB), systemd.asked


STARTED = Reloaded(ok=True, told="start")
START, RESET = f"StartUnit {WEB}", f"ResetFailedUnit {WEB}"


async def test_a_start_resets_no_start_limit_that_is_not_in_its_way() -> None:
    assert await start("done") == (STARTED, [START])
    assert await start("failed", started=True) == (Reloaded(False, "start", "start failed"), [START])


async def test_a_start_that_runs_into_the_start_limit_itself_gets_over_it_once() -> None:
    assert await start("failed", "done") == (STARTED, [START, RESET, START])
    assert await start("failed", "failed") == (
        Reloaded(False, "start", "start failed"),
        [START, RESET, START],
    )


async def test_a_start_is_done_when_the_service_is_there() -> None:
    for state in (("failed", "failed"), ("activating", "auto-restart")):
        found, _ = await start("done", up=state)
        assert found == Reloaded(False, "start", "its start failed: exit status 226")


async def test_a_start_that_is_about_to_fail_is_made_anew_by_a_restart() -> None:
    """Another start would be merged with it."""
    restart = f"RestartUnit {WEB}"
    assert await start("done", up=("deactivating", "dead"), job=7) == (STARTED, [restart])
    assert await start("done", up=("deactivating", "dead")) == (STARTED, [START])
    assert await start("done", up=("active", "dead"), job=7) == (STARTED, [START])


async def test_what_systemd_has_started_already_was_not_started_by_us() -> None:
    """By `Restart=`, a moment before its slots were others."""
    found, asked = await start("nothing")
    assert (found, asked) == (Reloaded(True, reason="it was started already", interrupted=True), [START])


async def test_it_is_told_of_each_job_when_that_is_queued() -> None:
    jobs, queued = JobResults(), list[str]()
    systemd = Starting(jobs, "done")
    await UnitJobs(lambda: systemd, jobs, queued.append).start(WEB)
    assert queued == [WEB]


async def test_what_its_sockets_start_comes_back_with_them() -> None:
    socket = f"StartUnit {SOCKET}"
    nothing = Reloaded(ok=True)
    assert await start(sockets={SOCKET: "active"}) == (nothing, [])
    assert await start("done", sockets={SOCKET: "active"}, wanted=True) == (STARTED, [START])
    assert await start("done", sockets={SOCKET: "inactive"}) == (STARTED, [START])
    assert await start("done", sockets={SOCKET: "failed"}) == (nothing, [RESET, socket])
    assert await start("done", "done", sockets={SOCKET: "failed"}, wanted=True) == (
        STARTED,
        [RESET, socket, START],
    )
    found, asked = await start("timeout", sockets={SOCKET: "failed"}, started=True, wanted=True)
    assert found == Reloaded(False, "start", f"its {SOCKET} cannot be started: start timed out")
    assert asked == [RESET, socket]
