# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of `Wait`: all calls for one service share a look at what is there for their images.

A call looks when it comes, and again whenever something has happened to its service: an outcome, a step that takes
time, the end of a round. It never answers from what it remembers. Calls that ask at the same time share one look. While
nothing happens no call does anything, however many wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import trio

from watcher.rounds.answer import Answer, Kind

Answers = Mapping[str, Answer]
"""By image, as it was asked for."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """One call.

    Attributes:
        unsure: something has happened since the last look.
        known: what that look has found.
        doubted: what it had found before a round came to its end.
        rounds: how many have since the call began.
    """

    image: str
    unsure: bool = True
    known: Answer | None = None
    doubted: tuple[Kind, int] | None = None
    rounds: int = 0
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
        look: the answers for images of a service, as things are now. May raise ErrorReply.
        in_round: whether a round of a service goes on or is due.
    """

    def __init__(
        self,
        look: Callable[[str, Collection[str]], Awaitable[Answers]],
        in_round: Callable[[str], bool] = lambda service: False,
    ) -> None:
        self._look = look
        self._in_round = in_round
        self._services: dict[str, _Service] = {}

    def changed(self, name: str, *, round_over: bool = False) -> None:
        """Something has happened to a service."""
        service = self._services.get(name)
        for waiter in service.waiters if service is not None else ():
            waiter.unsure = True
            waiter.rounds += round_over
            waiter.woken.set()

    async def answer(
        self,
        name: str,
        image: str,
        tell: Callable[[Answer], Awaitable[None]],
        waits: Callable[[], None],
    ) -> Answer:
        """The answer on an image, once it is final.

        Args:
            name: of the service.
            tell: called with each other answer before.
            waits: called when there is nothing to do but wait.
        """
        waiter, told = _Waiter(image), None
        service = self._services.setdefault(name, _Service())
        service.waiters.append(waiter)
        try:
            while True:
                waiter.woken = trio.Event()
                if waiter.unsure:
                    await self._find_out(name, service, waiter)
                known = waiter.known
                assert known is not None
                if known.final and self._is_sure(name, waiter, known):
                    return known
                waits()
                if known.final:
                    known = replace(known, kind=Kind.LOOKING)  # that is what a round does
                said = (known.kind, known.text)
                if said != told:
                    told = said
                    await tell(known)
                if not waiter.unsure:
                    await waiter.woken.wait()
        finally:
            service.waiters.remove(waiter)
            if not service.waiters:
                del self._services[name]

    def _is_sure(self, name: str, waiter: _Waiter, known: Answer) -> bool:
        """Whether a final answer can be given now.

        What a round is at may make more of an image that does not come by itself (a second try, say), and it has still
        to write down why. So that is said when no round goes on or is due, or when one that ended has not changed it.
        """
        if known.kind.status == 0 or not self._in_round(name):
            return True
        doubted, waiter.doubted = waiter.doubted, (known.kind, waiter.rounds)
        if doubted is None or doubted[0] is not known.kind:
            return False
        waiter.doubted = doubted
        return doubted[1] < waiter.rounds

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
