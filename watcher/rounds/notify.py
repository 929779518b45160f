# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Notify=`: tells somebody of an outcome, by a command or a unit that gets its JSON on standard input.

Outcomes are told after they were recorded, and at most once: what waits here when the daemon ends is in the history all
the same. Nothing waits for a notification. So few run at once, each for a limited time, and so many wait; of what is
beyond that a line says how many there were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import trio

from watcher.managers.aside import RunAside
from watcher.managers.base import Service
from watcher.model import Event, Later, shown
from watcher.records import journal
from watcher.records.schema import to_dict
from watcher.settings.config import Settings
from watcher.text import reason_in

_AT_ONCE = 4
_WAITING_MAX = 100
_TIMEOUT_SEC = 30.0


class Notifier:
    """Notifies of outcomes.

    Args:
        services: those that take part, by name.
        settings: of the watcher, as they are now.
        run: runs a command, or starts a unit.
    """

    def __init__(
        self, services: Callable[[], Mapping[str, Service]], settings: Callable[[], Settings], run: RunAside
    ) -> None:
        self._services = services
        self._settings = settings
        self._run = run
        self._send, self._receive = trio.open_memory_channel[tuple[Event, str]](_WAITING_MAX)
        self._left_out = 0

    def tell(self, event: Event) -> None:
        """An outcome was recorded. Does not wait."""
        for command in self._commands(event):
            try:
                self._send.send_nowait((event, command))
            except trio.WouldBlock:
                self._left_out += 1

    def _commands(self, event: Event) -> tuple[str, ...]:
        """What is to be told of it: a service's own `Notify=` takes the place of the watcher's."""
        settings = self._settings()
        service = self._services().get(event.service)
        own = service.settings if service is not None else None
        wanted = (own.notify_on if own is not None else ()) or settings.notify_on
        if event.outcome.value not in wanted:
            return ()
        return (own.notify if own is not None else ()) or settings.notify

    async def run(self) -> None:
        """Notify, until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(self._serve, self._receive.clone())

    async def _serve(self, receive: trio.MemoryReceiveChannel[tuple[Event, str]]) -> None:
        async for event, command in receive:
            if self._left_out:
                count, self._left_out = self._left_out, 0
                journal.log.warning(
                    f"Notify=: too many outcomes at once, {count} were not told; `history` has them"
                )
            await self._notify(event, command)

    async def _notify(self, event: Event, command: str) -> None:
        text = json.dumps(to_dict(event)) + "\n"  # on one line, so that a program may read it as one
        try:
            ended = await self._run(event, command, text.encode(), _TIMEOUT_SEC)
            why = f"{ended.reason}{reason_in(ended.output)}" if ended.reason else ""
        except Later as error:
            why = str(error)
        if why:
            told = f"nobody was told that it was {event.outcome.value}"
            journal.log.warning(
                f"{event.service}: {told}: Notify={shown(command)} {why}", service=event.service
            )
