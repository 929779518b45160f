# SPDX-License-Identifier: LGPL-2.1-or-later
"""One after another (`Rollout=rolling`): new content is tried on one service first, then on the others.

Services belong together when they are about to get the same new content: the instances of a template, or services
that share an image. The first to come is the one it is tried on; the others wait for its verdict. If that is good they
follow, `RolloutParallel=` at a time; if it is not, none of them is touched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

# Verdicts that are remembered. One that was forgotten is found again by trying.
_KEPT = 1024


@dataclass(slots=True)
class _Group:
    limit: trio.CapacityLimiter
    done: trio.Event = field(default_factory=trio.Event)
    good: bool | None = None
    reason: str = ""


@dataclass(slots=True)
class Turn:
    """A service's turn.

    Attributes:
        refused: why it is not to be touched, "" if it may go on.
        good: set by the service whose turn it is, when it knows.
        reason: why it was not good.
    """

    refused: str = ""
    good: bool | None = None
    reason: str = ""


class Rollout:
    """Decides whose turn it is."""

    def __init__(self) -> None:
        self._groups: dict[frozenset[str], _Group] = {}

    @asynccontextmanager
    async def turn(self, service: str, new: frozenset[str], parallel: int) -> AsyncIterator[Turn]:
        """Wait until a service may have new content.

        Args:
            new: its digests.
            parallel: `RolloutParallel=`.
        """
        turn = Turn()
        while (group := self._groups.get(new)) is not None:
            await group.done.wait()
            if group.good is None:
                continue  # whoever tried it was stopped in the middle: somebody else is the first
            if not group.good:
                turn.refused = group.reason
                yield turn
                return
            async with group.limit:
                yield turn
            return
        group = self._groups[new] = _Group(trio.CapacityLimiter(parallel))
        try:
            yield turn
        finally:
            self._end(service, new, group, turn)

    def forget(self) -> None:
        """Forget all verdicts: what was kept out by hand is let in again."""
        self._groups = {new: group for new, group in self._groups.items() if not group.done.is_set()}

    def _end(self, service: str, new: frozenset[str], group: _Group, turn: Turn) -> None:
        group.good = turn.good
        group.reason = f"it did not do on {service}: {turn.reason}"
        if turn.good is None:
            del self._groups[new]
        group.done.set()
        while len(self._groups) > _KEPT:
            oldest = next(iter(self._groups))
            if not self._groups[oldest].done.is_set():
                break
            del self._groups[oldest]
