# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads all that a round decides on: disk, kernel, manager, and what was decided before. Nothing else reads for it.

It changes what is watched, and the store: what it finds is copied there. It claims the turn of a service, too.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from watcher.images.made_for import host
from watcher.managers.base import Service
from watcher.model import Busy, Interest, Later
from watcher.mounts.process import Elsewhere, Gone, Process, namespace_id
from watcher.mounts.workers import HostNamespace
from watcher.records.state import State
from watcher.records.together import Gathering
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.rounds import image_policies, looks, messages, retry
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.dropped import drop_directories
from watcher.rounds.facts import Facts, Judged
from watcher.rounds.memory import Memory, Round
from watcher.rounds.outcomes import Outcomes, say, signatures
from watcher.rounds.patience import limits
from watcher.rounds.rollout import Rollout, rolling
from watcher.rounds.tools import Tools
from watcher.settings.kernel_command_line import why_nothing_new

# What the host merges lies on that, in the services' namespaces too.
_HOST_ETC = Interest("/", pattern="etc")


# Seconds that services wait for one that looks at the same.
_FIRST_SEC = 0.1


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
        self._looks = looks.Looks()
        # By what they look at: services that wait for the first of them.
        self._firsts: dict[Hashable, trio.Event] = {}

    @asynccontextmanager
    async def using_store(self) -> AsyncIterator[None]:
        """`Store.using()` for the event loop, which never waits for a lock: a thread does."""
        try:
            held = self._tools.store.hold(wait=False)
        except Busy:
            held = await trio.to_thread.run_sync(self._tools.store.hold, abandon_on_cancel=True)
        with held:
            yield

    async def prepare(self, service: Service, memory: Memory, this: Round) -> None:
        """Watch what can be known before the first look, which counts: no change after it is missed.

        At a start, five hundred services may have one directory. A job for each would cost more than there is to do:
        the first one finds it out for all that have the very same.
        """
        if memory.interests is not None:
            return
        key = (service.declared, service.trust)
        if (first := self._firsts.get(key)) is not None:
            with trio.move_on_after(_FIRST_SEC):  # else that one is slow, or hangs
                await first.wait()
        if (found := self._looks.kept(key, this.looks_from)) is not None:
            (this.unwatched,) = found
        else:
            first = self._firsts.setdefault(key, trio.Event())
            try:
                this.unwatched = await self._tools.in_turn(service, self._find_interests(this.looks_from))
            finally:
                first.set()
                self._firsts.pop(key, None)
        await self.watch(service, memory, this)

    def _find_interests(self, since: float) -> Callable[[Service], Gathering[tuple[Interest, ...]]]:
        def find(service: Service) -> Gathering[tuple[Interest, ...]]:
            yield from ()
            return self._interests(service, since)

        return find

    def _interests(self, service: Service, since: float) -> tuple[Interest, ...]:
        with StrictModes(service.trust) as modes:
            declared, absent = scan.present(service.declared, modes)
            key = (declared, service.trust)
            found = self._looks.shared(key, since, lambda: scan.look(declared, modes=modes).interests)
            return (*found, *absent)

    def look(self, service: Service, others: Sequence[Service], memory: Memory, this: Round) -> bool:
        """Look at the disk, unless the last look still counts. After `prepare()`; hold `using_store()`. Blocks.

        Args:
            others: see `siblings()`.

        Returns:
            False: call `watch()`, and then this again. No change in between is missed.
        """
        if this.desired is None or this.looked_with != of_look(this.state):
            this.state, this.desired = self._find(service, others, this.looks_from)
            this.looked_with, this.unsaid = of_look(this.state), True
        if this.desired.look.interests != memory.interests:
            this.unwatched = this.desired.look.interests
        return this.unwatched is None

    def observe(self, service: Service, memory: Memory, this: Round) -> Facts:
        """All that is known of a service at this moment of its round, after a `look()`. Blocks.

        Args:
            service: with a main process that the caller holds.
        """
        assert this.desired is not None
        facts = self._facts(
            service,
            this.state,
            this.desired,
            now=this.begun,
            first=this.first,
            blameless=self._blameless(service, memory),
            shown=this.shown[1] if this.shown and this.shown[0] == service.invocation else None,
            judged=this.judged,
            waits=this.waits or "",
            no_shadow=memory.no_shadow,
            unstartable=this.unstartable,
            in_reach=this.in_reach,
            worn=this.shown is None and self._is_worn(service, memory, this.state),
        )
        this.in_reach = facts.reachable
        if this.unsaid:
            self._say(service, facts, this.desired)
            this.unsaid = False
        return facts

    async def watch(self, service: Service, memory: Memory, this: Round) -> None:
        """Watch what a look has looked at. What is new has to be looked at again."""
        assert this.unwatched is not None
        if await self._tools.watcher.watch(service.name, (*this.unwatched, _HOST_ETC)):
            this.look_anew()
        memory.interests, this.unwatched = this.unwatched, None

    def siblings(self, service: Service) -> list[Service]:
        """Those with `Rollout=rolling` beside it: what proved bad for these does not get into this one either."""
        if service.settings.rollout != "rolling":
            return []
        return [other for other in rolling(self._tools) if other.name != service.name]

    def _say(self, service: Service, facts: Facts, desired: Desired) -> None:
        say("debug", service.name, functools.partial(messages.looked, facts, desired.look))
        self._outcomes.look(service.name, facts, desired)

    async def glance(self, service: Service, *, thorough: bool = False) -> tuple[Facts, Desired]:
        """What the next round would find, without doing anything about it. Hold `using_store()`.

        Args:
            thorough: see `Given`.
        """
        memory = replace(self._memories.get(service.name, Memory()))  # a copy: nobody remembers a glance
        siblings, since = self.siblings(service), looks.now()

        def look(service: Service) -> Gathering[tuple[Facts, Desired]]:
            yield from ()
            state, desired = self._find(service, siblings, since, thorough=thorough)
            blameless = self._blameless(service, memory)
            now, first = messages.now(), not memory.seen
            no_shadow = memory.no_shadow
            worn = self._is_worn(service, memory, state)
            facts = self._facts(
                service,
                state,
                desired,
                now=now,
                first=first,
                blameless=blameless,
                no_shadow=no_shadow,
                worn=worn,
            )
            return facts, desired

        facts, desired = await self._tools.in_turn(service, look)
        if facts.bids:
            bid = await self._rollout.bid(service, facts)
            facts = replace(facts, waits=self._rollout.waits(service.name, bid))
        return facts, desired

    def _facts(
        self,
        service: Service,
        state: State,
        desired: Desired,
        *,
        now: int,
        first: bool,
        blameless: bool,
        no_shadow: str,
        worn: bool,
        in_reach: bool = False,
        unstartable: str | None = None,
        waits: str = "",
        shown: str | None = None,
        judged: Judged | None = None,
    ) -> Facts:
        settings, main = service.settings, service.main
        # If a bad stack took it down, its manager may not have noticed that yet.
        ended = main is not None and state.undoing is not None and not main.alive()
        return Facts(
            now=now,
            state=state,
            first=first,
            blameless=blameless,
            waits=waits,
            nothing_new=why_nothing_new(),
            no_shadow=no_shadow or ("" if service.manager == "systemd" else "exec alone can start it"),
            unstartable=unstartable,
            shown=shown,
            judged=judged,
            running=main is not None and not ended,
            starting=service.starting,
            failed=service.failed or ended,
            failed_start=service.failed_start,
            restarts=service.restarts,
            excused=service.blameless,
            headless=service.headless,
            template=service.manager == "systemd" and "@." in service.name,
            invocation=service.invocation,
            explained=service.manager != "standalone",
            out_of_reach="" if main is None or ended or in_reach else self._out_of_reach(main),
            has_check=bool(settings.check),
            rollback=settings.rollback,
            rolling=settings.rollout == "rolling",
            wanted=desired.wanted,
            fallback=desired.fallback,
            pinned=desired.pinned,
            damaged=desired.damaged,
            worn=worn,
            again=desired.again,
            entries=desired.entries,
            mounted=desired.mounted,
            busy=desired.busy or bool(desired.again),
        )

    def _is_worn(self, service: Service, memory: Memory, state: State) -> bool:
        """Whether a copy was made anew since the service, or we, mounted it. Another process may have done that."""
        if service.main is None:
            return False
        if memory.started[0] != service.invocation:
            memory.started = service.invocation, service.main.started / os.sysconf("SC_CLK_TCK")
            memory.clings = frozenset()
        since = max(memory.placed, memory.started[1])
        return self._tools.store.whole.replaced_since(state.accepted.stack.digests, since)

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

    def _blameless(self, service: Service, memory: Memory) -> bool:
        """Whether a service went down with a damaged copy: then its configuration is not to blame."""
        if service.main is not None:
            memory.ran = time.monotonic()
        if service.main is not None or not service.failed:
            memory.blameless = None
        elif memory.blameless is None:
            memory.blameless = self._tools.store.was_damaged(service.slots, memory.ran)
        return bool(memory.blameless)

    def _find(
        self, service: Service, others: Sequence[Service], since: float, *, thorough: bool = False
    ) -> tuple[State, Desired]:
        """Blocks, also on the service's root and on where its images come from, which may be dead network mounts.

        Args:
            others: what proved bad for these does not get into this one either.
            since: see `Round.looks_from`.
        """
        tools = self._tools
        state = tools.store.state(service.slots)
        elsewhere = {
            key: f"it did not do on {other.name}: {why}"
            for other in others
            for key, why in self._kept_out(other).items()
        }
        root = service.root
        with StrictModes(service.trust) as modes:
            declared, absent = scan.present(service.declared, modes)
        given = Given(
            service.slots,
            declared,
            None if root is None else self._looks.shared(("host", root), since, lambda: host(root)),
            state,
            elsewhere,
            image_policies.demands_of(tools.settings, service),
            service.trust,
            limits(tools.settings, service.settings),
            tools.removals,
            thorough,
        )

        def look() -> Desired:
            with tools.store.using():  # the round may give this up, while a copy goes on
                desired = find(tools.store, tools.admission, given)
            tools.writers.watch(drop_directories(service.declared, desired.look))
            return desired

        key = looks.common_key(root, given, self._to_mend(service))
        desired = self._looks.shared(key, since, look, lambda found: found.is_common)
        if desired.is_common:  # nothing is gone, whoever has looked
            tools.removals.seen(service.slots, ())
        memory = self._memories.get(service.name)
        if memory is not None:
            memory.at_hand, memory.passed = desired.at_hand, desired.passed
            memory.look_again = desired.look_again
        etc = "" if service.root is None else f"{service.root.rstrip('/')}/etc"
        more = (
            *absent,
            *retry.interests(state, service.settings, etc),
            *image_policies.interests(given.policies),
        )
        return state, replace(
            desired,
            look=replace(desired.look, interests=(*desired.look.interests, *more)),
            again=retry.again(state, service.settings, etc, desired.passed),
            signatures=signatures(desired.passed),
        )

    def _to_mend(self, service: Service) -> frozenset[str]:
        """Digests of damaged copies that a service may go back to."""
        store = self._tools.store
        damaged = store.whole.damaged
        stacks = store.stacks(service.slots) if damaged else ()
        return damaged.intersection(digest for stack in stacks for digest in stack.digests)

    def _kept_out(self, other: Service) -> dict[str, str]:
        try:
            return self._tools.store.state(other.slots).kept_out
        except Later:
            return {}  # its own round says why


def of_look(state: State) -> object:
    """What of the state a look depends on."""
    return (state.accepted.stack.id, state.quarantine, state.pin)
