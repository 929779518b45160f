# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the swap: ask the service to reload, and judge how it takes it.

The reload must succeed, the main process must be the same and alive, the unit must not have failed. Then comes what the
unit asks for: its health (`health.py`), and `HealthWatchSec=`, for which it must stay well and up. A service that was
started on its stack is judged likewise, without the reload.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import trio

from watcher.managers.base import Manager, Reloaded, Service
from watcher.model import Later, Stack, Verdict
from watcher.mounts.process import Gone, Process
from watcher.rounds import messages
from watcher.rounds.facts import Judged
from watcher.rounds.health import Health
from watcher.rounds.outcomes import say

_POLL_SEC = 0.02

# How long a manager may take to notice what has become of a process, in seconds.
_NOTICED_SEC = 2.0

# With Rollout=rolling others follow a good verdict: the end of one that a reload signal kills must be seen before.
_ROLLING_WATCH_USEC = 1_000_000


async def reload_and_judge(
    manager: Manager,
    service: Service,
    main: Process,
    stack: Stack,
    done: tuple[Reloaded, int] | None = None,
    *,
    undoing: bool = False,
) -> Judged | None:
    """Ask a running service to reload; good only if it came through.

    Args:
        main: its main process, held by the caller.
        stack: what it is judged on.
        done: what came of that, if it was asked already, and how long it took, microseconds.
        undoing: it is the way back from a bad one. Where the service is still busy with that, nobody waits for it.

    Returns:
        None if an operator stopped it or started it anew while it was watched.

    Raises:
        Later: whether it has reloaded could not be found out.
    """
    reloaded, usec = done or await _reload(manager, service)
    say("debug", service.name, messages.told(reloaded))
    told = Judged(stack, Verdict.GOOD, reloaded.told, reloaded.reason, reloaded.output, usec)
    judge = _Judge(manager, service, main)
    if reloaded.interrupted:
        if not main.alive() and not await judge.went_down():
            return None
        if reloaded.blocked and undoing:
            return replace(told, verdict=Verdict.RELOAD_FAILED)
        raise Later(f"its {reloaded.told or 'reload'} was interrupted: {reloaded.reason}")
    if not reloaded.ok:
        return replace(told, verdict=Verdict.RELOAD_FAILED)
    if reloaded.told == "restart":
        after = await _restarted(manager, service)
        if after is None:
            return told  # an operator has stopped it meanwhile
        if after.main is None:
            return _ended(told, "after its restart")
        with after.main.hold() as new:
            return await _Judge(manager, after, new).verdict(told, "its reload")
    if not main.alive():
        return await judge.why_ended(told, "when it was told to reload")
    return await judge.verdict(told, "its reload")


async def _reload(manager: Manager, service: Service) -> tuple[Reloaded, int]:
    begun = trio.current_time()
    reloaded = await manager.reload(service)
    return reloaded, round((trio.current_time() - begun) * 1_000_000)


async def judge_start(manager: Manager, service: Service, main: Process, stack: Stack) -> Judged | None:
    """Judge a service that was started on its stack.

    Args:
        main: its main process, held by the caller.
        stack: that stack.

    Returns:
        None if its main process has ended and it did not go down: it was done (`Type=oneshot`), or was stopped.
    """
    judge = _Judge(manager, service, main)
    up = False

    async def ended() -> None:
        await trio.lowlevel.wait_readable(main.pidfd)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended)
        up = await manager.started(service)
        nursery.cancel_scope.cancel()
    started = Judged(stack, Verdict.GOOD)
    if not up:
        return await judge.why_ended(started, "before its start was complete")
    return await judge.verdict(started, "its start")


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges a service after its reload or start.

    Attributes:
        main: its main process, held by the caller.
    """

    manager: Manager
    service: Service
    main: Process

    async def verdict(self, told: Judged, since: str) -> Judged | None:
        """The verdict on a service that is up; None if its main process has ended, and it did not go down.

        Args:
            since: what it did last, "its reload".
        """
        settings, name = self.service.settings, self.service.name
        health = Health(self.manager, self.service, self.main)
        when = f"after {since}"
        try:
            ended = await health.proved()
            if settings.health_check and not ended.reason:
                say("debug", name, "health check passed")
            watch = settings.health_watch_usec
            if settings.rollout == "rolling":
                watch = max(watch, _ROLLING_WATCH_USEC)
            if watch and not ended.reason:
                seconds = watch / 1_000_000
                say("debug", name, f"on trial for {seconds:g} s more")
                when = f"within {seconds:g} s of {since}"
                ended = await health.watch(seconds)
        except Gone:
            return await self.why_ended(told, when)
        if ended.reason:
            failed = Verdict.HEALTH_CHECK_FAILED
            return replace(told, verdict=failed, reason=ended.reason, output=ended.output)
        return self._as_before(told)

    async def why_ended(self, told: Judged, when: str) -> Judged | None:
        """The verdict on a service whose main process has ended; None if it was done, or was stopped."""
        return _ended(told, when) if await self.went_down() else None

    async def went_down(self) -> bool:
        """Whether a service whose main process has ended went down by itself: it was not stopped or restarted."""
        name = self.service.name
        with trio.move_on_after(_NOTICED_SEC):
            while (now := self.manager.services.get(name)) and now.main and now.main.pid == self.main.pid:
                await trio.sleep(_POLL_SEC)
        now = self.manager.services.get(name)
        return now is not None and now.went_down_since(self.service.restarts)

    def _as_before(self, told: Judged) -> Judged:
        """`told`, unless the manager says that the service is not what it was."""
        now = self.manager.services.get(self.service.name)
        if now is None or now.invocation != self.service.invocation:
            return told
        if now.failed:
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
