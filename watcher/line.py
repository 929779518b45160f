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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from watcher import journal, report, tries
from watcher.admission import Admission, Host, host
from watcher.check import check
from watcher.ledger import Ledger, LedgerError
from watcher.managers import Manager, Reloaded, Service
from watcher.model import Copy, Event, KeptOut, Later, Layer, Refused, Stack, shown
from watcher.mounts.converge import Compared, Converged, as_stack, converge
from watcher.mounts.swap import Moved
from watcher.mounts.workshop import HostNamespace, Hung, Lost, Workshop
from watcher.pending import Pending
from watcher.plan import Passed
from watcher.process import Gone, Process
from watcher.reload import reload_and_judge
from watcher.report import Times
from watcher.schema import Quarantined, text
from watcher.store import Store
from watcher.wanted import STACK, Wanted, find
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
    """What was said about a service, so that it is said once, and how often it had to be tried."""

    said: frozenset[tuple[object, ...]] = frozenset()
    interests: tuple[object, ...] | None = None
    needs_restart: str = ""
    attempts: int = 0
    mounted: frozenset[str] | None = None
    trial: _Trial | None = None
    compared: dict[Compared, bool] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    held_for: str = ""


class Line:
    """Rounds for services: one at a time for each, any number of services side by side.

    Args:
        tools: what rounds work with.
        told: called with every outcome, after it was recorded.
    """

    def __init__(self, tools: Tools, told: Callable[[Event], None] = lambda event: None) -> None:
        self._tools = tools
        self._told = told
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
            await self._needs_restart(service, memory, str(error))
            return None
        except (OSError, Refused, Later, Hung, Lost, Moved) as error:
            await self._not_placed(service, memory, error)
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
        while True:
            with self._tools.store.using():
                wanted = await self._look(service, memory)
                await self._say(service, wanted, memory)
                if service.main is not None and _is_new(wanted):
                    wanted = replace(wanted, stack=self._count(service, wanted))
                if not await self._passes(service, wanted, memory):
                    continue  # it is in the quarantine now
                if wanted.stack != wanted.current and not self._has_to_wait(service, wanted):
                    await self._accept(service, wanted)
            if service.main is None:
                await self._stopped(service, wanted, memory)
            elif not await self._into_service(service, service.main, wanted, memory, since):
                service = _as_it_is(service)
                continue
            return not wanted.busy

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
        await self._quarantine(service, memory, before, wanted.stack, reason)
        event = report.check_failed(service.name, before, wanted.stack, reason, verdict.output)
        await self._record(event)
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
        await self._tools.manager.learn(service, entries)

    async def _stopped(self, service: Service, wanted: Wanted, memory: _Memory) -> None:
        memory.mounted = frozenset()
        if wanted.stack.id == wanted.current.id or self._has_to_wait(service, wanted):
            return
        if not wanted.rolling_back:
            await self._record(report.accepted(service.name, wanted.current, wanted.stack))
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
        await self._record(event, critical=not revived.ok)

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
            memory.needs_restart = ""
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
        before = _shown_before(converged, wanted)
        memory.trial = None
        if wanted.rolling_back:
            event = report.rolled_back(name, wanted.current, stack, wanted.why, reloaded, times, running=True)
            await self._record(event, critical=not reloaded.ok)
            return True
        if reloaded.ok:
            swapped = bool(converged.swaps)
            await self._record(report.applied(name, before, stack, reloaded, times, swapped=swapped))
            self._count_success(service, stack)
            until = trio.current_time() + _TRIAL_SEC
            memory.trial = _Trial(service.invocation, until, wanted.before, stack)
            return True
        if not service.settings.rollback or wanted.pinned or wanted.before.id == stack.id:
            await self._record(report.failed(name, before, stack, reloaded, times))
            return True
        await self._quarantine(service, memory, wanted.before, stack, _with_output(reloaded))
        return False

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
            await self._quarantine(service, memory, trial.before, trial.stack, reason)

    async def _quarantine(
        self, service: Service, memory: _Memory, before: Stack, bad: Stack, reason: str
    ) -> None:
        """Keep what is new in a stack out of the service; the stack itself where nothing in it is new."""
        known = set(before.digests)
        new = {layer.digest: layer.source for layer in bad.layers if layer.digest not in known}
        when = report.now()
        for digest, source in (new or {STACK + bad.id: ""}).items():
            counters = tries.counted(source)
            if counters is not None and counters.left:
                memory.held[digest] = f"{reason}; tries left: {counters.left}"
                continue
            content = Quarantined(service.name, digest, reason, when, source)
            try:
                await trio.to_thread.run_sync(self._tools.ledger.quarantine, content)
            except LedgerError as error:
                journal.log.error(f"quarantine, kept in memory only: {error}")

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

    async def _say(self, service: Service, wanted: Wanted, memory: _Memory) -> None:
        """What is worth a line, unless it was said already and has been so ever since."""
        said: set[tuple[object, ...]] = set()
        key: tuple[object, ...]
        for remark in wanted.look.remarks:
            key = (remark.path, remark.text)
            if key not in memory.said:
                _log(remark.level, f"{service.name}: {shown(remark.path)}: {remark.text}", service.name)
            said.add(key)
        for passed in wanted.passed:
            key = (passed.candidate.path, str(passed.reason), *_signature(passed.candidate.path))
            if key not in memory.said:
                await self._say_passed(service, passed, wanted)
            said.add(key)
        if wanted.waiting is not None:
            key = ("pinned", wanted.waiting.id)
            if key not in memory.said:
                waits = f"{service.name}: stays on the stack that it was put on by hand; `rollback --forget`"
                _log("warning", f"{waits} lets it have what was dropped since", service.name)
            said.add(key)
        memory.said = frozenset(said)

    async def _say_passed(self, service: Service, passed: Passed, wanted: Wanted) -> None:
        path = shown(passed.candidate.path)
        if isinstance(passed.reason, KeptOut) and self._is_known(service, passed):
            _log("debug", f"{service.name}: {path} {passed.reason}", service.name)
        elif isinstance(passed.reason, Refused):
            kept = next((one for one in wanted.stack.layers if one.slot == passed.slot), None)
            await self._record(report.refused(service.name, passed, kept, wanted.stack))
        elif isinstance(passed.reason, Later):
            waits = f"{service.name}: {path} has to wait, it is tried again by itself: {passed.reason}"
            _log("warning", waits, service.name)
        else:
            _log("debug", f"{service.name}: {path} has to wait: {passed.reason}", service.name)

    def _is_known(self, service: Service, passed: Passed) -> bool:
        """Whether this very file was said to be bad when it was put into the quarantine."""
        quarantined = self._tools.ledger.quarantined(service.name)
        return any(one.source == text(passed.candidate.path) for one in quarantined)

    async def _needs_restart(self, service: Service, memory: _Memory, reason: str) -> None:
        memory.mounted = frozenset()
        if memory.needs_restart != service.invocation:
            memory.needs_restart = service.invocation
            await self._record(report.needs_restart(service.name, reason))

    async def _not_placed(self, service: Service, memory: _Memory, error: Exception) -> None:
        reason = shown(str(error))
        key = ("not placed", reason)
        if key not in memory.said:
            await self._record(report.not_placed(service.name, reason))
        memory.said |= {key}

    async def _record(self, event: Event, *, critical: bool = False) -> None:
        journal.record(event, "critical" if critical else None)
        try:
            await trio.to_thread.run_sync(self._tools.ledger.append, event)
        except LedgerError as error:
            journal.log.error(f"history: {error}")
        self._told(event)


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


def _shown_before(converged: Converged, wanted: Wanted) -> Stack:
    """What the service showed, in the words of the accepted stack it came from, if it is one."""
    for stack in (wanted.current, wanted.before):
        if converged.before.stack == stack.id:
            return stack
    return as_stack(converged.before)


def _with_output(reloaded: Reloaded) -> str:
    lines = [line.strip() for line in reloaded.output.splitlines() if line.strip()]
    return f"{reloaded.reason} ({shown(lines[-1][:200])})" if lines else reloaded.reason


def _signature(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _log(level: str, text: str, service: str) -> None:
    getattr(journal.log, level)(text, service=service)


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)
