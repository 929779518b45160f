# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of `Wait`: all calls for one service share a look at what is known of their images.

A new call asks what is known already, and hears each outcome from then on. After each round of the service all of its
calls ask again, because a stack on trial can prove good without an outcome. Calls that ask at the same time share one
look. While nothing happens no call does anything, however many wait.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

import trio

from watcher.images import tries
from watcher.model import Event, Outcome
from watcher.records.schema import utf8

OUTCOMES_MAX = 64
"""Outcomes kept for one slow client; one that does not keep up misses the oldest."""

NOT_YET = (Outcome.UNCHANGED, Outcome.INCOMPLETE)
"""No verdict: the user may go on with an upload that broke off."""

EventByImage = Mapping[str, Event | None]
"""The verdict on each image; None: there is none yet."""


def image_names(source: str) -> tuple[str, ...]:
    """What people call a dropped file: its path, or its name, without the counters that attempts change."""
    path = tries.plain(utf8(source))
    return (path, os.path.basename(path)) if path else ()


@dataclass(eq=False, slots=True)
class _Waiter:
    """One call.

    Attributes:
        unsure: something has happened since the last look at the image.
    """

    image: str
    unsure: bool
    known: Event | None = None
    told: collections.deque[Event] = field(default_factory=lambda: collections.deque(maxlen=OUTCOMES_MAX))
    woken: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Service:
    """The calls that wait for one service.

    Attributes:
        looking: held during a look, which all calls share that are unsure when it begins.
    """

    waiters: list[_Waiter] = field(default_factory=list)
    looking: trio.Lock = field(default_factory=trio.Lock)


class Waits:
    """All calls of `Wait`.

    Args:
        look: the verdicts on images of a service, as far as they are known. May raise ErrorReply.
        in_round: whether a round of a service goes on or is due. Then what is known may be out of date (a user has just
            mended a mode, say), and the first look waits for the end of that round.
    """

    def __init__(
        self,
        look: Callable[[str, Collection[str]], Awaitable[EventByImage]],
        in_round: Callable[[str], bool] = lambda service: False,
    ) -> None:
        self._look = look
        self._in_round = in_round
        self._services: dict[str, _Service] = {}

    def tell(self, event: Event) -> None:
        """Pass an outcome on to the calls that wait for it."""
        service = self._services.get(event.service)
        if service is not None:
            sources = (event.source, *(layer.source for layer in event.layers))
            about = {name for source in sources for name in image_names(source)}
            for waiter in service.waiters:
                if tries.plain(waiter.image) in about:
                    waiter.told.append(event)
                    waiter.woken.set()

    def round_over(self, name: str) -> None:
        """What is known of the images of a service may have changed."""
        service = self._services.get(name)
        if service is not None:
            for waiter in service.waiters:
                waiter.unsure = True
                waiter.woken.set()

    async def verdict(
        self,
        name: str,
        image: str,
        tell: Callable[[Event], Awaitable[None]],
        waits: Callable[[], None],
    ) -> Event:
        """The verdict on an image, once there is one.

        Args:
            name: of the service.
            tell: called with what happens to the image before.
            waits: called when there is no verdict yet, and nothing to do but wait.
        """
        waiter = _Waiter(image, unsure=not self._in_round(name))
        service = self._services.setdefault(name, _Service())
        service.waiters.append(waiter)
        try:
            while True:
                waiter.woken = trio.Event()
                if waiter.unsure:
                    await self._find_out(name, service, waiter)
                # A look takes time: an outcome that came during the look is newer.
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
            service.waiters.remove(waiter)
            if not service.waiters:
                del self._services[name]

    async def _find_out(self, name: str, service: _Service, waiter: _Waiter) -> None:
        """Look for all that are unsure, unless another call has done so while this one waited for the lock."""
        async with service.looking:
            if not waiter.unsure:
                return
            unsure = [one for one in service.waiters if one.unsure]
            for one in unsure:
                one.unsure = False  # before the look: what happens meanwhile makes it unsure again
            try:
                known = await self._look(name, {one.image for one in unsure})
            except BaseException:
                for one in unsure:
                    one.unsure = True
                raise
            for one in unsure:
                one.known = known[one.image]
                one.woken.set()
