# SPDX-License-Identifier: LGPL-2.1-or-later
"""One after another (`Rollout=rolling`): new content is tried on one service first, then on the others.

Services belong together when they are about to get the same content: the instances of a template, or services that
share an image. While it is on trial with one of them the others stay on what they have; once it proved good they
follow, `RolloutParallel=` at a time; where it proved bad, none of the others gets it (`Line` keeps it out of them for
as long as it is in quarantine for the one).

What decides is what outlives a restart of the watcher: who has accepted the content, and whether it is still on trial
there. Only who is at it right now is kept in memory. Nobody waits: a service that may not go on stays on its stack for
this round, and is looked at again when a round of another of them is over.

A service that runs does not wait for one that does not, whose trial begins with its next start. One that does not run
leaves the first turn to those that do; and where nothing was accepted for it yet, it has nothing to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another service with `Rollout=rolling`, as far as the new content is concerned.

    Attributes:
        offered: the content is among what it could have.
        accepted: the content is part of its accepted stack.
        on_trial: that stack was not judged yet.
    """

    name: str
    running: bool
    offered: bool = False
    accepted: bool = False
    on_trial: bool = False


@dataclass(frozen=True, slots=True)
class Bid:
    """A service that could have new content, and what its turn depends on.

    Attributes:
        new: the content's digests.
        parallel: `RolloutParallel=`.
        running: the service itself runs.
        fresh: nothing was accepted for it yet.
    """

    new: frozenset[str]
    parallel: int
    running: bool
    fresh: bool
    siblings: Sequence[Sibling]


class Rollout:
    """Decides whose turn it is.

    Args:
        changed: asks for a round of a service.
    """

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._at_it: dict[str, frozenset[str]] = {}
        self._waiting: set[str] = set()

    @contextmanager
    def turn(self, service: str, bid: Bid) -> Iterator[bool]:
        """Whether a service may have new content now; while the block lasts it is at it."""
        if not self.may_go(bid):
            self._waiting.add(service)
            yield False
            return
        self._at_it[service] = bid.new
        try:
            yield True
        finally:
            del self._at_it[service]

    def may_go(self, bid: Bid) -> bool:
        """Whether a service may have new content now."""
        return may_go(bid, {name for name, content in self._at_it.items() if content & bid.new})

    def begin(self, service: str) -> None:
        """A round of a service with `Rollout=rolling` begins."""
        self._waiting.discard(service)

    def end(self, service: str) -> None:
        """Its round is over: unless it waits itself, those that wait may have their turn."""
        if service not in self._waiting:
            waiting, self._waiting = self._waiting, set()
            for name in sorted(waiting):
                self._changed(name)


def may_go(bid: Bid, at_it: set[str]) -> bool:
    """Whether a service may have new content.

    Args:
        at_it: names of those whose attempt with it is going on.
    """
    if any(peer.accepted and not peer.on_trial and peer.name not in at_it for peer in bid.siblings):
        return len(at_it) < bid.parallel
    trying = [peer for peer in bid.siblings if peer.name in at_it or (peer.accepted and peer.on_trial)]
    if not bid.running and bid.fresh:
        return True
    if bid.running:
        return not any(peer.running for peer in trying)
    return not trying and not any(peer.running and peer.offered for peer in bid.siblings)
