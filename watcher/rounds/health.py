# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a service is well after its reload or start: `HealthCheck=`, asked until the answer means something.

A check that passes once means little. After a reload that moved the listener away the old workers of nginx or haproxy
still answer for a moment, and a service that is about to fall has not fallen yet. So the check must hold without a
failure for `HealthStableSec=`, all within `HealthCheckSec=`; and for `HealthWatchSec=` it must go on holding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from watcher.managers.base import Ended, Manager, Service
from watcher.model import shown
from watcher.mounts.process import Gone, Process
from watcher.rounds.outcomes import say
from watcher.rounds.service_check import run_all
from watcher.text import reason_in

_RETRY_SEC = 0.2
_WATCH_SEC = 1.0

WELL = Ended("", "")


@dataclass(frozen=True, slots=True)
class Health:
    """Asks after the health of a service.

    All methods raise Gone: the main process has ended. Raises Later: a check could not be run.

    Attributes:
        main: its main process, held by the caller.
    """

    manager: Manager
    service: Service
    main: Process

    async def proved(self) -> Ended:
        """Run `HealthCheck=` until it has held for `HealthStableSec=`, or cannot do so before the deadline any more."""
        settings = self.service.settings
        if not settings.health_check:
            return WELL
        within = settings.health_check_usec / 1e6
        deadline = trio.current_time() + within
        # Else a service that is not well at once could never be good.
        stable = min(settings.health_stable_usec / 1e6, within / 2)
        since: float | None = None
        failed = WELL
        while True:
            begun = trio.current_time()
            left = round(max(deadline - begun, _RETRY_SEC), 1)  # people read how long it was given
            ended = await self._run(left)
            now = trio.current_time()
            if ended.reason:
                since, pause = None, _RETRY_SEC
                # A run that was killed because it began late tells less than the one before.
                if not (failed.reason and left < within / 2 and now >= begun + left):
                    failed = ended
                if now + pause >= deadline:
                    return failed
            elif not stable or (since is not None and now >= since + stable):
                say("debug", self.service.name, "health check passed")
                return WELL
            else:
                since = begun if since is None else since
                pause = min(_RETRY_SEC, max(since + stable - now, 0))
                if since + stable > deadline:
                    return self._fickle(failed, stable, within)
            await self.pause(pause)

    async def watch(self, seconds: float) -> Ended:
        """Look on for so long: `HealthCheck=` must go on passing."""
        settings = self.service.settings
        end = trio.current_time() + seconds
        while (left := end - trio.current_time()) > 0:
            await self.pause(min(left, _WATCH_SEC) if settings.health_check else left)
            if settings.health_check:
                ended = await self._run(settings.health_check_usec / 1e6)
                if ended.reason:
                    return ended
        return WELL

    async def quiet(self, begun: float, since: int | None) -> Ended:
        """Once `HealthStableSec=` is over: whether the service has logged no error.

        On the way back that says nothing: what went wrong with the bad stack may be logged only now. But after that it
        is over, and the next stack is not blamed for it.

        Args:
            begun: when it had reloaded, `trio.current_time()`.
            since: when its stack was swapped in, microseconds since the epoch; None: on the way back.
        """
        settings = self.service.settings
        await self.pause(max(begun + settings.health_stable_usec / 1e6 - trio.current_time(), 0))
        if since is None:
            return WELL
        logged = await self.manager.logged(self.service, since)
        first = logged.partition("\n")[0]
        return Ended(f"it logged an error{reason_in(first)}" if logged else "", "")

    async def pause(self, seconds: float) -> None:
        """Wait for so long.

        Raises:
            Gone: the main process has ended.
        """
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self.main.pidfd)
            raise Gone(f"process {self.main.pid} has ended")

    async def _run(self, seconds: float) -> Ended:
        checks = self.service.settings.health_check
        namespace = self.main.namespace()
        try:
            usec = round(seconds * 1_000_000)
            ended = await run_all(self.manager, self.service, namespace, checks, usec, "health check")
        finally:
            os.close(namespace)
        if ended.reason and not self.main.alive():
            raise Gone(f"process {self.main.pid} has ended")
        return ended

    def _fickle(self, last: Ended, stable: float, within: float) -> Ended:
        """It passed in the end, but not for long enough. Say how it had failed before."""
        names = ", ".join(map(shown, self.service.settings.health_check))
        why = f"health check {names!r} did not hold for {stable:g} s within {within:g} s"
        return Ended(f"{why}; before: {last.reason}" if last.reason else why, last.output)
