# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes down what became of a stack: the outcome first, then the state.

If the watcher is killed in between, the next round comes to the same outcome again: an outcome may be recorded twice,
but it is never lost.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from watcher.images import tries
from watcher.managers.base import Service
from watcher.model import Event, Later, Stack, Verdict
from watcher.mounts.converge import Converged, as_stack
from watcher.records import journal
from watcher.records.state import STACK, Quarantine, State
from watcher.records.together import WHEN_QUIET, Gathering
from watcher.rounds import changes, decide, messages
from watcher.rounds.facts import Facts, Judged
from watcher.rounds.memory import Round
from watcher.rounds.messages import Times
from watcher.rounds.outcomes import Outcomes, say
from watcher.rounds.retry import judge, touched
from watcher.rounds.tools import Tools
from watcher.watch.offload import Unanswered

# What a service that went down has logged so short before is why.
_LAST_WORDS_USEC = 10_000_000


class Verdicts:
    """Records what became of stacks."""

    def __init__(self, tools: Tools, outcomes: Outcomes) -> None:
        self._tools = tools
        self._outcomes = outcomes

    def good(self, service: Service, facts: Facts, this: Round) -> Gathering[None]:
        """The accepted stack proved good: its files lose their counters. Blocks."""
        judged, this.recording = _taken(this), True
        yield WHEN_QUIET  # others wait to be told
        if facts.was_told:
            yield from self._outcomes.recording(self._applied(service, facts, this, judged))
        else:
            say("info", service.name, f"started well on {messages.labels(facts.accepted)}")
        yield from self._proved_good(
            service, facts, this, functools.partial(changes.good, facts, messages.now())
        )
        this.recording = False

    async def keep(self, service: Service, facts: Facts, this: Round) -> None:
        """The accepted stack proved bad, and stays."""
        undoing = facts.state.undoing
        if this.judged is None and undoing is not None:
            this.judged = Judged(facts.accepted, undoing.verdict, reason=undoing.why, output=undoing.output)
        judged = _taken(this)
        before, why_anew = await self._tools.offload.run_alone(self._before, service, facts, this)
        times = _times(this, judged)
        event = messages.failed(service.name, before, facts.accepted, judged, times, why_anew=why_anew)
        await self._outcomes.outcome(event)
        change = functools.partial(changes.keep, facts, judged.verdict, messages.now())
        await self._change(service, this, change)

    async def reject(self, step: decide.Reject, service: Service, facts: Facts, this: Round) -> None:
        """Keep out what is new in a stack. If it is the accepted one, the stack before comes back next."""
        this.judged = None
        say("debug", service.name, f"kept out: {messages.labels(step.stack)}: {step.why}")
        if step.verdict is Verdict.WENT_DOWN and not step.logged:  # it ended while nobody was judging it
            since = max(facts.state.accepted.when, messages.now() - _LAST_WORDS_USEC)
            step = replace(step, logged=await self._tools.manager.logged(service, since))
        entries = await self._entries(service, facts, step)
        if step.stack.id != facts.accepted.id:
            event = messages.check_failed(service.name, facts.accepted, step)
            await self._outcomes.check_failed(event, await self._touched(service, step.stack))
        await self._change(
            service, this, functools.partial(changes.reject, step, facts, entries, _runs(service))
        )

    async def undone(self, service: Service, facts: Facts, this: Round) -> None:
        """The stack is back that the service had before a bad one; or that has failed, too."""
        undoing = facts.state.undoing
        assert undoing is not None
        back = _taken(this) if this.judged else Judged(facts.accepted, Verdict.GOOD)
        times = _times(this, back) if facts.reachable else Times()
        running = facts.reachable or bool(back.told)
        restart = facts.running and bool(facts.out_of_reach)
        event = messages.rolled_back(
            service.name,
            undoing,
            facts.accepted,
            back,
            times,
            running=running,
            restart=restart,
            innocent=changes.acquits(facts, facts.state),
        )
        await self._outcomes.outcome(event, critical=not back.good)
        await self._change(service, this, functools.partial(changes.undone, facts, back.good, messages.now()))

    async def say_accepted(self, service: Service, facts: Facts, this: Round) -> None:
        """The slots have another stack, though nobody has told the service: a `wait` may wait for that."""
        if facts.state.replaced == facts.accepted.id:
            event = messages.unchanged(service.name, facts.accepted)
        else:
            before = await self._tools.offload.run_alone(self._replaced, service, facts, this)
            event = messages.accepted(service.name, before, facts)
            if before.id in facts.damaged:
                event = messages.went_back(event, before, facts.accepted)
        await self._outcomes.outcome(event)
        await self._change(service, this, changes.said)

    async def needs_restart(self, service: Service, facts: Facts) -> None:
        """Its main process is where no stack can be put in place. What the restart brings is an outcome of its own."""
        await self._outcomes.needs_restart(
            service.name, service.invocation, facts.out_of_reach, facts.accepted.id
        )

    # --- parts ---

    async def _change(self, service: Service, this: Round, change: Callable[[State], State]) -> None:
        """A change that cannot be written down holds in memory, and is written with the next one."""
        with trio.CancelScope(shield=True):  # it has happened, even if the watcher is about to end
            await self._tools.offload.run_alone(self._changing, service, this, change)

    def _changing(self, service: Service, this: Round, change: Callable[[State], State]) -> Gathering[None]:
        store = self._tools.store
        try:
            this.state = yield from store.changing(service.slots, change)
        except Later as error:
            this.state = store.state(service.slots)
            undoing = this.state.undoing
            what = "what became of its stack is known until the watcher ends"
            if undoing is not None:
                what = f"{messages.labels(undoing.stack)} is to be taken out again: {undoing.why}"
            text = f"{service.name}: {what}; it could not be written down: {error}"
            journal.log.error(text, service=service.name)

    def _applied(self, service: Service, facts: Facts, this: Round, judged: Judged) -> Event:
        before, why_anew = self._before(service, facts, this)
        swapped = this.converged is not None and this.converged.swaps > 0
        times = _times(this, judged)
        event = messages.applied(
            service.name, before, facts.accepted, judged, times, swapped=swapped, why_anew=why_anew
        )
        went_back = before.id in facts.damaged and before.id != facts.accepted.id
        return messages.went_back(event, before, facts.accepted) if went_back else event

    def _before(self, service: Service, facts: Facts, this: Round) -> tuple[Stack, str]:
        """What the service showed before; and if that was the accepted stack, why it was made anew."""
        converged = this.converged
        if converged is not None and _is_healed(converged, facts):
            return facts.accepted, messages.HEALED
        if converged is not None and (
            _is_rebased(converged, facts) or _is_told_of_base(this, converged, facts)
        ):
            return facts.accepted, messages.REBASED
        before = self._replaced(service, facts, this)
        if converged is None or converged.before.layers is None:  # systemd started it on its slots
            return before, ""
        if not converged.swaps and facts.state.replaced is not None:  # a round before has put it there
            return before, ""
        known = (one for one in (facts.accepted, before) if one.id == converged.before.stack)
        return next(known, None) or as_stack(converged.before), ""

    def _replaced(self, service: Service, facts: Facts, this: Round) -> Stack:
        """The stack that the accepted one has replaced."""
        if this.before is not None and this.before.id == facts.state.replaced:
            return this.before
        stacks = self._tools.store.stacks(service.slots)
        others = [one for one in stacks if one.id != facts.accepted.id]
        if facts.state.replaced is not None:
            others = [one for one in others if one.id == facts.state.replaced]
        return next(iter(others), Stack())

    def _proved_good(
        self, service: Service, facts: Facts, this: Round, change: Callable[[State], State]
    ) -> Gathering[None]:
        stack, tools = facts.accepted, self._tools
        if tries.are_counted(stack):
            # Where they lie may not answer. The service must not be told twice for that.
            if facts.was_told:
                yield from self._changing(service, this, changes.told)
                this.recording = False
            renaming = functools.partial(tools.watcher.renaming, service.name)
            stack = tries.succeed(stack, service.name, renaming, service.trust)
        if stack == facts.accepted:
            yield from self._changing(service, this, change)
            return
        this.look_anew()  # its files have other names now
        this.state = yield from tools.store.accepting(service.slots, stack, facts.listed, change)

    async def _entries(self, service: Service, facts: Facts, step: decide.Reject) -> list[Quarantine]:
        """What is to be kept out: what is new in a stack; the stack itself where nothing in it is new."""
        state = facts.state
        bad, reason = step.stack, step.reason
        stacks = await self._tools.offload.run_alone(self._tools.store.stacks, service.slots)
        good = (one for one in (state.accepted.stack, *stacks) if one.id != bad.id and not state.why_bad(one))
        known = next(good, Stack()).digests
        new = {layer.digest: layer.source for layer in bad.layers if layer.digest not in known}
        when, by = messages.now(), judge(service.settings, step.verdict, at_start=not facts.reachable)
        entries = []
        for digest, source in (new or {STACK + bad.id: ""}).items():
            counters = tries.counted(source)
            # If another service's success has removed the counters meanwhile, there is no other try.
            left = counters.left if counters is not None and await self._is_there(service, source) else 0
            why = f"{reason}; tries left: {left}" if left else reason
            entries.append(
                Quarantine(digest, why, when, source, for_now=left > 0, judge=by, since=step.begun)
            )
        return entries

    async def _touched(self, service: Service, stack: Stack) -> tuple[int | None, ...] | None:
        """When each of its files was changed last."""
        files = [layer.source for layer in stack.layers]
        try:
            return await self._tools.offload.run(service.name, lambda: tuple(map(touched, files)))
        except Unanswered:
            return None

    async def _is_there(self, service: Service, path: str) -> bool:
        try:
            return await self._tools.offload.run(service.name, os.path.lexists, path)
        except Unanswered:
            return True  # it cannot be seen, which is not removed


def _taken(this: Round) -> Judged:
    """The verdict of this round, which is written down now."""
    judged, this.judged = this.judged, None
    assert judged is not None
    return judged


def _times(this: Round, judged: Judged) -> Times:
    swap = this.converged.usec if this.converged is not None else 0
    return Times(swap, judged.usec, round((time.monotonic() - this.since) * 1_000_000))


def _is_healed(converged: Converged, facts: Facts) -> bool:
    """Whether the service had this very stack, and got it anew because a copy that it was made of was damaged."""
    shown = converged.before.stack
    had_it = shown == facts.accepted.id or (shown is None and facts.state.replaced is None)
    return converged.anew and had_it


def _is_rebased(converged: Converged, facts: Facts) -> bool:
    """Whether the service had this very stack, and got it anew because the `/etc` beneath it has changed."""
    if facts.on_trial or facts.state.replaced is not None:
        return False
    # systemd mounted it at the start of the service, from these slots. It shows something else now, so the host's /etc
    # was changed while no watcher ran.
    return converged.rebased or (converged.swaps > 0 and converged.before.layers is None)


def _is_told_of_base(this: Round, converged: Converged, facts: Facts) -> bool:
    """`BaseChanged=reload`, and that is all there is to tell."""
    return this.base_changed and not converged.swaps and not facts.on_trial and facts.state.replaced is None


def _runs(service: Service) -> bool:
    return service.main is not None and service.main.alive()
