# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a service took its reload (and `rounds/health.py`): judged by what its manager and its main process say."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing

from watcher.managers.base import Ended, Reloaded, Service
from watcher.model import Declared, Later, Stack, Verdict
from watcher.mounts.process import Process
from watcher.rounds import service_check
from watcher.rounds.facts import Judged
from watcher.rounds.judge import judge_start, reload_and_judge
from watcher.settings.config import ServiceSettings

STACK = Stack()

Answer = Callable[["Manager"], Reloaded]


class Manager:
    """Of one service with a real main process; what `reload` does to it is handed in."""

    def __init__(self, service: Service, answer: Answer) -> None:
        self.services: Mapping[str, Service] = {service.name: service}
        self.answer = answer
        self.plan = _plan(())
        self.log: Callable[[int], str] = lambda since: ""

    def becomes(self, **changes: object) -> None:
        (name,) = self.services
        self.services = {name: replace(self.services[name], **changes)}  # type: ignore[arg-type]

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None: ...

    async def learn(self, service: Service) -> None: ...

    async def reload(self, service: Service) -> Reloaded:
        return self.answer(self)

    async def started(self, service: Service) -> bool:
        return True

    async def revive(self, service: Service) -> Reloaded:
        return Reloaded(ok=True)

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        if words[0] == "by-plan":
            return await self.plan(timeout_sec)
        if words == ["unaskable"]:
            raise Later("could not be run: the bus went away")
        return Ended("", "") if words == ["true"] else Ended("failed with exit status 1", "line 7\n")

    async def logged(self, service: Service, since: int) -> str:
        return self.log(since)

    async def processes(self, service: Service) -> list[int]:
        return []


Plan = Callable[[float], Awaitable[Ended]]


def _plan(passes: Sequence[tuple[float, bool]], each: float = 0.05) -> Plan:
    """A health check that takes so many seconds, and passes or fails from given times after its first run on."""
    begun: list[float] = []

    async def run(timeout_sec: float) -> Ended:
        begun.append(trio.current_time())
        with trio.move_on_after(timeout_sec) as limit:
            await trio.sleep(each)
        if limit.cancelled_caught:
            return Ended(f"was killed: it took longer than {timeout_sec:g} s", "")
        since = trio.current_time() - begun[0]
        good = [passed for at, passed in passes if at <= since][-1]
        return Ended("" if good else "failed with exit status 1", "" if good else "line 7\n")

    return run


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "infinity"]) as running:
        yield running
        running.kill()


@pytest.fixture
def service(program: subprocess.Popen[bytes]) -> Iterator[Service]:
    with Process(program.pid) as main:
        yield Service("web.service", Declared(), ServiceSettings(), main=main, invocation="first")


async def judged(service: Service, answer: Answer) -> Judged | None:
    assert service.main is not None
    return await reload_and_judge(Manager(service, answer), service, service.main, STACK)


def done(manager: Manager) -> Reloaded:
    return Reloaded(ok=True, told="reload")


async def test_one_that_goes_on_is_good(service: Service) -> None:
    assert await judged(service, done) == Judged(STACK, Verdict.GOOD, "reload")


async def test_a_unit_that_failed_is_bad_whatever_its_reload_said(service: Service) -> None:
    def fails(manager: Manager) -> Reloaded:
        manager.becomes(failed=True)
        return done(manager)

    verdict = await judged(service, fails)
    assert verdict == Judged(STACK, Verdict.WENT_DOWN, "reload", "its unit failed")


async def test_another_main_process_is_bad(service: Service) -> None:
    with subprocess.Popen(["sleep", "infinity"]) as other, Process(other.pid) as process:

        def moves(manager: Manager) -> Reloaded:
            manager.becomes(main=process)
            return done(manager)

        verdict = await judged(service, moves)
        other.kill()
    assert verdict is not None and verdict.verdict is Verdict.WENT_DOWN
    assert "another process took the place" in verdict.reason


async def test_one_that_goes_down_is_bad(
    service: Service, program: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    def dies(manager: Manager) -> Reloaded:
        program.kill()
        program.wait()
        manager.becomes(main=None, failed=True)
        return done(manager)

    verdict = await judged(service, dies)
    assert verdict is not None and verdict.verdict is Verdict.WENT_DOWN
    assert "its main process ended when it was told" in verdict.reason


async def test_one_that_says_no_is_bad(service: Service) -> None:
    def refuses(manager: Manager) -> Reloaded:
        return Reloaded(ok=False, told="reload", reason="its reload failed", output="line 7\n")

    assert await judged(service, refuses) == Judged(
        STACK, Verdict.RELOAD_FAILED, "reload", "its reload failed", "line 7\n"
    )


@pytest.mark.parametrize("up", [True, False])
async def test_one_that_was_started_on_it_is_judged_by_its_start(
    service: Service, autojump_clock: trio.testing.MockClock, up: bool
) -> None:
    class Starting(Manager):
        async def started(self, service: Service) -> bool:
            self.becomes(main=service.main if up else None, failed=not up)
            return up

    assert service.main is not None
    found = await judge_start(Starting(service, done), service, service.main, STACK)
    ended = "its main process ended before its start was complete"
    assert found == (Judged(STACK, Verdict.GOOD) if up else Judged(STACK, Verdict.WENT_DOWN, reason=ended))


@pytest.mark.parametrize("ok", [True, False])
async def test_one_that_somebody_stops_meanwhile_says_nothing(
    service: Service, program: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock, ok: bool
) -> None:
    """Nor does a reload job that was canceled for it."""

    def is_stopped(manager: Manager) -> Reloaded:
        program.kill()
        program.wait()
        manager.becomes(main=None, failed=False)
        return Reloaded(ok=ok, told="reload", reason="" if ok else "reload was canceled", interrupted=not ok)

    assert await judged(service, is_stopped) is None


@pytest.mark.parametrize("told", ["reload", "restart"])
@pytest.mark.parametrize("ok", [True, False])
async def test_an_end_that_is_not_its_own_doing_says_nothing(
    service: Service,
    program: subprocess.Popen[bytes],
    autojump_clock: trio.testing.MockClock,
    told: str,
    ok: bool,
) -> None:
    def ends(manager: Manager) -> Reloaded:
        program.kill()
        program.wait()
        manager.becomes(main=None, failed=True, blameless="exit status 226 is systemd's own")
        return Reloaded(ok=ok, told=told, reason="" if ok else f"{told} failed")

    found = await judged(service, ends)
    assert found is None or (found.verdict, told, ok) == (Verdict.RELOAD_FAILED, "reload", False)


async def test_a_reload_that_could_not_be_followed_is_tried_again(service: Service) -> None:
    def lost(manager: Manager) -> Reloaded:
        return Reloaded(ok=False, told="reload", reason="the bus went away", interrupted=True)

    with pytest.raises(Later, match="it is not told yet: the bus went away"):
        await judged(service, lost)


async def test_a_restart_that_ends_in_failure_is_bad(
    service: Service, program: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    """Also where systemd had nothing to complain about at first (Type=simple)."""

    def restarts(manager: Manager) -> Reloaded:
        program.kill()
        program.wait()
        manager.becomes(main=None, failed=True)
        return Reloaded(ok=True, told="restart")

    verdict = await judged(service, restarts)
    assert verdict == Judged(STACK, Verdict.WENT_DOWN, "restart", "its main process ended after its restart")


async def test_a_restart_is_judged_by_the_new_process(service: Service) -> None:
    with subprocess.Popen(["sleep", "infinity"]) as other, Process(other.pid) as process:

        def restarts(manager: Manager) -> Reloaded:
            manager.becomes(main=process, invocation="second")
            return Reloaded(ok=True, told="restart")

        verdict = await judged(service, restarts)
        other.kill()
    assert verdict == Judged(STACK, Verdict.GOOD, "restart")


async def test_a_health_check_that_goes_on_failing_is_bad(
    service: Service, autojump_clock: trio.testing.MockClock
) -> None:
    settings = ServiceSettings(health_check=("/bin/false",), health_check_usec=1_000_000)
    verdict = await judged(replace(service, settings=settings), done)
    assert verdict is not None and verdict.verdict is Verdict.HEALTH_CHECK_FAILED
    assert "health check '/bin/false' failed" in verdict.reason
    assert verdict.output == "line 7\n"


@pytest.mark.parametrize("each", [0.05, 0.25, 0.45, 0.6])
async def test_a_health_check_that_is_killed_because_it_began_late_says_what_was_wrong_before(
    service: Service, autojump_clock: trio.testing.MockClock, each: float
) -> None:
    settings = ServiceSettings(health_check=("by-plan",), health_check_usec=1_000_000)
    checked = replace(service, settings=settings)
    manager = Manager(checked, done)
    manager.plan = _plan([(0, False)], each)
    assert checked.main is not None
    verdict = await reload_and_judge(manager, checked, checked.main, STACK)
    assert verdict is not None and "failed with exit status 1" in verdict.reason


@pytest.mark.parametrize(
    ("passes", "settings", "good", "took"),
    [
        pytest.param([(0, True)], {}, True, (2.0, 2.3), id="well at once, for two seconds"),
        pytest.param([(0, True)], {"health_stable_usec": 0}, True, (0, 0.1), id="once is enough"),
        pytest.param([(0, True), (1.5, False)], {}, False, (9.5, 10.1), id="the old workers answered"),
        pytest.param([(0, False), (3, True)], {}, True, (4.9, 5.5), id="slow to come up"),
        pytest.param(
            [(0, True), (1, False), (1.2, True)], {}, True, (3.0, 3.8), id="a failure starts the time anew"
        ),
        pytest.param([(0, False), (9, True)], {}, False, (9, 10.1), id="too late to hold"),
        pytest.param(
            [(0, True)], {"health_check_usec": 300_000}, True, (0.15, 0.4), id="never longer than half of all"
        ),
        pytest.param(
            [(0, True), (5, False)], {"health_watch_usec": 10_000_000}, False, (5, 6.2), id="watched, and ill"
        ),
        pytest.param(
            [(0, True), (13, False)],
            {"health_watch_usec": 10_000_000},
            True,
            (12, 12.5),
            id="watched, and well",
        ),
    ],
)
async def test_a_health_check_must_hold(
    service: Service,
    autojump_clock: trio.testing.MockClock,
    passes: Sequence[tuple[float, bool]],
    settings: dict[str, int],
    good: bool,
    took: tuple[float, float],
) -> None:
    given = ServiceSettings(health_check=("by-plan",), **settings)  # type: ignore[arg-type]
    checked = replace(service, settings=given)
    manager = Manager(checked, done)
    manager.plan = _plan(passes)
    begun = trio.current_time()
    assert checked.main is not None
    verdict = await reload_and_judge(manager, checked, checked.main, STACK)
    assert verdict is not None
    assert verdict.verdict is (Verdict.GOOD if good else Verdict.HEALTH_CHECK_FAILED), verdict.reason
    assert took[0] <= trio.current_time() - begun <= took[1]


async def test_one_that_hangs_after_it_has_answered_is_bad(
    service: Service, autojump_clock: trio.testing.MockClock
) -> None:
    checked = replace(service, settings=ServiceSettings(health_check=("by-plan",)))
    manager = Manager(checked, done)
    runs: list[float] = []

    async def answers_once(timeout_sec: float) -> Ended:
        runs.append(timeout_sec)
        if len(runs) == 1:
            return Ended("", "")
        await trio.sleep(timeout_sec)
        return Ended("was killed: it took too long", "")

    manager.plan = answers_once
    begun = trio.current_time()
    assert checked.main is not None
    verdict = await reload_and_judge(manager, checked, checked.main, STACK)
    assert verdict is not None and verdict.verdict is Verdict.HEALTH_CHECK_FAILED
    assert trio.current_time() - begun <= 10.3


async def test_what_ends_while_its_health_must_hold_is_noticed_at_once(
    service: Service, program: subprocess.Popen[bytes]
) -> None:
    checked = replace(
        service, settings=ServiceSettings(health_check=("by-plan",), health_stable_usec=60_000_000)
    )
    manager = Manager(checked, done)

    async def dies(timeout_sec: float) -> Ended:
        program.kill()
        program.wait()
        manager.becomes(main=None, failed=True)
        return Ended("", "")

    manager.plan = dies
    assert checked.main is not None
    verdict = await reload_and_judge(manager, checked, checked.main, STACK)
    assert verdict == Judged(STACK, Verdict.WENT_DOWN, "reload", "its main process ended after its reload")


@pytest.mark.parametrize(
    ("setting", "undoing", "verdict", "reason"),
    [
        ("fail", False, Verdict.RELOAD_FAILED, "it logged an error ([emerg] bind failed)"),
        ("show", False, Verdict.GOOD, ""),
        ("fail", True, Verdict.GOOD, ""),
    ],
)
async def test_what_it_logs_after_a_reload_may_count(
    service: Service,
    autojump_clock: trio.testing.MockClock,
    setting: str,
    undoing: bool,
    verdict: Verdict,
    reason: str,
) -> None:
    """On the way back it does not: what went wrong with the bad stack may be logged only then."""
    checked = replace(service, settings=ServiceSettings(reload_errors=setting))
    logged = "[emerg] bind failed\n[emerg] still could not bind"
    begun = trio.current_time()

    def reloads(manager: Manager) -> Reloaded:
        time.sleep(0.02)
        return done(manager)

    manager = Manager(checked, reloads)
    manager.log = lambda since: logged if setting == "show" or trio.current_time() - begun > 1 else ""
    assert checked.main is not None
    found = await reload_and_judge(manager, checked, checked.main, STACK, undoing=undoing)
    assert found is not None and (found.verdict, found.reason) == (verdict, reason)
    assert found.logged == logged


async def test_a_command_that_could_not_be_run_is_no_verdict(service: Service) -> None:
    manager = Manager(service, done)
    with pytest.raises(Later, match="check 'unaskable' could not be run: the bus went away"):
        await service_check.run_all(manager, service, -1, ("true", "unaskable"), 1_000_000, "check")
