# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes the steps that are decided on: counts, checks, accepts, swaps, reloads, watches. It decides nothing."""

from __future__ import annotations

import functools
import time
from contextlib import suppress
from dataclasses import replace

import trio

from watcher.images import integrity
from watcher.managers.base import Ended, NoShadow, Service
from watcher.model import Copy, Later, Stack, Verdict
from watcher.mounts.converge import converge
from watcher.mounts.process import Gone, Process
from watcher.records.together import Gathering
from watcher.resolve.release import RELOAD_OR_RESTART, RESTART
from watcher.rounds import changes, decide, messages
from watcher.rounds.facts import Facts, Judged
from watcher.rounds.judge import Asked, judge_start, judged_at_once, reload_and_judge
from watcher.rounds.memory import Memory, Round
from watcher.rounds.observe import of_look
from watcher.rounds.outcomes import say
from watcher.rounds.service_check import check, check_at_start, unstartable
from watcher.rounds.tools import Tools

# Seconds between two looks for what a manager has to notice.
_POLL_SEC = 0.02


class Steps:
    """The steps that do something to the files, the store or the service."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # --- what blocks, and waits for nothing else ---

    def let_in(self, step: decide.LetIn, service: Service, this: Round) -> None:
        """Start to try again what is kept out for the moment, or go on keeping it out during this start."""
        change = functools.partial(changes.let_in, step, service.invocation)
        this.state = self._tools.store.change(service.slots, change)

    def count(self, service: Service, facts: Facts, this: Round) -> None:
        """Count one try of each new file that has counters: note it, and rename the file."""
        assert this.desired is not None
        store, renaming = self._tools.store, functools.partial(self._tools.watcher.renaming, service.name)
        desired, slots = this.desired, service.slots
        try:
            desired = changes.count(store, desired, facts, slots, service.name, renaming, service.trust)
        except FileNotFoundError:  # another service's attempt has just renamed a file
            this.look_anew()
            return
        this.desired, this.state = desired, store.state(slots)
        say("debug", service.name, f"tries counted: {messages.files(desired.wanted)}")

    def accept(
        self, step: decide.Accept, service: Service, facts: Facts, memory: Memory, this: Round
    ) -> Gathering[None]:
        """From now on every start of the service gets the stack. If the service runs, it is owed a reload for that."""
        assert this.desired is not None
        tools, desired = self._tools, this.desired
        sysexts = tuple(entry.path for entry in desired.sysexts)
        change = functools.partial(changes.accept, step, facts, service.invocation, sysexts)
        this.state = yield from tools.store.accepting(service.slots, step.stack, facts.listed, change)
        this.desired, this.looked_with = desired.recorded(this.state.accepted), of_look(this.state)
        this.before = facts.accepted
        this.accepted |= step.new
        this.owing = service.invocation != "" and facts.state.owed != this.state.owed == service.invocation
        say("debug", service.name, functools.partial(messages.accepting, step.stack, on_trial=step.new))
        memory.unlearned = not tools.manager.learned(service)

    def swap(self, service: Service, facts: Facts, memory: Memory, this: Round) -> None:
        """Swap the stack in, in each namespace of the service that does not show it. From then on a reload is owed."""
        tools, stack = self._tools, facts.accepted
        begun = integrity.now()
        with _held(service) as main:
            copies = self._copies(stack)
            memory.mounted = None
            if missing := tools.workers.images.missing(copies.values()):
                tools.workers.call_apart(tools.workers.images.mount, missing)
            this.converged = converged = tools.workers.call(
                converge,
                tools.workers,
                main,
                tools.manager.processes(service),
                stack,
                copies,
                functools.partial(self._begin_swap, service, memory, this),
                memory.compared,
                kept=lambda: (stack, *tools.store.stacks(service.slots)),
                other_mains=lambda: tools.other_mains(service),
                patient=facts.busy and not this.accepted and not facts.worn,
                anew=facts.worn,
            )
        memory.mounted = frozenset(stack.digests)
        if facts.worn:
            memory.placed = begun
            memory.clings |= memory.mounted if converged.left_out else frozenset()
        if memory.base_changed:
            memory.base_changed, this.base_changed = False, True
            self._owe(service, this)
        this.shown = service.invocation, stack.id
        say("debug", service.name, functools.partial(messages.converged, converged))
        if this.owing and not converged.swaps and this.state.owed == service.invocation:
            # It was started on this very stack: there is nothing to tell it, and nothing to say.
            settled = functools.partial(replace, owed="", replaced=None)
            this.state = tools.store.change(service.slots, settled)
        if this.state.owed == service.invocation:
            for remark in converged.remarks:
                say("warning", service.name, remark)

    def _begin_swap(self, service: Service, memory: Memory, this: Round) -> None:
        memory.swaps += (
            1  # also where it fails half-way: what was opened of the old stack is of no use any more
        )
        self._owe(service, this)

    def _owe(self, service: Service, this: Round) -> None:
        """Note, before a swap, that this start of the service has to be told. Called by a mount worker."""
        if this.state.owed != service.invocation:
            with suppress(Later):  # then it holds until the watcher ends
                self._tools.store.change(service.slots, lambda state: replace(state, owed=service.invocation))
            this.state = self._tools.store.state(service.slots)

    def tell(self, service: Service, this: Round) -> None:
        """Ask the service to reload, if that takes nothing but a signal."""
        this.asks = self._asks(service, this.facts, this)
        if this.asks == RESTART and service.manager == "standalone":
            words = "is not restarted, as EXTENSION_RESTART_UNITS= asks for: only who started it can do that"
            say("warning", service.name, f"{words}; it is told to reload")
        service = _as_asked(service, this.asks)
        since, begun = messages.now(), time.monotonic()
        with suppress(Gone), _held(service) as main:  # `reload()` meets that, too
            if (reloaded := self._tools.manager.tell(service, main)) is not None:
                this.asked = Asked(reloaded, since, round((time.monotonic() - begun) * 1_000_000))

    def _asks(self, service: Service, facts: Facts, this: Round) -> str:
        """What the images that came, or went, with the accepted stack say that the service is to be told."""
        if service.settings.reload != "auto":
            return ""
        state, new = facts.state, facts.accepted
        before = state.undoing.stack if state.undoing else None
        if before is None and this.before is not None and this.before.id == state.replaced:
            before = this.before
        if before is None and state.replaced is not None:
            kept = (Stack(), *self._tools.store.stacks(service.slots))
            before = next((one for one in kept if one.id == state.replaced), None)
        if before is None:
            return ""  # another reason than new images (the host's /etc has changed), or it is not known what is new
        either = {layer.digest: layer for layer in (*before.layers, *new.layers)}
        names = (service.name, *service.aliases)
        asked = {
            self._tools.admission.asks_for(either[digest], names)
            for digest in {*before.digests} ^ {*new.digests}
        }
        return next((one for one in (RESTART, RELOAD_OR_RESTART) if one in asked), "")

    def judge(self, service: Service, facts: Facts, this: Round) -> bool:
        """Judge a service that was told with a signal, if that is all there is to it. Whether it is judged."""
        asked = this.asked
        if asked is None or service.main is None:
            return False
        judged = judged_at_once(self._tools.manager, service, service.main, facts.accepted, asked)
        if judged is None:
            return False
        this.asked = None
        return _judged(service, judged, this)

    # --- what waits for the service ---

    async def check(
        self, step: decide.Check, service: Service, facts: Facts, memory: Memory, this: Round
    ) -> None:
        """Run `Check=` against a stack that the service cannot see."""
        tools, begun = self._tools, messages.now()
        try:
            ended = await self.run_check(service, facts, step.stack)
        except NoShadow as error:
            memory.no_shadow = str(error)
            return
        say("debug", service.name, f"check failed: {ended.reason}" if ended.reason else "check passed")
        if ended.reason:
            failed = Verdict.CHECK_FAILED
            this.judged = Judged(step.stack, failed, reason=ended.reason, output=ended.output, begun=begun)
        else:
            passed = functools.partial(replace, checked=facts.check)
            this.state = await tools.offload.run(service.name, tools.store.change, service.slots, passed)

    async def run_check(self, service: Service, facts: Facts, stack: Stack) -> Ended:
        """What `Check=` says of a stack, whose copies the store has. Nothing is changed.

        Raises:
            NoShadow: the service does not run where it could be, nor can its next start be had without starting it.
            Gone, Later, ...: as `check()`.
        """
        tools, copies = self._tools, self._copies(stack)
        if facts.reachable:
            return await check(tools, service, stack, copies)
        try:
            return await check_at_start(tools.manager, service, stack, copies)
        except NoShadow:
            why = await unstartable(tools.manager, service, stack, facts.fallback, tools.store.copy)
            if not why:
                raise
            return Ended(why, "")

    async def try_start(self, service: Service, facts: Facts, this: Round) -> None:
        """Find out whether the accepted stack keeps systemd from starting it, where the one before does not."""
        tools, state = self._tools, facts.state
        stacks = await tools.offload.run_alone(tools.store.stacks, service.slots)
        good = (one for one in stacks if one.id != facts.accepted.id and not state.why_bad(one))
        before = next(good, Stack())
        copy = tools.store.copy
        this.unstartable = await unstartable(tools.manager, service, facts.accepted, before, copy)
        this.unsaid = True
        say("debug", service.name, this.unstartable or "its stack is not what keeps it from being started")

    async def reload(self, service: Service, facts: Facts, this: Round) -> bool:
        """Have the service reload, and judge it. False: an operator has stopped it or started it anew meanwhile."""
        with _held(service) as main:
            manager, asked, this.asked = self._tools.manager, this.asked, None
            service = _as_asked(service, this.asks)
            judged = await reload_and_judge(
                manager, service, main, facts.accepted, asked, undoing=facts.undoing
            )
        return _judged(service, judged, this)

    async def watch(self, service: Service, facts: Facts, this: Round) -> bool:
        """Judge the service, which was started on its stack. False: it was done, or was stopped."""
        with _held(service) as main:
            judged = await judge_start(self._tools.manager, service, main, facts.accepted)
        return _judged(service, judged, this)

    async def revive(self, service: Service, facts: Facts, this: Round) -> None:
        """Start the service again, on the stack before the bad one.

        Raises:
            Later: it could not be started now.
        """
        revived = await self._tools.manager.revive(service)
        if revived.interrupted and revived.ok:
            say("debug", service.name, revived.reason)
            this.judged = None
            await trio.sleep(_POLL_SEC)  # its manager is about to say so: it is told of its stack then
            return
        if revived.interrupted:
            raise Later(f"it could not be started again on its old stack: {revived.reason}")
        verdict = Verdict.GOOD if revived.ok else Verdict.WENT_DOWN
        this.judged = Judged(facts.accepted, verdict, revived.told, revived.reason, revived.output)

    def _copies(self, stack: Stack) -> dict[str, Copy]:
        return {layer.digest: self._tools.store.copy(layer) for layer in stack.layers}


def _as_asked(service: Service, asks: str) -> Service:
    return replace(service, settings=replace(service.settings, reload=asks)) if asks else service


def _judged(service: Service, judged: Judged | None, this: Round) -> bool:
    if judged is not None:
        say("debug", service.name, functools.partial(messages.judged, judged))
    this.judged = judged
    return judged is not None


def _held(service: Service) -> Process:
    """The main process, held by the caller. Raises Gone: it has ended."""
    if service.main is None:
        raise Gone(f"{service.name} has ended")
    return service.main.hold()
