# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done for each service a moment after its round: nobody waits for it, and it must keep nobody waiting."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import trio

# A drop waits for so many at most; one at a time would cost the event loop more than there is to do.
_TOGETHER = 8

# Seconds between two looks whether it is quiet, and after which it does not matter any more.
_QUIET_SEC = 0.02
_QUIET_MAX_SEC = 1.0

# Seconds that the others wait for them.
_HANGS_SEC = 0.1


class Afterwards:
    """Does something for services that are due. For one event loop.

    Args:
        do: for one service, by its name.
        later_sec: how long more of them are waited for, seconds.
        is_busy: whether something more urgent goes on, the rounds of a burst. That is waited for, but not for ever.
    """

    def __init__(
        self, do: Callable[[str], Awaitable[None]], later_sec: float, is_busy: Callable[[], bool]
    ) -> None:
        self._do, self._later_sec, self._is_busy = do, later_sec, is_busy
        self._due: set[str] = set()
        self._wake = trio.Event()

    def due(self, name: str) -> None:
        """Do it for a service."""
        self._due.add(name)
        self._wake.set()

    async def run(self) -> None:
        """Do what is due until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                await trio.sleep(self._later_sec)
                await self._wait_until_quiet()
                self._wake = trio.Event()
                names, self._due = iter(sorted(self._due)), set()
                while some := tuple(itertools.islice(names, _TOGETHER)):
                    left, over = set(some), trio.Event()
                    for name in some:
                        nursery.start_soon(self._one, name, left, over)
                    with trio.move_on_after(_HANGS_SEC):  # what hangs goes on alone
                        await over.wait()

    async def _wait_until_quiet(self) -> None:
        latest = trio.current_time() + _QUIET_MAX_SEC
        while self._is_busy() and trio.current_time() < latest:
            await trio.sleep(_QUIET_SEC)

    async def _one(self, name: str, left: set[str], over: trio.Event) -> None:
        try:
            await self._do(name)
        finally:
            left.remove(name)
            if not left:
                over.set()
