# SPDX-License-Identifier: LGPL-2.1-or-later
"""One after another (`Rollout=rolling`): one service tries new content first, then the others get it.

Services belong together when they are about to get the same content: the instances of a template, or services that
share an image. While the content is on trial with one of them, the others stay on what they have. Once it proved good,
the others follow, `RolloutParallel=` at a time. If it proved bad, the others do not get it, for as long as it is in
quarantine for the first (`Observer` keeps it out).

Two things decide: which services have accepted the content, and whether it is still on trial there. Both outlive a
restart of the watcher. Only which service is at it right now is kept in memory. A round never waits for another: a
service whose turn it is not stays on its stack for this round, and gets a new round when that of another is over.

A service that runs does not wait for one that does not: the trial of that begins with its next start. One that does not
run leaves the first turn to those that do; if nothing was accepted for it yet, it has nothing to lose, and goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from watcher.managers.base import Service
from watcher.model import Stack, Verdict
from watcher.resolve import scan
from watcher.rounds.facts import Facts
from watcher.rounds.tools import Tools
from watcher.watch.offload import Unanswered

# Seconds that a service waits for a look at the files of others, which may not answer.
_SIBLING_SEC = 1.0


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
        tools: for `bid()`.
    """

    def __init__(self, changed: Callable[[str], None], tools: Tools) -> None:
        self._changed = changed
        self._tools = tools
        self._at_it: dict[str, frozenset[str]] = {}
        self._waiting: set[str] = set()

    def claim(self, service: str, bid: Bid) -> str:
        """Why it is not its turn; "": it is, and the service is at it until `end()`."""
        why = self.waits(service, bid)
        if why:
            self._waiting.add(service)
        else:
            self._at_it[service] = bid.new
        return why

    def waits(self, service: str, bid: Bid) -> str:
        """Why it is not its turn, "" if it is."""
        at_it = {name for name, content in self._at_it.items() if content & bid.new and name != service}
        return "" if may_go(bid, at_it) else "it waits for its turn (Rollout=rolling)"

    def begin(self, service: str) -> None:
        """A round of a service begins."""
        self._waiting.discard(service)

    def end(self, service: str, *, rolling: bool) -> None:
        """Its round is over. Unless it waits itself, those that wait may have their turn."""
        claimed = self._at_it.pop(service, None) is not None
        if (rolling or claimed) and service not in self._waiting:
            waiting, self._waiting = self._waiting, set()
            for name in sorted(waiting):
                self._changed(name)

    async def bid(self, service: Service, facts: Facts) -> Bid:
        """What the turn of a service depends on now."""
        new = frozenset(facts.wanted.digests) - frozenset(facts.accepted.digests)
        others = [other for other in rolling(self._tools) if other.name != service.name]
        offered = await self._offered(service, facts.wanted, new, others)
        siblings = await trio.to_thread.run_sync(
            lambda: [self._sibling(other, new, other.name in offered) for other in others]
        )
        return Bid(
            new=new,
            parallel=service.settings.rollout_parallel,
            running=service.main is not None,
            fresh=not facts.accepted.layers,
            siblings=siblings,
        )

    async def _offered(
        self, service: Service, wanted: Stack, new: frozenset[str], others: list[Service]
    ) -> set[str]:
        """Names of those that could have the new content. Only a service that does not run depends on it.

        One whose files do not answer cannot have the content now; it is waited for no longer than a look takes.
        """
        sources = [layer.source for layer in wanted.layers if layer.digest in new]
        running = [other for other in others if other.main is not None]
        if service.main is not None or not running:
            return set()
        offload = self._tools.offload
        own = await offload.run(service.name, lambda: {os.path.realpath(source) for source in sources})
        found = set()

        async def look(other: Service) -> None:
            with suppress(Unanswered):
                if await offload.run_within(_SIBLING_SEC, other.name, lambda: _offers(other)) & own:
                    found.add(other.name)

        async with trio.open_nursery() as nursery:
            for other in running:
                nursery.start_soon(look, other)
        return found

    def _sibling(self, other: Service, new: frozenset[str], offered: bool) -> Sibling:
        state = self._tools.store.state(other.slots)
        accepted, trial = state.accepted.stack, state.trial
        return Sibling(
            other.name,
            running=other.main is not None,
            offered=offered,
            accepted=bool(new) and new <= set(accepted.digests),
            on_trial=trial is not None and trial.stack == accepted.id and trial.verdict is not Verdict.GOOD,
        )


def rolling(tools: Tools) -> list[Service]:
    """The services with `Rollout=rolling`."""
    return [one for one in tools.manager.services.values() if one.settings.rollout == "rolling"]


def _offers(service: Service) -> set[str]:
    """Where the files are that a service could have. Blocks."""
    picks = scan.look(service.declared).picks
    return {os.path.realpath(candidate.path) for pick in picks for candidate in pick.candidates}


def may_go(bid: Bid, at_it: set[str]) -> bool:
    """Whether a service may have new content.

    Args:
        at_it: names of those whose attempt with it is going on.
    """
    if any(
        sibling.accepted and not sibling.on_trial and sibling.name not in at_it for sibling in bid.siblings
    ):
        return len(at_it) < bid.parallel
    trying = [
        sibling
        for sibling in bid.siblings
        if sibling.name in at_it or (sibling.accepted and sibling.on_trial)
    ]
    if not bid.running and bid.fresh:
        return True
    if bid.running:
        return not any(sibling.running for sibling in trying)
    return not trying and not any(sibling.running and sibling.offered for sibling in bid.siblings)
