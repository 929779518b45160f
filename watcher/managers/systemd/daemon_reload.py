# SPDX-License-Identifier: LGPL-2.1-or-later
"""daemon-reload, as seldom as possible: all requests that come within a moment share one.

A daemon-reload stops systemd for as long as it takes (0.4 s with 1000 units), and the administrator may limit how many
there can be (`ReloadLimitBurst=` in systemd-system.conf(5)). So reloads keep a distance, and there are never more than
our own `ReloadLimitBurst=` within `ReloadLimitIntervalSec=`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from watcher.records import journal

GATHER_SEC = 0.1
"""Requests that come within this time of the first are served together."""

DISTANCE_SEC = 1.0
"""Between the end of one reload and the begin of the next."""

RETRY_SEC = 2.0

REQUEST_SEC = 60.0
"""For so long a request waits: a service whose turn does not come must get what is dropped next all the same."""


class ReloadRefused(Exception):
    """systemd does not reload now (its own limit), or cannot be reached: try again. `str()` says why."""


class Asked:
    """A request.

    Attributes:
        over: set at the end of the reload that was made for it.
        refused: why systemd has not made it, else "". What goes wrong with us holds nobody up.
    """

    def __init__(self) -> None:
        self.over = trio.Event()
        self.refused = ""


class DaemonReload:
    """Shared daemon-reloads.

    Args:
        reload: makes one, to its end. Raises ReloadRefused.
        burst: at most so many within `interval` seconds; 0: no limit.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]], burst: int, interval: float) -> None:
        self.burst = burst
        self.interval = interval
        self._reload = reload
        self._wanted = trio.Event()
        self._waiting: list[Asked] = []
        self._begun: deque[float] = deque()
        self._ended = float("-inf")
        self._failure = ""

    async def request(self) -> None:
        """Wait for the end of a reload that began after this call. `run()` must run in another task.

        Raises:
            ReloadRefused: it has not come about. It is still going to.
        """
        asked = self.ask()
        with trio.move_on_after(REQUEST_SEC):
            await asked.over.wait()
        if not asked.over.is_set():
            raise ReloadRefused(f"its turn has not come within {REQUEST_SEC:g} s")
        if asked.refused:
            raise ReloadRefused(asked.refused)

    def ask(self) -> Asked:
        """Ask for a reload without waiting."""
        asked = Asked()
        self._waiting.append(asked)
        self._wanted.set()
        return asked

    async def run(self) -> None:
        """Serve requests until cancelled."""
        while True:
            await self._wanted.wait()
            await trio.sleep(GATHER_SEC)
            await trio.sleep_until(self._allowed(trio.current_time()))
            waiting, self._waiting = self._waiting, []
            self._wanted = trio.Event()
            failure = await self._once()
            for asked in waiting:
                asked.refused = str(failure) if isinstance(failure, ReloadRefused) else ""
                asked.over.set()
            if failure is not None:
                self._say(failure)
                self._wanted.set()
                await trio.sleep(RETRY_SEC)

    async def _once(self) -> Exception | None:
        """Make one; why it has not come about."""
        self._begun.append(trio.current_time())
        try:
            await self._reload()
        except Exception as error:  # noqa: BLE001 -- must not end the daemon, nor keep its callers waiting
            return error
        self._ended = trio.current_time()
        self._failure = ""
        return None

    def _say(self, error: Exception) -> None:
        """Log a failure, once for as long as it stays the same."""
        if self._failure == repr(error):
            return
        self._failure = repr(error)
        if isinstance(error, ReloadRefused):
            journal.log.warning(f"daemon-reload was not possible, it is tried again: {error}")
        else:
            journal.log.exception("daemon-reload went wrong, it is tried again")

    def _allowed(self, now: float) -> float:
        """When the next one may begin."""
        earliest = max(now, self._ended + DISTANCE_SEC)
        while self._begun and self._begun[0] <= now - self.interval:
            self._begun.popleft()
        if self.burst and len(self._begun) >= self.burst:
            earliest = max(earliest, self._begun[-self.burst] + self.interval)
        return earliest
