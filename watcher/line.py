# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a drop, for one service: look, admit, choose, check, accept, swap, reload, judge, record.

A round always starts from what is on disk now and what is mounted now; nothing that is remembered between rounds
decides anything that matters. A lost event, a crash, a restart of the service or of the watcher all end in the same
place: another round. So does a rollback: what proved bad goes into the quarantine, and then the best that is left is
wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from watcher import journal, report, tries
from watcher.admission import Admission, Host, host
from watcher.check import check
from watcher.ledger import Ledger
from watcher.managers import Manager, Reloaded, Service
from watcher.model import Copy, Event, Later, Layer, Refused, Stack, shown
from watcher.mounts.converge import Compared, Converged, as_stack, converge
from watcher.mounts.swap import Moved
from watcher.mounts.workshop import HostNamespace, Hung, Lost, Workshop
from watcher.pending import Pending
from watcher.process import Gone, Process
from watcher.record import Record
from watcher.reload import reload_and_judge
from watcher.report import Times
from watcher.rollout import Rollout
from watcher.store import Store
from watcher.wanted import Wanted, find
from watcher.watch import Watcher

# Seconds until what cannot be waited for by an event is looked at again: a writer that uses another name of the file,
# a loop device that becomes free. Doubled each time, up to the second figure.
_AGAIN = 0.25
_AGAIN_MAX = 30.0

# Seconds after a reload in which the end of the main process is put down to it. Nothing waits for this.
_TRIAL_SEC = 1.0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every round works with."""

    store: Store
    admission: Admission
    shop: Workshop
    manager: Manager
    watcher: Watcher
    ledger: Ledger
    pending: Pending


@dataclass(frozen=True, slots=True)
class _Trial:
    """A reload that went well, so far."""

    invocation: str
    until: float
    before: Stack
    stack: Stack


@dataclass(slots=True)
class _Memory:
    """What is worth remembering of a service: to spare work, and to be patient with what fails again and again."""

    interests: tuple[object, ...] | None = None
    attempts: int = 0
    mounted: frozenset[str] | None = None
    trial: _Trial | None = None
    compared: dict[Compared, bool] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    held_for: str = ""
    why: str = ""


class Line:
    """Rounds for services: one at a time for each, any number of services side by side.

    Args:
        tools: what rounds work with.
        told: called with every outcome, after it was recorded.
    """

    def __init__(self, tools: Tools, told: Callable[[Event], None] = lambda event: None) -> None:
        self._tools = tools
        self._record = Record(tools.ledger, told)
        self._rollout = Rollout()
        self._memory: dict[str, _Memory] = {}

    @property
    def mounted(self) -> frozenset[str] | None:
        """Digests of all that the services run on; None while that is not known of every one of them."""
        known: set[str] = set()
        for memory in self._memory.values():
            if memory.mounted is None:
                return None
            known |= memory.mounted
        return frozenset(known)

    def forget(self, name: str) -> None:
        """The service takes no part any more; its slots stay."""
        self._memory.pop(name, None)
        self._record.forget(name)
        self._tools.watcher.drop(name)
        self._tools.pending.settle(name)

    async def round(self, service: Service, since: float) -> float | None:
        """One round.

        Args:
            since: when the change was noticed, `trio.current_time()`.

        Returns:
            Seconds after which to look again even if nothing happens; None: there is no need.
        """
        memory = self._memory.setdefault(service.name, _Memory())
        try:
            settled = await self._round(service, memory, since)
        except Gone:
            return None  # its manager will say so, and it is looked at again when it starts
        except HostNamespace as error:
            memory.mounted = frozenset()
            await self._record.needs_restart(service.name, service.invocation, str(error))
            return None
        except (OSError, Refused, Later, Hung, Lost, Moved) as error:
            await self._record.not_placed(service.name, error)
            settled = False
        memory.attempts = 0 if settled else memory.attempts + 1
        return None if settled else min(_AGAIN * 2 ** (memory.attempts - 1), _AGAIN_MAX)

    async def look(self, service: Service) -> Wanted:
        """What a round would find now, without doing anything about it."""
        with self._tools.store.using():
            return await trio.to_thread.run_sync(self._find, service, host(service.root), {})

    async def _round(self, service: Service, memory: _Memory, since: float) -> bool:
        """Whether there is nothing left to wait for."""
        await self._judge_trial(service, memory)
        if memory.held_for != service.invocation:
            memory.held.clear()
            memory.held_for = service.invocation
        with self._tools.store.using():
            while True:
                wanted = await self._look(service, memory)
                await self._record.look(service.name, wanted)
                if await self._turn(service, wanted, memory, since):
                    return not wanted.busy
                service = _as_it_is(service)

    async def _turn(self, service: Service, wanted: Wanted, memory: _Memory, since: float) -> bool:
        """An attempt, when it is this service's turn; False: it did not do, something else is wanted now."""
        settings = service.settings
        if settings.rollout != "rolling" or service.main is None or not _is_new(wanted):
            return await self._attempt(service, wanted, memory, since)
        new = frozenset(wanted.stack.digests) - frozenset(wanted.current.digests)
        async with self._rollout.turn(service.name, new, settings.rollout_parallel) as turn:
            if turn.refused:
                await self._keep_out(service, memory, wanted.current, wanted.stack, turn.refused)
                refusal = report.check_failed(service.name, wanted.current, wanted.stack, turn.refused, "")
                await self._record.outcome(refusal)
                return False
            turn.good = await self._attempt(service, wanted, memory, since)
            if not turn.good:
                turn.reason = memory.why
            return turn.good

    async def _attempt(self, service: Service, wanted: Wanted, memory: _Memory, since: float) -> bool:
        if service.main is not None and _is_new(wanted):
            stack = self._count(service, wanted)
            wanted = replace(wanted, stack=stack, recorded=False)
        if not await self._passes(service, wanted, memory):
            return False
        if not wanted.recorded and not self._has_to_wait(service, wanted):
            await self._accept(service, wanted)
        if service.main is not None:
            return await self._into_service(service, service.main, wanted, memory, since)
        await self._stopped(service, wanted, memory)
        return True

    async def _look(self, service: Service, memory: _Memory) -> Wanted:
        """What is on disk, watched from before it is read, so that no change in between is missed."""
        made_for = host(service.root)
        while True:
            wanted = await trio.to_thread.run_sync(self._find, service, made_for, dict(memory.held))
            if wanted.look.interests == memory.interests:
                return wanted
            memory.interests = wanted.look.interests
            if not self._tools.watcher.set(service.name, wanted.look.interests):
                return wanted

    def _find(self, service: Service, made_for: Host, held: dict[str, str]) -> Wanted:
        tools = self._tools
        quarantined = tools.ledger.quarantined(service.name)
        kept_out = {one.digest: one.reason for one in quarantined} | held
        pin = tools.ledger.pinned(service.name)
        return find(tools.store, tools.admission, service.name, service.declared, made_for, kept_out, pin)

    async def _passes(self, service: Service, wanted: Wanted, memory: _Memory) -> bool:
        """Whether the service's own check likes a new stack."""
        if not _is_new(wanted) or service.main is None or not service.settings.check:
            return True
        tools = self._tools
        with service.main.hold() as main:
            copies = self._copies(wanted.stack)
            verdict = await check(tools.shop, tools.manager, service, main, wanted.stack, copies)
        if not verdict.reason:
            return True
        before, reason = wanted.current, verdict.reason
        await self._keep_out(service, memory, before, wanted.stack, reason)
        event = report.check_failed(service.name, before, wanted.stack, reason, verdict.output)
        await self._record.outcome(event)
        return False

    def _has_to_wait(self, service: Service, wanted: Wanted) -> bool:
        """A service that does not run cannot be checked: its slots keep what it ran well on."""
        return (
            service.main is None
            and bool(service.settings.check)
            and bool(wanted.current.layers)
            and not wanted.rolling_back
        )

    async def _accept(self, service: Service, wanted: Wanted) -> None:
        """From now on every start of the service gets this stack."""
        entries = [pick.entry for pick in wanted.look.picks]
        accept = self._tools.store.accept
        await trio.to_thread.run_sync(accept, service.name, wanted.stack, entries)
        await self._tools.manager.learn(service, entries, wanted.sysexts)

    async def _stopped(self, service: Service, wanted: Wanted, memory: _Memory) -> None:
        memory.mounted = frozenset()
        if wanted.stack.id == wanted.current.id or self._has_to_wait(service, wanted):
            return
        if not wanted.rolling_back:
            await self._record.outcome(report.accepted(service.name, wanted.current, wanted.stack))
            return
        revived = await self._tools.manager.revive(service)
        event = report.rolled_back(
            service.name,
            wanted.current,
            wanted.stack,
            wanted.why,
            revived,
            Times(),
            running=bool(revived.told),
        )
        await self._record.outcome(event, critical=not revived.ok)

    async def _into_service(
        self, service: Service, held: Process, wanted: Wanted, memory: _Memory, since: float
    ) -> bool:
        """Bring a running service to the stack; False if it did not take it well, and something else is wanted."""
        tools, stack = self._tools, wanted.stack
        owed = tools.pending.owed(service.name, service.invocation)
        begin = functools.partial(tools.pending.owe, service.name, service.invocation)
        copies = self._copies(stack)
        pids = await tools.manager.processes(service)
        memory.mounted = None
        with held.hold() as main:
            converged = await tools.shop.run(
                converge, tools.shop, main, pids, stack, copies, begin, memory.compared
            )
            memory.mounted = frozenset(stack.digests)
            self._record.placed(service.name)
            if not converged.swaps and not owed:
                return True
            for remark in converged.remarks:
                journal.log.warning(f"{service.name}: {remark}", service=service.name)
            told = trio.current_time()
            reloaded = await reload_and_judge(tools.manager, service, main)
        now = trio.current_time()
        times = Times(converged.usec, _usec(now - told), _usec(now - since))
        good = await self._judge(service, wanted, converged, reloaded, times, memory)
        tools.pending.settle(service.name)
        return good

    async def _judge(
        self,
        service: Service,
        wanted: Wanted,
        converged: Converged,
        reloaded: Reloaded,
        times: Times,
        memory: _Memory,
    ) -> bool:
        name, stack = service.name, wanted.stack
        good = self._before(service, wanted)
        before = _shown_before(converged, wanted, good)
        memory.trial = None
        if wanted.rolling_back:
            event = report.rolled_back(name, wanted.current, stack, wanted.why, reloaded, times, running=True)
            await self._record.outcome(event, critical=not reloaded.ok)
            return True
        if reloaded.ok:
            swapped = bool(converged.swaps)
            await self._record.outcome(report.applied(name, before, stack, reloaded, times, swapped=swapped))
            self._count_success(service, stack)
            until = trio.current_time() + _TRIAL_SEC
            memory.trial = _Trial(service.invocation, until, good, stack)
            return True
        if not service.settings.rollback or wanted.pinned or good.id == stack.id:
            await self._record.outcome(report.failed(name, before, stack, reloaded, times))
            return True
        await self._keep_out(service, memory, good, stack, _with_output(reloaded))
        return False

    def _before(self, service: Service, wanted: Wanted) -> Stack:
        """The newest accepted stack that is another than the wanted one: what would be gone back to."""
        if wanted.current.id != wanted.stack.id:
            return wanted.current
        stacks = self._tools.store.stacks(service.name)
        return next((stack for stack in stacks if stack.id != wanted.stack.id), Stack())

    async def _judge_trial(self, service: Service, memory: _Memory) -> None:
        """The main process ended soon after a reload: that is put down to the new stack."""
        trial, memory.trial = memory.trial, None
        if trial is None or not service.settings.rollback or trial.before.id == trial.stack.id:
            return
        if service.invocation == trial.invocation and service.main is not None and service.main.alive():
            if trio.current_time() < trial.until:
                memory.trial = trial
        elif service.failed and trio.current_time() < trial.until:
            reason = "its main process ended soon after the reload"
            await self._keep_out(service, memory, trial.before, trial.stack, reason)

    async def _keep_out(
        self, service: Service, memory: _Memory, before: Stack, bad: Stack, reason: str
    ) -> None:
        memory.why = reason
        memory.held |= await self._record.quarantine(service.name, before, bad, reason)

    def _count(self, service: Service, wanted: Wanted) -> Stack:
        """The wanted stack, one try having been taken from each new image that has its tries counted."""
        known = set(wanted.current.digests)
        return Stack(
            tuple(
                layer if layer.digest in known else _recounted(service, layer, tries.begin)
                for layer in wanted.stack.layers
            )
        )

    def _count_success(self, service: Service, stack: Stack) -> None:
        """Remove the counters; the next look finds the new names, and sees that nothing else has changed."""
        for layer in stack.layers:
            _recounted(service, layer, tries.succeed)

    def _copies(self, stack: Stack) -> dict[str, Copy]:
        return {layer.digest: self._tools.store.copy(layer) for layer in stack.layers}


def _is_new(wanted: Wanted) -> bool:
    """Whether it is a stack that has not proved itself yet."""
    return wanted.stack.id != wanted.current.id and not wanted.rolling_back and not wanted.pinned


def _recounted(service: Service, layer: Layer, rename: Callable[[str], str]) -> Layer:
    if tries.counted(layer.source) is None:
        return layer
    try:
        return replace(layer, source=rename(layer.source))
    except OSError as error:
        problem = f"{service.name}: {shown(layer.source)}: its tries cannot be counted: {error.strerror}"
        _log("warning", problem, service.name)
        return layer


def _as_it_is(service: Service) -> Service:
    """Its manager may not have noticed yet that its main process has ended."""
    return service if service.main is not None and service.main.alive() else replace(service, main=None)


def _shown_before(converged: Converged, wanted: Wanted, good: Stack) -> Stack:
    """What the service showed, in the words of the accepted stack it came from, if it is one."""
    if converged.before.layers is None:  # systemd started it on its slots
        return good
    for stack in (wanted.current, good):
        if converged.before.stack == stack.id:
            return stack
    return as_stack(converged.before)


def _with_output(reloaded: Reloaded) -> str:
    lines = [line.strip() for line in reloaded.output.splitlines() if line.strip()]
    return f"{reloaded.reason} ({shown(lines[-1][:200])})" if lines else reloaded.reason


def _log(level: str, text: str, service: str) -> None:
    getattr(journal.log, level)(text, service=service)


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)
