# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of `Wait`: what becomes of an image is found out once for all who wait for a service, and only when there is
something to find out.

A call that begins asks what is known already, and hears each outcome from then on. After each round of the service all
of its calls ask again: that a service was started well on a stack on trial is no outcome. Those that have to ask at the
same time share one look, and nothing is done while nothing happens, however many wait.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import trio

from watcher.images import tries
from watcher.model import Event, Outcome
from watcher.records.schema import utf8

BACKLOG = 64
"""Outcomes waiting for one slow client; who does not keep up misses the oldest."""

NOT_YET = (Outcome.UNCHANGED, Outcome.INCOMPLETE)
"""No verdict: an upload that broke off may be taken up again."""

EventByImage = Mapping[str, Event | None]


def names(source: str) -> tuple[str, str]:
    """What people call a dropped file: its path, or its name, without the counters that attempts change."""
    known = utf8(source)
    return tries.plain(known), tries.plain(os.path.basename(known))


@dataclass(eq=False, slots=True)
class _Waiter:
    """One call. `unsure`: something has happened since it was found out what is known of the image."""

    image: str
    unsure: bool
    known: Event | None = None
    told: collections.deque[Event] = field(default_factory=lambda: collections.deque(maxlen=BACKLOG))
    woken: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Room:
    """Those who wait for one service."""

    waiters: list[_Waiter] = field(default_factory=list)
    looking: trio.Lock = field(default_factory=trio.Lock)


class Waits:
    """All calls of `Wait`.

    Args:
        look: what is known by now of images of a service, None for those that have no verdict. May raise ErrorReply.
        in_round: whether a round of a service goes on or is due. Then what is known may be out of date (somebody has
            just mended a mode, say), and the first look waits for the end of that.
    """

    def __init__(
        self,
        look: Callable[[str, Collection[str]], Awaitable[EventByImage]],
        in_round: Callable[[str], bool] = lambda service: False,
    ) -> None:
        self._look = look
        self._in_round = in_round
        self._rooms: dict[str, _Room] = {}

    def tell(self, event: Event) -> None:
        """Pass an outcome on to those who wait for it."""
        room = self._rooms.get(event.service)
        if room is not None:
            about = {name for source in _sources(event) for name in names(source)}
            for waiter in room.waiters:
                if tries.plain(waiter.image) in about:
                    waiter.told.append(event)
                    waiter.woken.set()

    def round_over(self, service: str) -> None:
        """What is known of the images of a service may be something else now."""
        room = self._rooms.get(service)
        if room is not None:
            for waiter in room.waiters:
                waiter.unsure = True
                waiter.woken.set()

    async def verdict(
        self,
        service: str,
        image: str,
        tell: Callable[[Event], Awaitable[None]],
        waits: Callable[[], None],
    ) -> Event:
        """The verdict on an image, once there is one.

        Args:
            tell: called with what happens to the image before.
            waits: called when there is no verdict yet, and nothing to do but wait.
        """
        waiter = _Waiter(image, unsure=not self._in_round(service))
        room = self._rooms.setdefault(service, _Room())
        room.waiters.append(waiter)
        try:
            while True:
                waiter.woken = trio.Event()
                if waiter.unsure:
                    await self._find_out(service, room, waiter)
                # A look takes time, and reads one thing after the other: an outcome that came during it is newer.
                if waiter.known is not None and not waiter.told:
                    return waiter.known
                waits()
                while waiter.told:
                    event = waiter.told.popleft()
                    if event.outcome not in NOT_YET:
                        return event
                    await tell(event)
                if waiter.known is None:
                    await waiter.woken.wait()
        finally:
            room.waiters.remove(waiter)
            if not room.waiters:
                del self._rooms[service]

    async def _find_out(self, service: str, room: _Room, waiter: _Waiter) -> None:
        """Look for all who are unsure: those who came while the look before went on share one."""
        async with room.looking:
            if not waiter.unsure:
                return
            unsure = [one for one in room.waiters if one.unsure]
            for one in unsure:
                one.unsure = False  # before the look: what happens meanwhile makes it unsure again
            try:
                known = await self._look(service, {one.image for one in unsure})
            except BaseException:
                for one in unsure:
                    one.unsure = True
                raise
            for one in unsure:
                one.known = known[one.image]
                one.woken.set()


def _sources(event: Event) -> Iterable[str]:
    return filter(None, [event.source, *(layer.source for layer in event.layers)])
