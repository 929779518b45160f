# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a drop, for one service: look, admit, choose, check, accept, swap, reload, judge, record.

A round always starts from what is on disk now and what is mounted now; nothing that is remembered between rounds
decides anything that matters. A lost event, a crash, a restart of the service or of the watcher all end in the same
place: another round. So does a rollback: what proved bad goes into the quarantine, and then the best that is left is
wanted.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import trio

from watcher.images import tries
from watcher.images.admission import Admission, host
from watcher.images.store import Store
from watcher.managers.base import Manager, Reloaded, Service
from watcher.model import Busy, Copy, Event, Interest, Later, Refused, Stack
from watcher.mounts.converge import converge
from watcher.mounts.etc import Moved
from watcher.mounts.process import Elsewhere, Gone, Process
from watcher.mounts.workers import Hung, MountWorkers, WorkerLost
from watcher.records import journal
from watcher.records.ledger import Ledger
from watcher.resolve import scan
from watcher.rounds import messages
from watcher.rounds.desired import Desired, find
from watcher.rounds.judge import judge_start, reload_and_judge
from watcher.rounds.messages import Times
from watcher.rounds.outcomes import Outcomes, signatures
from watcher.rounds.rollback import Rollback
from watcher.rounds.rollout import Bid, Rollout, Sibling
from watcher.rounds.service_check import check
from watcher.rounds.state import Memory, Pending, Trial, Trials
from watcher.watch.offload import Offload, Unanswered
from watcher.watch.patient import PatientWatcher

# What the host merges lies on that, in the services' namespaces too.
_HOST_ETC = Interest("/", pattern="etc")

# Seconds until what cannot be waited for by an event is looked at again: a writer that uses another name of the file,
# a loop device that becomes free. Doubled each time, up to the second figure.
_AGAIN = 0.25
_AGAIN_MAX = 30.0

# Seconds that a service waits for a look at the files of others (`Rollout=rolling`), which may not answer.
_PEER_SEC = 1.0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every round works with."""

    store: Store
    admission: Admission
    workers: MountWorkers
    manager: Manager
    watcher: PatientWatcher
    ledger: Ledger
    pending: Pending
    trials: Trials
    offload: Offload


class Rounds:
    """Rounds for services: one at a time for each, any number of services side by side.

    Args:
        tools: what rounds work with.
        told: called with every outcome, after it was recorded.
        changed: asks for a round of a service.
        accepted: called when the slots of a service are what a start of it should get; a round may go on for long.
    """

    def __init__(
        self,
        tools: Tools,
        told: Callable[[Event], None] = lambda event: None,
        changed: Callable[[str], None] = lambda name: None,
        accepted: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._tools = tools
        self._record = Outcomes(tools.ledger, tools.offload, told)
        self._judge = Rollback(
            tools.store, tools.pending, tools.trials, self._record, tools.watcher, tools.offload
        )
        self._rollout = Rollout(changed)
        self._accepted = accepted
        self._memory: dict[str, Memory] = {}
        self._awaited: dict[str, list[trio.Event]] = {}

    @property
    def mounted(self) -> frozenset[str] | None:
        """Digests of all that the services run on, and of what waits for them; None while one's are not known."""
        known: set[str] = set()
        for memory in self._memory.values():
            if memory.mounted is None:
                return None
            known |= memory.mounted | memory.at_hand
        return frozenset(known)

    def forget(self, name: str) -> None:
        """The service takes no part any more; its slots stay."""
        self._memory.pop(name, None)
        self._record.forget(name)
        self._tools.watcher.drop(name)
        self._tools.offload.forget(name)
        self._tools.pending.paid(name)

    async def round(self, service: Service, since: float) -> float | None:
        """One round.

        Args:
            since: when the change was noticed, `trio.current_time()`.

        Returns:
            Seconds after which to look again even if nothing happens; None: there is no need.
        """
        awaited = self._awaited.pop(service.name, ())
        try:
            return await self._one(service, since)
        finally:
            for over in awaited:
                over.set()

    def next_round(self, name: str) -> trio.Event:
        """Set when a round of the service is over that begins after this call; somebody has to ask for it."""
        over = trio.Event()
        self._awaited.setdefault(name, []).append(over)
        return over

    async def _one(self, service: Service, since: float) -> float | None:
        memory = self._memory.setdefault(service.name, Memory())
        try:
            await self._look_at_copies(service, memory)
            settled = await self._round(service, memory, since)
        except Gone:
            return None  # its manager will say so, and it is looked at again when it starts
        except Elsewhere as error:
            memory.mounted = frozenset()
            await self._record.needs_restart(service.name, service.invocation, str(error))
            return None
        except Unanswered as error:
            await self._record.not_placed(service.name, error)
            return None  # it is looked at again when they answer
        except (OSError, Refused, Later, Hung, WorkerLost, Moved) as error:
            await self._record.not_placed(service.name, error)
            settled = False
            if not memory.attempts:
                await self._doubt(service)
        memory.attempts = 0 if settled else memory.attempts + 1
        return None if settled else min(_AGAIN * 2 ** (memory.attempts - 1), _AGAIN_MAX)

    async def _look_at_copies(self, service: Service, memory: Memory) -> None:
        """Of a service that went down: with a damaged copy it is not its configuration that is to blame."""
        if service.main is not None:
            memory.ran = time.monotonic()
        if service.main is not None or not service.failed:
            memory.blameless = None
        elif memory.blameless is None:
            damaged = functools.partial(self._tools.store.was_damaged, service.slots, memory.ran)
            memory.blameless = await trio.to_thread.run_sync(damaged, abandon_on_cancel=True)
            if memory.blameless:
                memory.afterglow = None

    async def _doubt(self, service: Service) -> None:
        """The next look reads the copies again that the service is to have."""
        await trio.to_thread.run_sync(self._tools.store.doubt, service.slots, abandon_on_cancel=True)

    async def look(self, service: Service) -> Desired:
        """What a round would find now, without doing anything about it."""
        async with self._using_store():
            kept_out = self._kept_out(service)
            return await self._tools.offload.run(service.name, self._find, service, *kept_out)

    @asynccontextmanager
    async def _using_store(self) -> AsyncIterator[None]:
        """`Store.using()` for the event loop, which never waits for a lock: a thread does."""
        try:
            held = self._tools.store.hold(wait=False)
        except Busy:
            held = await trio.to_thread.run_sync(self._tools.store.hold, abandon_on_cancel=True)
        with held:
            yield

    async def waits(self, service: Service, desired: Desired) -> str:
        """Why a service would not get its new stack now, "" if it would."""
        if desired.new and self._has_to_wait(service, desired):
            return "it is not running, and Check= needs that: it is tried once it runs"
        rolling = desired.new and service.settings.rollout == "rolling"
        if rolling and not self._rollout.may_go(await self._bid(service, desired)):
            return "it waits for its turn (Rollout=rolling)"
        return ""

    def let_in(self, name: str) -> None:
        """What is kept out of a service for the moment may be tried again."""
        memory = self._memory.get(name)
        if memory is not None:
            memory.held.clear()

    async def _round(self, service: Service, memory: Memory, since: float) -> bool:
        """Whether there is nothing left to wait for."""
        if not memory.blameless:
            await self._judge.before_look(service, memory)
        memory.let_in_at_start(service.invocation)
        rolling = service.settings.rollout == "rolling"
        if rolling:
            self._rollout.begin(service.name)
        try:
            async with self._using_store():
                while True:
                    desired = await self._look(service, memory)
                    await self._record.look(service.name, desired)
                    if await self._turn(service, desired, memory, since):
                        return not desired.busy
                    service = _as_it_is(service)
        finally:
            if rolling:
                self._rollout.end(service.name)

    async def _turn(self, service: Service, desired: Desired, memory: Memory, since: float) -> bool:
        """An attempt, when it is this service's turn; False: it did not do, something else is wanted now."""
        if desired.new and self._has_to_wait(service, desired):
            desired = desired.staying()
        if not desired.new or service.settings.rollout != "rolling":
            return await self._attempt(service, desired, memory, since)
        with self._rollout.turn(service.name, await self._bid(service, desired)) as its_turn:
            if not its_turn and not desired.current.layers:
                return True  # an instance that was started on its template's slots has nothing of its own to stay on
            return await self._attempt(service, desired if its_turn else desired.staying(), memory, since)

    async def _bid(self, service: Service, desired: Desired) -> Bid:
        new = frozenset(desired.stack.digests) - frozenset(desired.current.digests)
        return Bid(
            new=new,
            parallel=service.settings.rollout_parallel,
            running=service.main is not None,
            fresh=not desired.current.layers,
            siblings=await self._siblings(service, desired, new),
        )

    async def _siblings(self, service: Service, desired: Desired, new: frozenset[str]) -> list[Sibling]:
        """The others with `Rollout=rolling`."""
        others = [
            other
            for other in self._tools.manager.services.values()
            if other.name != service.name and other.settings.rollout == "rolling"
        ]
        offered = await self._offered(service, desired, new, others)
        return await trio.to_thread.run_sync(
            lambda: [self._sibling(other, new, other.name in offered) for other in others]
        )

    async def _offered(
        self, service: Service, desired: Desired, new: frozenset[str], others: list[Service]
    ) -> set[str]:
        """Names of those that could have the new content: `Rollout` asks only for a service that does not run.

        One whose files do not answer cannot have it now; it is waited for no longer than a look takes.
        """
        sources = [layer.source for layer in desired.stack.layers if layer.digest in new]
        running = [other for other in others if other.main is not None]
        if service.main is not None or not running:
            return set()
        offload = self._tools.offload
        own = await offload.run(service.name, lambda: {os.path.realpath(source) for source in sources})
        found = set()

        async def look(other: Service) -> None:
            with suppress(Unanswered):
                if await offload.run_within(_PEER_SEC, other.name, lambda: _offers(other)) & own:
                    found.add(other.name)

        async with trio.open_nursery() as nursery:
            for other in running:
                nursery.start_soon(look, other)
        return found

    def _sibling(self, other: Service, new: frozenset[str], offered: bool) -> Sibling:
        accepted = self._tools.store.accepted(other.slots) or Stack()
        trial = self._tools.trials.of(other.name)
        return Sibling(
            other.name,
            running=other.main is not None,
            offered=offered,
            accepted=bool(new) and new <= set(accepted.digests),
            on_trial=trial is not None and trial.stack == accepted.id,
        )

    async def _attempt(self, service: Service, desired: Desired, memory: Memory, since: float) -> bool:
        if desired.new:
            counted = {*desired.current.digests, *memory.counted}
            try:
                stack = await self._count(service, desired.stack, counted)
            except FileNotFoundError:
                return False  # another service's attempt has just renamed it
            memory.counted = frozenset(stack.digests)
            desired = replace(desired, stack=stack, recorded=False)
        passed = await self._passes(service, desired, memory)
        if passed and not desired.recorded:
            desired = await self._accept(service, desired)
        memory.counted = frozenset()
        if not passed:
            return False
        self._accepted(service.name)
        if service.main is not None:
            try:
                return await self._into_service(service, service.main, desired, memory, since)
            except Gone:
                await self._say_accepted(replace(service, starting=False), desired)
                raise
        return await self._stopped(service, desired, memory)

    async def _count(self, service: Service, stack: Stack, known: set[str]) -> Stack:
        if not tries.are_counted(stack):
            return stack
        renaming = functools.partial(self._tools.watcher.renaming, service.name)
        return await self._tools.offload.run(
            service.name, tries.begin, stack, known, service.name, renaming, service.trust
        )

    async def _look(self, service: Service, memory: Memory) -> Desired:
        """What is on disk, watched from before it is read, so that no change in between is missed."""
        while True:
            kept_out = self._kept_out(service)
            desired = await self._tools.offload.run(service.name, self._find, service, *kept_out)
            if desired.look.interests == memory.interests:
                return desired
            new = await self._tools.watcher.watch(service.name, (*desired.look.interests, _HOST_ETC))
            memory.interests = desired.look.interests
            if not new:
                return desired

    def _find(self, service: Service, kept_out: dict[str, str], elsewhere: dict[str, str]) -> Desired:
        """Blocks, also on the service's root and on where it gets its images from, which may be dead network mounts."""
        tools, name = self._tools, service.name
        pin, trial = tools.ledger.pinned(name), tools.trials.of(name)
        memory = self._memory.get(name)
        with tools.store.using():  # the round may give this up, while a copy goes on
            desired = find(
                tools.store,
                tools.admission,
                service.slots,
                service.declared,
                None if service.root is None else host(service.root),
                kept_out,
                pin,
                trial,
                elsewhere,
                service.settings.image_policy,
                service.trust,
            )
        if memory is not None:
            memory.at_hand = desired.at_hand
        return replace(desired, signatures=signatures(desired.passed))

    def _kept_out(self, service: Service) -> tuple[dict[str, str], dict[str, str]]:
        """What must not get into a service with the reasons: for its own sake, and because of others."""
        elsewhere: dict[str, str] = {}
        if service.settings.rollout == "rolling":
            for other in self._tools.manager.services.values():
                if other.name != service.name and other.settings.rollout == "rolling":
                    found = self._kept_out_of(other.name)
                    elsewhere |= {key: f"it did not do on {other.name}: {why}" for key, why in found.items()}
        return self._kept_out_of(service.name), elsewhere

    def _kept_out_of(self, name: str) -> dict[str, str]:
        memory = self._memory.get(name)
        return self._record.kept_out(name) | (memory.held if memory is not None else {})

    async def _passes(self, service: Service, desired: Desired, memory: Memory) -> bool:
        """Whether the service's own check likes a new stack."""
        if not desired.new or service.main is None or not service.settings.check:
            return True
        tools = self._tools
        with service.main.hold() as main:
            copies = self._copies(desired.stack)
            verdict = await check(tools.workers, tools.manager, service, main, desired.stack, copies)
        if not verdict.reason:
            return True
        reason = verdict.reason
        event = messages.check_failed(service.name, desired.current, desired.stack, reason, verdict.output)
        await self._judge.keep_out(service, memory, desired.stack, reason, event=event)
        return False

    def _has_to_wait(self, service: Service, desired: Desired) -> bool:
        """A service that does not run cannot be checked: its slots keep what it ran well on."""
        return service.main is None and bool(service.settings.check) and bool(desired.current.layers)

    async def _accept(self, service: Service, desired: Desired) -> Desired:
        """From now on every start of the service gets this stack; a new one is on trial."""
        if desired.new:
            desired = replace(desired, trial=Trial(desired.stack.id, service.main is None and service.failed))
            assert desired.trial is not None
            self._tools.trials.begin(service.name, desired.trial)
        entries = [pick.entry for pick in desired.look.picks]
        accept, on_trial = self._tools.store.accept, [self._tools.trials.directory]
        await self._tools.offload.run(service.name, accept, service.slots, desired.stack, entries, on_trial)
        await self._tools.manager.learn(service, entries, desired.sysexts)
        return desired

    async def _stopped(self, service: Service, desired: Desired, memory: Memory) -> bool:
        memory.mounted = frozenset()
        if desired.rolling_back:
            # Not what somebody has stopped.
            down = service.failed and not service.starting
            revived = await self._tools.manager.revive(service) if down else Reloaded(ok=True)
            if revived.interrupted:
                raise Later(f"it could not be started again on its old stack: {revived.reason}")
            await self._judge.stopped(service, memory, desired, revived)
            return False
        await self._say_accepted(service, desired)
        return True

    async def _say_accepted(self, service: Service, desired: Desired) -> None:
        """The slots have another stack, which nothing of the service runs on yet: somebody may wait to hear that."""
        if desired.stack.id == desired.current.id or desired.rolling_back:
            return
        accepted = messages.accepted(
            service.name,
            desired.current,
            desired.stack,
            starting=service.starting,
            headless=service.headless,
        )
        await self._record.outcome(accepted)

    async def _into_service(
        self, service: Service, held: Process, desired: Desired, memory: Memory, since: float
    ) -> bool:
        """Bring a running service to the stack; False if it did not take it well, and something else is wanted."""
        tools, stack = self._tools, desired.stack
        owed = tools.pending.owed(service.name, service.invocation)
        begin = functools.partial(tools.pending.owe, service.name, service.invocation)
        copies = self._copies(stack)
        pids = await tools.manager.processes(service)
        memory.mounted = None
        with held.hold() as main:
            patient = desired.busy and not desired.new
            converged = await tools.workers.run(
                converge,
                tools.workers,
                main,
                pids,
                stack,
                copies,
                begin,
                memory.compared,
                kept=lambda: (desired.current, *tools.store.stacks(service.slots)),
                elsewhere=self._other_mains(service),
                patient=patient,
            )
            memory.mounted = frozenset(stack.digests)
            self._record.placed(service.name)
            if converged.swaps or owed:
                for remark in converged.remarks:
                    journal.log.warning(f"{service.name}: {remark}", service=service.name)
                reloaded = await reload_and_judge(tools.manager, service, main)
            elif desired.rolling_back:
                reloaded = Reloaded(ok=True)  # it was started on it since
            elif desired.on_trial and not desired.pinned:
                return await self._started(service, main, desired, memory)
            else:
                return True
        if reloaded is None:
            await self._say_accepted(replace(service, starting=False), desired)
            return True
        now = trio.current_time()
        times = Times(converged.usec, reloaded.usec, _usec(now - since))
        return await self._judge.reloaded(service, memory, desired, converged, reloaded, times)

    def _other_mains(self, service: Service) -> list[int]:
        others = list(self._tools.manager.services.values())
        return [other.main.pid for other in others if other.name != service.name and other.main is not None]

    async def _started(self, service: Service, main: Process, desired: Desired, memory: Memory) -> bool:
        """It was started on a stack that has not proved itself yet."""
        judged = await judge_start(self._tools.manager, service, main)
        if judged is None:
            return True
        return await self._judge.started(service, memory, desired, judged)

    def _copies(self, stack: Stack) -> dict[str, Copy]:
        return {layer.digest: self._tools.store.copy(layer) for layer in stack.layers}


def _offers(service: Service) -> set[str]:
    """Where the files are that a service could have. Blocks."""
    picks = scan.look(service.declared).picks
    return {os.path.realpath(candidate.path) for pick in picks for candidate in pick.candidates}


def _as_it_is(service: Service) -> Service:
    """Its manager may not have noticed yet that its main process has ended."""
    if service.main is not None and service.main.pidfd >= 0 and service.main.alive():
        return service
    return replace(service, main=None, failed=service.failed or service.main is not None)


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)
