# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the swap: ask the service to reload, and judge how it takes it.

The reload must succeed, the main process must be the same and alive, the unit must not have failed. Then comes what the
unit asks for: its health (`health.py`), and `HealthWatchSec=`, for which it must stay well and up. A service that was
started on its stack is judged likewise, without the reload.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

import trio

from watcher.managers.base import Ended, Manager, Reloaded, Service
from watcher.model import Later, Stack, Verdict
from watcher.mounts.process import Gone, Process
from watcher.rounds import messages
from watcher.rounds.facts import Judged
from watcher.rounds.health import Health
from watcher.rounds.outcomes import say

_POLL_SEC = 0.02

# How long a manager may take to notice what has become of a process, in seconds.
_NOTICED_SEC = 2.0

# Nobody waits for what a service does after a signal: so soon it has hardly begun to read.
_DEAF_USEC = 500_000

# With Rollout=rolling others follow a good verdict: the end of one that a reload signal kills must be seen before.
_ROLLING_WATCH_USEC = 1_000_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A service was asked to reload.

    Attributes:
        since: when, microseconds since the epoch.
        usec: how long that took, microseconds.
    """

    reloaded: Reloaded
    since: int
    usec: int


async def reload_and_judge(
    manager: Manager,
    service: Service,
    main: Process,
    stack: Stack,
    asked: Asked | None = None,
    *,
    undoing: bool = False,
) -> Judged | None:
    """Ask a running service to reload; good only if it came through.

    Args:
        main: its main process, held by the caller.
        stack: what it is judged on.
        asked: what came of that, if it was asked already.
        undoing: it is the way back from a bad one. Where the service is still busy with that, nobody waits for it.

    Returns:
        None if an operator stopped it or started it anew while it was watched, or its end says nothing about the stack.

    Raises:
        Later: whether it has reloaded could not be found out.
    """
    asked = asked or await _ask(manager, service)
    say("debug", service.name, functools.partial(messages.told, asked.reloaded))
    # What went wrong with the bad stack may be logged only now. There is no way back from the way back, either.
    log_since = None if undoing else asked.since
    judge = _Judge(manager, service, main, log_since=log_since, reloaded=True)
    judged = await _judge_reload(judge, stack, asked, undoing=undoing)
    return await _with_log(manager, service, judged, asked.since)


def judged_at_once(
    manager: Manager, service: Service, main: Process, stack: Stack, asked: Asked
) -> Judged | None:
    """The verdict of `reload_and_judge()` on a service that took a signal, if nobody has to wait for it; else None."""
    settings, reloaded = service.settings, asked.reloaded
    if not reloaded.ok or reloaded.interrupted or reloaded.told in ("reload", "restart"):
        return None
    waits = settings.health_check or settings.health_watch_usec or settings.rollout == "rolling"
    if waits or settings.reload_errors == "fail" or messages.now() - asked.since >= _DEAF_USEC:
        return None
    if not main.alive():
        return None
    told = Judged(stack, Verdict.GOOD, reloaded.told, reloaded.reason, reloaded.output, asked.usec)
    judged = _Judge(manager, service, main)._as_before(told)
    if not judged.good:
        return None
    say("debug", service.name, functools.partial(messages.told, reloaded))
    return judged


async def _ask(manager: Manager, service: Service) -> Asked:
    since, begun = messages.now(), trio.current_time()
    reloaded = await manager.reload(service)
    return Asked(reloaded, since, round((trio.current_time() - begun) * 1_000_000))


async def _judge_reload(judge: _Judge, stack: Stack, asked: Asked, *, undoing: bool) -> Judged | None:
    manager, service, main, reloaded = judge.manager, judge.service, judge.main, asked.reloaded
    told = Judged(stack, Verdict.GOOD, reloaded.told, reloaded.reason, reloaded.output, asked.usec)
    if reloaded.interrupted:
        if not main.alive() and not await judge.went_down():
            return None
        if reloaded.blocked and undoing:
            return replace(told, verdict=Verdict.RELOAD_FAILED)
        raise Later(f"its stack is in place, but it is not told yet: {reloaded.reason}")
    if not reloaded.ok:
        if reloaded.told == "restart" and await judge.ended_blamelessly():
            return None
        return replace(told, verdict=Verdict.RELOAD_FAILED)
    if reloaded.told == "restart":
        after = await _restarted(manager, service)
        if after is None:
            return replace(told, told="", reason="it was not started again, it had been stopped meanwhile")
        if after.main is None:
            return None if after.blameless else _ended(told, "after its restart")
        with after.main.hold() as new:
            return await replace(judge, service=after, main=new).verdict(told, "its reload")
    if not main.alive():
        return await judge.why_ended(told, "when it was told to reload")
    return await judge.verdict(told, "its reload")


async def judge_start(manager: Manager, service: Service, main: Process, stack: Stack) -> Judged | None:
    """Judge a service that was started on its stack.

    Args:
        main: its main process, held by the caller.
        stack: that stack.

    Returns:
        None if its main process has ended and it did not go down: it was done (`Type=oneshot`), or was stopped.

    Raises:
        Later: whether its start is complete could not be found out.
    """
    judge = _Judge(manager, service, main)
    judged = await _judge_start(judge, stack)
    return await _with_log(manager, service, judged, _begun(main))


async def _judge_start(judge: _Judge, stack: Stack) -> Judged | None:
    manager, service, main = judge.manager, judge.service, judge.main
    up, later = False, None

    async def ended() -> None:
        await trio.lowlevel.wait_readable(main.pidfd)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended)
        try:
            up = await manager.started(service)
        except Later as error:
            later = error
        nursery.cancel_scope.cancel()
    if later is not None:
        raise later
    started = Judged(stack, Verdict.GOOD)
    if not up:
        return await judge.why_ended(started, "before its start was complete")
    return await judge.verdict(started, "its start")


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges a service after its reload or start.

    Attributes:
        main: its main process, held by the caller.
        reloaded: it was told to reload.
        log_since: when its stack was swapped in, microseconds since the epoch; None: on the way back from a bad one.
    """

    manager: Manager
    service: Service
    main: Process
    reloaded: bool = False
    log_since: int | None = None

    async def verdict(self, told: Judged, since: str) -> Judged | None:
        """The verdict on a service that is up; None if its main process has ended, and it did not go down.

        Args:
            since: what it did last, "its reload".
        """
        for verdict, ask, when in self._questions(since):
            try:
                ended = await ask()
            except Gone:
                return await self.why_ended(told, when)
            if ended.reason:
                return replace(told, verdict=verdict, reason=ended.reason, output=ended.output)
        return self._as_before(told)

    def _questions(self, since: str) -> Iterator[tuple[Verdict, Callable[[], Awaitable[Ended]], str]]:
        """What is asked of it, one after the other: the verdict if the answer is bad, and when that was."""
        settings = self.service.settings
        health = Health(self.manager, self.service, self.main)
        log = functools.partial(health.quiet, trio.current_time(), self.log_since)
        asks_log = settings.reload_errors == "fail" and self.reloaded
        when = f"after {since}"
        yield Verdict.HEALTH_CHECK_FAILED, health.proved, when
        if asks_log:
            yield Verdict.RELOAD_FAILED, log, when
        watch = settings.health_watch_usec
        if settings.rollout == "rolling":
            watch = max(watch, _ROLLING_WATCH_USEC)
        if watch:
            seconds = watch / 1_000_000
            say("debug", self.service.name, f"on trial for {seconds:g} s more")
            when = f"within {seconds:g} s of {since}"
            yield Verdict.HEALTH_CHECK_FAILED, functools.partial(health.watch, seconds), when
            if asks_log:
                yield Verdict.RELOAD_FAILED, log, when

    async def why_ended(self, told: Judged, when: str) -> Judged | None:
        """The verdict on a service whose main process has ended; None if it was done, or was stopped."""
        return _ended(told, when) if await self.went_down() else None

    async def went_down(self) -> bool:
        """Whether a service whose main process has ended went down by itself: it was not stopped or restarted."""
        now = await self._noticed()
        return now is not None and now.went_down_since(self.service.restarts)

    async def ended_blamelessly(self) -> bool:
        """Whether its manager says of its end that it says nothing about the stack."""
        now = await self._noticed()
        return now is not None and now.main is None and bool(now.blameless)

    async def _noticed(self) -> Service | None:
        """The service, once its manager has noticed that its main process has ended."""
        name = self.service.name
        with trio.move_on_after(_NOTICED_SEC):
            while (now := self.manager.services.get(name)) and now.main and now.main.pid == self.main.pid:
                await trio.sleep(_POLL_SEC)
        return self.manager.services.get(name)

    def _as_before(self, told: Judged) -> Judged:
        """`told`, unless the manager says that the service is not what it was."""
        now = self.manager.services.get(self.service.name)
        if now is None or now.invocation != self.service.invocation:
            return told
        if now.failed and not now.blameless:
            return replace(told, verdict=Verdict.WENT_DOWN, reason="its unit failed")
        if now.main is not None and now.main.pid != self.main.pid:
            return replace(
                told, verdict=Verdict.WENT_DOWN, reason="another process took the place of its main process"
            )
        return told


async def _restarted(manager: Manager, service: Service) -> Service | None:
    """The service after a restart, without a main process if that has failed; None if it was stopped."""
    with trio.move_on_after(_NOTICED_SEC):
        while True:
            now = manager.services.get(service.name)
            if now is not None and now.main is not None and now.invocation != service.invocation:
                return now
            if now is not None and now.main is None and now.failed:
                return now
            await trio.sleep(_POLL_SEC)
    return None


def _ended(told: Judged, when: str) -> Judged:
    return replace(told, verdict=Verdict.WENT_DOWN, reason=f"its main process ended {when}")


async def _with_log(manager: Manager, service: Service, judged: Judged | None, since: int) -> Judged | None:
    """A verdict, with what the service itself has logged as errors since then."""
    if judged is None:
        return None
    if judged.good and judged.told not in ("reload", "restart") and messages.now() - since < _DEAF_USEC:
        return judged  # a look into the journal takes longer than all the rest
    return replace(judged, logged=await manager.logged(service, since))


def _begun(main: Process) -> int:
    """When a process was started, microseconds since the epoch."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - main.started / os.sysconf("SC_CLK_TCK")
    return messages.now() - round(age * 1_000_000)
