# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a service took its reload: judged by what its manager and its main process say afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        if words == ["unaskable"]:
            raise Later("could not be run: the bus went away")
        return Ended("", "") if words == ["true"] else Ended("failed with exit status 1", "line 7\n")

    async def processes(self, service: Service) -> list[int]:
        return []


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


async def test_a_reload_that_could_not_be_followed_is_tried_again(service: Service) -> None:
    def lost(manager: Manager) -> Reloaded:
        return Reloaded(ok=False, told="reload", reason="the bus went away", interrupted=True)

    with pytest.raises(Later, match="its reload was interrupted: the bus went away"):
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


async def test_a_command_that_could_not_be_run_is_no_verdict(service: Service) -> None:
    manager = Manager(service, done)
    with pytest.raises(Later, match="check 'unaskable' could not be run: the bus went away"):
        await service_check.run_all(manager, service, -1, ("true", "unaskable"), 1_000_000, "check")
