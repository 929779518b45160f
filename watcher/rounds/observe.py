# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads all that a round decides on: disk, kernel, manager, and what was decided before. Nothing else reads for it.

It changes what is watched, and the store: what it finds is copied there. It claims the turn of a service, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from watcher.images.admission import host
from watcher.managers.base import Service
from watcher.model import Busy, Interest, Later
from watcher.mounts.process import Elsewhere, Gone, Process, namespace_id
from watcher.mounts.workers import HostNamespace
from watcher.records.state import State
from watcher.rounds import messages
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.facts import Facts
from watcher.rounds.memory import Memory, Round
from watcher.rounds.outcomes import Outcomes, say, signatures
from watcher.rounds.rollout import Rollout, rolling
from watcher.rounds.tools import Tools

# What the host merges lies on that, in the services' namespaces too.
_HOST_ETC = Interest("/", pattern="etc")


class Observer:
    """Looks at services.

    Args:
        outcomes: says what a look has found.
        memories: what is remembered of each service, by name.
    """

    def __init__(
        self, tools: Tools, outcomes: Outcomes, rollout: Rollout, memories: Mapping[str, Memory]
    ) -> None:
        self._tools = tools
        self._outcomes = outcomes
        self._rollout = rollout
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

    async def observe(self, service: Service, memory: Memory, this: Round) -> Facts:
        """All that is known of a service at this moment of its round. Hold `using_store()`."""
        if this.desired is None or this.looked_with != of_look(this.state):
            this.state, this.desired = await self._watch_and_look(service, memory)
            this.looked_with = of_look(this.state)
            await self._say(service, self._facts(service, this.state, this.desired), this.desired)
        facts = replace(
            self._facts(service, this.state, this.desired),
            now=this.begun,
            first=this.first,
            blameless=await self._blameless(service, memory),
            shown=this.shown[1] if this.shown and this.shown[0] == service.invocation else None,
            judged=this.judged,
        )
        if facts.rolling and facts.offered and not facts.stays:
            bid = await self._rollout.bid(service, facts)
            facts = replace(facts, waits=self._rollout.claim(service.name, bid))
        return facts

    async def _say(self, service: Service, facts: Facts, desired: Desired) -> None:
        count = sum(len(pick.candidates) for pick in desired.look.picks)
        say("debug", service.name, messages.looked(facts, count))
        await self._outcomes.look(service.name, facts, desired)

    async def glance(self, service: Service) -> tuple[Facts, Desired]:
        """What the next round would find, without doing anything about it. Hold `using_store()`."""
        memory = replace(self._memories.get(service.name, Memory()))  # a copy: nobody remembers a glance
        state, desired = await self._look(service)
        facts = replace(
            self._facts(service, state, desired),
            first=not memory.seen,
            blameless=await self._blameless(service, memory),
        )
        if facts.rolling and facts.offered and not facts.stays:
            bid = await self._rollout.bid(service, facts)
            facts = replace(facts, waits=self._rollout.waits(service.name, bid))
        return facts, desired

    def _facts(self, service: Service, state: State, desired: Desired) -> Facts:
        settings, main = service.settings, service.main
        # If a bad stack took it down, its manager may not have noticed that yet.
        ended = main is not None and state.undoing is not None and not main.alive()
        return Facts(
            now=messages.now(),
            state=state,
            running=main is not None and not ended,
            starting=service.starting,
            failed=service.failed or ended,
            restarts=service.restarts,
            headless=service.headless,
            invocation=service.invocation,
            explained=service.manager != "standalone",
            out_of_reach="" if main is None or ended else self._out_of_reach(main),
            has_check=bool(settings.check),
            rollback=settings.rollback,
            rolling=settings.rollout == "rolling",
            wanted=desired.wanted,
            fallback=desired.fallback,
            pinned=desired.pinned,
            damaged=desired.damaged,
            entries=desired.entries,
            mounted=desired.mounted,
            busy=desired.busy,
        )

    def _out_of_reach(self, main: Process) -> str:
        try:
            namespace = main.namespace()
        except Elsewhere as error:
            return str(error)
        except (Gone, OSError):
            return ""  # the step that enters it meets that, too
        try:
            self._tools.workers.check_foreign(namespace_id(namespace))
        except HostNamespace as error:
            return str(error)
        finally:
            os.close(namespace)
        return ""

    async def _blameless(self, service: Service, memory: Memory) -> bool:
        """Whether a service went down with a damaged copy: then its configuration is not to blame."""
        if service.main is not None:
            memory.ran = time.monotonic()
        if service.main is not None or not service.failed:
            memory.blameless = None
        elif memory.blameless is None:
            damaged = self._tools.store.was_damaged
            memory.blameless = await trio.to_thread.run_sync(
                damaged, service.slots, memory.ran, abandon_on_cancel=True
            )
        return bool(memory.blameless)

    async def _watch_and_look(self, service: Service, memory: Memory) -> tuple[State, Desired]:
        """`_look()` at what was watched before it was read: no change in between is missed."""
        while True:
            state, desired = await self._look(service)
            if desired.look.interests == memory.interests:
                return state, desired
            new = await self._tools.watcher.watch(service.name, (*desired.look.interests, _HOST_ETC))
            memory.interests = desired.look.interests
            if not new:
                return state, desired

    async def _look(self, service: Service) -> tuple[State, Desired]:
        others = []
        if service.settings.rollout == "rolling":
            others = [other for other in rolling(self._tools) if other.name != service.name]
        return await self._tools.offload.run(service.name, self._find, service, others)

    def _find(self, service: Service, others: Sequence[Service]) -> tuple[State, Desired]:
        """Blocks, also on the service's root and on where its images come from, which may be dead network mounts.

        Args:
            others: what proved bad for these does not get into this one either.
        """
        tools = self._tools
        state = tools.store.state(service.slots)
        elsewhere = {
            key: f"it did not do on {other.name}: {why}"
            for other in others
            for key, why in self._kept_out(other).items()
        }
        given = Given(
            service.slots,
            service.declared,
            None if service.root is None else host(service.root),
            state,
            elsewhere,
            service.settings.image_policy,
            service.trust,
        )
        with tools.store.using():  # the round may give this up, while a copy goes on
            desired = find(tools.store, tools.admission, given)
        memory = self._memories.get(service.name)
        if memory is not None:
            memory.at_hand = desired.at_hand
        return state, replace(desired, signatures=signatures(desired.passed))

    def _kept_out(self, other: Service) -> dict[str, str]:
        try:
            return self._tools.store.state(other.slots).kept_out
        except Later:
            return {}  # its own round says why


def of_look(state: State) -> object:
    """What of the state a look depends on."""
    return (state.accepted.stack.id, state.quarantine, state.pin)
