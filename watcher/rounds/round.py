# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a drop, for one service: look, choose, check, accept, swap, reload, judge, record.

A round starts from what is on disk now and what is mounted now. It can do without what the last round remembered: after
a lost event, a crash, a restart of the service or of the watcher, another round comes to the same end. A rollback is
such a round, too: a bad stack goes into the quarantine, and the next look desires the best stack that is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import trio

from watcher.images import tries
from watcher.managers.base import Reloaded, Service
from watcher.model import Copy, Event, Later, Refused, Stack
from watcher.mounts.converge import Converged, converge
from watcher.mounts.etc import Moved
from watcher.mounts.process import Elsewhere, Gone, Process
from watcher.mounts.workers import HostNamespace, Hung, WorkerLost
from watcher.rounds import messages
from watcher.rounds.desired import Desired
from watcher.rounds.judge import judge_start, reload_and_judge
from watcher.rounds.messages import Times
from watcher.rounds.observe import Observer
from watcher.rounds.outcomes import Outcomes, say
from watcher.rounds.rollback import Rollback
from watcher.rounds.rollout import Rollout
from watcher.rounds.service_check import check
from watcher.rounds.state import Memory, Next, Trial
from watcher.rounds.tools import Tools
from watcher.watch.offload import Unanswered

# Seconds until another look where no event says when: a writer that uses another name of the file, a loop device that
# becomes free. Doubled each time, up to the second figure.
_AGAIN = 0.25
_AGAIN_MAX = 30.0


class Rounds:
    """Rounds for services: one at a time for each, any number of services side by side.

    Args:
        tools: what rounds work with.
        told: called with every outcome, after it was recorded.
        changed: asks for a round of a service.
        accepted: called when the slots of a service are what its next start should get, long before its round is over.
    """

    def __init__(
        self,
        tools: Tools,
        told: Callable[[Event], None] = lambda event: None,
        changed: Callable[[str], None] = lambda name: None,
        accepted: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._tools = tools
        self._accepted = accepted
        self._memories: dict[str, Memory] = {}
        self._awaited: dict[str, list[trio.Event]] = {}
        self._outcomes = Outcomes(tools.ledger, tools.offload, told)
        self._observer = Observer(tools, self._outcomes, self._memories)
        self._rollback = Rollback(tools, self._outcomes)
        self._rollout = Rollout(changed, tools)

    @property
    def mounted(self) -> frozenset[str] | None:
        """Digests of all that services run on, and of what waits for them; None while those of one are not known."""
        known: set[str] = set()
        for memory in self._memories.values():
            if memory.mounted is None:
                return None
            known |= memory.mounted | memory.at_hand
        return frozenset(known)

    def forget(self, name: str) -> None:
        """The service takes no part any more; its slots stay."""
        self._memories.pop(name, None)
        self._outcomes.forget(name)
        self._tools.watcher.drop(name)
        self._tools.offload.forget(name)
        self._tools.pending.paid(name)

    async def forget_gone(self, *, units: bool) -> None:
        """Drop the slots and stacks of each service that takes no part any more, and has no layers in its slots.

        One with layers keeps them, for its next start: a unit that is not there may be masked or not written yet, and a
        standalone service is not registered after a reboot.

        Args:
            units: whether the manager knows the units of this host.

        Raises:
            Later: the file system does not let us.
        """
        tools = self._tools
        for slots in await trio.to_thread.run_sync(tools.store.without_layers):
            name = slots.removesuffix(".exec")
            service = tools.manager.services.get(name)
            if (service is not None and service.slots == slots) or (slots == name and not units):
                continue
            trial = tools.trials.of(name)
            if service is None and trial is not None and not trial.stack:
                tools.trials.end(name)  # without a stack before it there is nothing to go back to
            await trio.to_thread.run_sync(tools.store.forget, slots)

    def next_round(self, name: str) -> trio.Event:
        """An event, set at the end of the first round that begins after this call. The caller asks for that."""
        over = trio.Event()
        self._awaited.setdefault(name, []).append(over)
        return over

    def let_in(self, name: str) -> None:
        """What is kept out of a service for the moment may be tried again."""
        memory = self._memories.get(name)
        if memory is not None:
            memory.held.clear()

    async def look(self, service: Service) -> Desired:
        """What a round would find now, without doing anything about it."""
        async with self._observer.using_store():
            return await self._observer.look(service)

    async def waits(self, service: Service, desired: Desired) -> str:
        """Why a service would not get its new stack now, "" if it would."""
        if _has_to_run(service, desired):
            return "it is not running, and Check= needs that: it is tried once it runs"
        rolling = desired.new and service.settings.rollout == "rolling"
        if rolling and not self._rollout.may_go(await self._rollout.bid(service, desired)):
            return "it waits for its turn (Rollout=rolling)"
        return ""

    async def round(self, service: Service, since: float) -> float | None:
        """One round.

        Args:
            since: when the change was noticed, `trio.current_time()`.

        Returns:
            Seconds after which to look again even if nothing happens; None: there is no need.
        """
        awaited = self._awaited.pop(service.name, ())
        try:
            again = await self._round(service, since)
            wait = "nothing left to wait for" if again is None else f"again in {again:g} s"
            say("debug", service.name, f"round over: {wait}")
            return again
        finally:
            for over in awaited:
                over.set()

    async def _round(self, service: Service, since: float) -> float | None:
        memory = self._memories.setdefault(service.name, Memory())
        busy = True
        try:
            busy = await self._steps(service, memory, since)
        except Gone as gone:
            say("debug", service.name, f"{gone}: its manager will say so")
            return None  # its next start asks for a round
        except Elsewhere as error:
            memory.mounted = frozenset()
            await self._outcomes.needs_restart(service.name, service.invocation, str(error))
            return None
        except Unanswered as error:
            await self._outcomes.not_placed(service.name, error)
            return None  # the answer asks for a round
        except (OSError, Refused, Later, Hung, WorkerLost, Moved) as error:
            await self._outcomes.not_placed(service.name, error)
            if not memory.attempts:
                # The next look reads the copies again that the service is to have.
                doubt = self._tools.store.doubt
                await trio.to_thread.run_sync(doubt, service.slots, abandon_on_cancel=True)
        memory.attempts = memory.attempts + 1 if busy else 0
        return min(_AGAIN * 2 ** (memory.attempts - 1), _AGAIN_MAX) if busy else None

    async def _steps(self, service: Service, memory: Memory, since: float) -> bool:
        """Look and attempt, until the service has what it should have. True: a file is still being written."""
        await self._rollback.notice_failure(service, memory)
        memory.let_in_at_start(service.invocation)
        rolling = service.settings.rollout == "rolling"
        if rolling:
            self._rollout.begin(service.name)
        try:
            async with self._observer.using_store():
                while True:
                    desired = await self._observer.watch_and_look(service, memory)
                    say("debug", service.name, messages.looked(desired))
                    await self._outcomes.look(service.name, desired)
                    if await self._turn(service, desired, memory, since) is Next.DONE:
                        return desired.busy
                    service = _as_it_is(service)
        finally:
            if rolling:
                self._rollout.end(service.name)

    async def _turn(self, service: Service, desired: Desired, memory: Memory, since: float) -> Next:
        """An attempt, if it is this service's turn."""
        if _has_to_run(service, desired):
            say("debug", service.name, "waits: it is not running, and Check= needs that")
            desired = desired.staying()
        if not desired.new or service.settings.rollout != "rolling":
            return await self._attempt(service, desired, memory, since)
        with self._rollout.turn(service.name, await self._rollout.bid(service, desired)) as its_turn:
            if its_turn:
                return await self._attempt(service, desired, memory, since)
            say("debug", service.name, "waits: not its turn (Rollout=rolling)")
            if not desired.current.layers:
                # An instance that started on its template's slots has no stack of its own to stay on.
                return Next.DONE
            return await self._attempt(service, desired.staying(), memory, since)

    async def _attempt(self, service: Service, desired: Desired, memory: Memory, since: float) -> Next:
        """Check, accept, and bring the service to the stack."""
        if desired.new:
            try:
                desired = await self._count_try(service, desired)
            except FileNotFoundError:
                say("debug", service.name, "another service's attempt has just renamed a file")
                return Next.LOOK_AGAIN
        if not await self._passes(service, desired, memory):
            return Next.LOOK_AGAIN
        if not desired.recorded:
            desired = await self._accept(service, desired)
        if desired.on_trial or desired.rolling_back:
            self._tools.counted.end(service.name)
        self._accepted(service.name)
        if service.main is None:
            return await self._stopped(service, desired, memory)
        try:
            return await self._into_service(service, service.main, desired, memory, since)
        except Gone:
            await self._say_accepted(replace(service, starting=False), desired)
            raise
        except HostNamespace:
            if desired.stack.layers or desired.current.layers or desired.rolling_back:
                raise
            say("debug", service.name, "not touched, and a restart would bring it nothing")
            memory.mounted = frozenset()
            return Next.DONE

    async def _count_try(self, service: Service, desired: Desired) -> Desired:
        """Count one try of each new file that has counters. Returns what is desired, with their new names.

        Raises:
            FileNotFoundError: another service's attempt has renamed one meanwhile.
        """
        stack, tools = desired.stack, self._tools
        if tries.are_counted(stack):
            renaming = functools.partial(tools.watcher.renaming, service.name)
            begin = tools.counted.begin
            stack = await tools.offload.run(
                service.name, begin, service.name, stack, desired.current, renaming, service.trust
            )
            say("debug", service.name, f"tries counted: {messages.files(stack)}")
        return replace(desired, stack=stack, recorded=False)

    async def _passes(self, service: Service, desired: Desired, memory: Memory) -> bool:
        """Whether the service's own check accepts a new stack; without a check, all pass."""
        if not desired.new or service.main is None or not service.settings.check:
            return True
        tools = self._tools
        with service.main.hold() as main:
            copies = self._copies(desired.stack)
            ended = await check(tools.workers, tools.manager, service, main, desired.stack, copies)
        say("debug", service.name, f"check failed: {ended.reason}" if ended.reason else "check passed")
        if not ended.reason:
            return True
        tools.counted.end(service.name)
        event = messages.check_failed(
            service.name, desired.current, desired.stack, ended.reason, ended.output
        )
        await self._rollback.keep_out(service, memory, desired.stack, ended.reason, event=event)
        return False

    async def _accept(self, service: Service, desired: Desired) -> Desired:
        """From now on every start of the service gets this stack; a new one is on trial."""
        tools = self._tools
        if desired.new:
            trial = Trial(desired.stack.id, was_down=service.main is None and service.failed)
            tools.trials.begin(service.name, trial)
            desired = replace(desired, trial=trial)
        entries = [pick.entry for pick in desired.look.picks]
        accept, on_trial = tools.store.accept, [tools.trials.directory]
        await tools.offload.run(service.name, accept, service.slots, desired.stack, entries, on_trial)
        trial_words = ", on trial" if desired.new else ""
        say("debug", service.name, f"accepted {messages.labels(desired.stack)}{trial_words}")
        await tools.manager.learn(service, desired.sysexts)
        return desired

    async def _stopped(self, service: Service, desired: Desired, memory: Memory) -> Next:
        """The service does not run: its next start gets the stack. If a bad stack took it down, start it again."""
        memory.mounted = frozenset()
        if not desired.rolling_back:
            await self._say_accepted(service, desired)
            return Next.DONE
        down = service.failed and not service.starting
        revived = await self._tools.manager.revive(service) if down else Reloaded(ok=True)
        if revived.interrupted:
            raise Later(f"it could not be started again on its old stack: {revived.reason}")
        return await self._rollback.after_revival(service, memory, desired, revived)

    async def _say_accepted(self, service: Service, desired: Desired) -> None:
        """Say that the slots have another stack, though no process runs on it yet: a `wait` may wait for that."""
        if desired.stack.id == desired.current.id or desired.rolling_back:
            return
        accepted = messages.accepted(
            service.name,
            desired.current,
            desired.stack,
            starting=service.starting,
            headless=service.headless,
        )
        await self._outcomes.outcome(accepted)

    async def _into_service(
        self, service: Service, process: Process, desired: Desired, memory: Memory, since: float
    ) -> Next:
        """Bring a running service to the stack, have it reload, and judge how it takes it."""
        tools = self._tools
        owed = tools.pending.owed(service.name, service.invocation)
        with process.hold() as main:
            converged = await self._converge(service, main, desired, memory)
            if converged.swaps or owed:
                for remark in converged.remarks:
                    say("warning", service.name, remark)
                reloaded = await reload_and_judge(tools.manager, service, main)
            elif desired.rolling_back:
                reloaded = Reloaded(ok=True)  # it was started on the good stack since
            elif desired.on_trial and not desired.pinned:
                judged = await judge_start(tools.manager, service, main)
                if judged is None:
                    return Next.DONE
                return await self._rollback.after_start(service, memory, desired, judged)
            else:
                return Next.DONE
        if reloaded is None:
            await self._say_accepted(replace(service, starting=False), desired)
            return Next.DONE
        total = round((trio.current_time() - since) * 1_000_000)
        times = Times(converged.usec, reloaded.usec, total)
        return await self._rollback.after_reload(service, memory, desired, converged, reloaded, times)

    async def _converge(self, service: Service, main: Process, desired: Desired, memory: Memory) -> Converged:
        """Swap the stack in, in each namespace of the service that does not show it. From then on a reload is owed."""
        tools, stack = self._tools, desired.stack
        copies = self._copies(stack)
        pids = await tools.manager.processes(service)
        others = [one for one in tools.manager.services.values() if one.name != service.name]
        memory.mounted = None
        converged = await tools.workers.run(
            converge,
            tools.workers,
            main,
            pids,
            stack,
            copies,
            functools.partial(tools.pending.owe, service.name, service.invocation),
            memory.compared,
            kept=lambda: (desired.current, *tools.store.stacks(service.slots)),
            other_mains=[one.main.pid for one in others if one.main is not None],
            patient=desired.busy and not desired.new,
        )
        memory.mounted = frozenset(stack.digests)
        self._outcomes.placed(service.name)
        say("debug", service.name, messages.converged(converged))
        return converged

    def _copies(self, stack: Stack) -> dict[str, Copy]:
        return {layer.digest: self._tools.store.copy(layer) for layer in stack.layers}


def _has_to_run(service: Service, desired: Desired) -> bool:
    """Whether a new stack has to wait until the service runs, as its check needs that. The old one stays."""
    unchecked = service.main is None and bool(service.settings.check)
    return desired.new and unchecked and bool(desired.current.layers)


def _as_it_is(service: Service) -> Service:
    """The service without a main process that has ended: its manager may not have noticed that yet."""
    if service.main is not None and service.main.pidfd >= 0 and service.main.alive():
        return service
    return replace(service, main=None, failed=service.failed or service.main is not None)
