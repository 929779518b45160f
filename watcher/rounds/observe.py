# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first step of a round: look at what a service should have, from what is on disk, known and kept out now.

A look changes nothing but what is watched, and the store: what it finds is copied there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from watcher.images.admission import host
from watcher.managers.base import Service
from watcher.model import Busy, Interest
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.outcomes import Outcomes, signatures
from watcher.rounds.rollout import rolling
from watcher.rounds.state import Memory
from watcher.rounds.tools import Tools

# What the host merges lies on that, in the services' namespaces too.
_HOST_ETC = Interest("/", pattern="etc")


class Observer:
    """Looks at services.

    Args:
        memories: what is remembered of each service, by name.
    """

    def __init__(self, tools: Tools, outcomes: Outcomes, memories: Mapping[str, Memory]) -> None:
        self._tools = tools
        self._outcomes = outcomes
        self._memories = memories

    @asynccontextmanager
    async def using_store(self) -> AsyncIterator[None]:
        """`Store.using()` for the event loop, which never waits for a lock: a thread does."""
        try:
            held = self._tools.store.hold(wait=False)
        except Busy:
            held = await trio.to_thread.run_sync(self._tools.store.hold, abandon_on_cancel=True)
        with held:
            yield

    async def look(self, service: Service) -> Desired:
        """What the service should have now. Hold `using_store()`."""
        kept_out, elsewhere = self._kept_out(service)
        return await self._tools.offload.run(service.name, self._find, service, kept_out, elsewhere)

    async def watch_and_look(self, service: Service, memory: Memory) -> Desired:
        """`look()` at what was watched before it was read: no change in between is missed."""
        while True:
            desired = await self.look(service)
            if desired.look.interests == memory.interests:
                return desired
            new = await self._tools.watcher.watch(service.name, (*desired.look.interests, _HOST_ETC))
            memory.interests = desired.look.interests
            if not new:
                return desired

    def _find(self, service: Service, kept_out: dict[str, str], elsewhere: dict[str, str]) -> Desired:
        """Blocks, also on the service's root and on where its images come from, which may be dead network mounts."""
        tools, name = self._tools, service.name
        given = Given(
            service.slots,
            service.declared,
            None if service.root is None else host(service.root),
            kept_out,
            elsewhere,
            tools.ledger.pinned(name),
            tools.trials.of(name),
            service.settings.image_policy,
            service.trust,
        )
        with tools.store.using():  # the round may give this up, while a copy goes on
            desired = find(tools.store, tools.admission, given)
        memory = self._memories.get(name)
        if memory is not None:
            memory.at_hand = desired.at_hand
        return replace(desired, signatures=signatures(desired.passed))

    def _kept_out(self, service: Service) -> tuple[dict[str, str], dict[str, str]]:
        """What must not get into a service with the reasons: for its own sake, and because of others."""
        elsewhere: dict[str, str] = {}
        if service.settings.rollout == "rolling":
            for other in rolling(self._tools):
                if other.name != service.name:
                    found = self._kept_out_of(other.name)
                    elsewhere |= {key: f"it did not do on {other.name}: {why}" for key, why in found.items()}
        return self._kept_out_of(service.name), elsewhere

    def _kept_out_of(self, name: str) -> dict[str, str]:
        memory = self._memories.get(name)
        return self._outcomes.kept_out(name) | (memory.held if memory is not None else {})
