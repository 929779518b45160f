# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a drop, for one service: look, admit, choose, accept, swap, reload, record.

A round always starts from what is on disk now and what is mounted now; nothing that is remembered between rounds
decides anything. A lost event, a crash, a restart of the service or of the watcher all end in the same place: another
round.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

import trio

from watcher import journal, scan
from watcher.admission import Admission, Host, host
from watcher.ledger import Ledger, LedgerError
from watcher.managers import Manager, Reloaded, Service
from watcher.model import Event, Incomplete, Later, Look, Outcome, Refused, Stack, shown
from watcher.mounts.converge import Converged, as_stack, converge
from watcher.mounts.swap import Moved
from watcher.mounts.workshop import HostNamespace, Hung, Lost, Workshop
from watcher.pending import Pending
from watcher.plan import Choice, Passed, choose, describe
from watcher.process import Gone
from watcher.stacks import Damaged
from watcher.store import Store
from watcher.watch import Watcher

# Seconds until what cannot be waited for by an event is looked at again: a writer that uses another name of the file,
# a loop device that becomes free. Doubled each time, up to the second figure.
_AGAIN = 0.25
_AGAIN_MAX = 30.0


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
class Wanted:
    """What a service should have, and the stack that it was given before."""

    look: Look
    choice: Choice
    accepted: Stack


@dataclass(slots=True)
class _Memory:
    """What was said about a service, so that it is said once, and how often it had to be tried."""

    said: frozenset[tuple[object, ...]] = frozenset()
    interests: tuple[object, ...] | None = None
    needs_restart: str = ""
    attempts: int = 0
    mounted: frozenset[str] | None = None


class Line:
    """Rounds for services: one at a time for each, any number of services side by side."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
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
            await self._failed(service, memory, error)
            settled = False
        memory.attempts = 0 if settled else memory.attempts + 1
        return None if settled else min(_AGAIN * 2 ** (memory.attempts - 1), _AGAIN_MAX)

    async def _round(self, service: Service, memory: _Memory, since: float) -> bool:
        with self._tools.store.using():
            wanted = await self._look(service, memory)
            await self._say(service, wanted, memory)
            stack = wanted.choice.stack
            if stack != wanted.accepted:
                await self._accept(service, wanted)
            if service.main is not None:
                await self._converge(service, wanted, memory, since)
            else:
                memory.mounted = frozenset()
                if stack.id != wanted.accepted.id:
                    await self._record(_stopped(service, wanted))
        return not wanted.choice.busy

    async def _look(self, service: Service, memory: _Memory) -> Wanted:
        """What is on disk, watched from before it is read, so that no change in between is missed."""
        made_for = host(service.root)
        while True:
            wanted = await trio.to_thread.run_sync(self._wanted, service, made_for)
            if wanted.look.interests == memory.interests:
                return wanted
            memory.interests = wanted.look.interests
            if not self._tools.watcher.set(service.name, wanted.look.interests):
                return wanted

    def _wanted(self, service: Service, made_for: Host) -> Wanted:
        look = scan.look(service.declared)
        accepted = accepted_stack(self._tools.store, service.name)
        admit = functools.partial(self._tools.admission.admit, made_for=made_for)
        return Wanted(look, choose(look, admit, accepted), accepted)

    async def _accept(self, service: Service, wanted: Wanted) -> None:
        """From now on every start of the service gets this stack."""
        entries = [pick.entry for pick in wanted.look.picks]
        await trio.to_thread.run_sync(self._tools.store.accept, service.name, wanted.choice.stack, entries)
        await self._tools.manager.learn(service, entries)

    async def _converge(self, service: Service, wanted: Wanted, memory: _Memory, since: float) -> None:
        assert service.main is not None
        tools, stack = self._tools, wanted.choice.stack
        owed = tools.pending.owed(service.name, service.invocation)
        begin = functools.partial(tools.pending.owe, service.name, service.invocation)
        copies = {layer.digest: tools.store.copy(layer) for layer in stack.layers}
        pids = await tools.manager.processes(service)
        memory.mounted = None
        with service.main.hold() as main:
            converged = await tools.shop.run(converge, tools.shop, main, pids, stack, copies, begin)
        memory.mounted = frozenset(stack.digests)
        memory.needs_restart = ""
        if not converged.swaps and not owed:
            return
        for remark in converged.remarks:
            journal.log.warning(f"{service.name}: {remark}", service=service.name)
        told = trio.current_time()
        reloaded = await tools.manager.reload(service)
        tools.pending.settle(service.name)
        now = trio.current_time()
        times = _Times(converged.usec, _usec(now - told), _usec(now - since))
        await self._record(_applied(service, wanted, converged, reloaded, times))

    async def _say(self, service: Service, wanted: Wanted, memory: _Memory) -> None:
        """What is worth a line, unless it was said already and has been so ever since."""
        said: set[tuple[object, ...]] = set()
        key: tuple[object, ...]
        for remark in wanted.look.remarks:
            key = (remark.path, remark.text)
            if key not in memory.said:
                _log(remark.level, f"{service.name}: {shown(remark.path)}: {remark.text}", service.name)
            said.add(key)
        for passed in wanted.choice.passed:
            key = (passed.candidate.path, str(passed.reason), *_signature(passed.candidate.path))
            if key not in memory.said:
                await self._say_passed(service, passed, wanted)
            said.add(key)
        memory.said = frozenset(said)

    async def _say_passed(self, service: Service, passed: Passed, wanted: Wanted) -> None:
        path = shown(passed.candidate.path)
        if isinstance(passed.reason, Refused):
            await self._record(_refused(service, passed, wanted))
        elif isinstance(passed.reason, Later):
            text = f"{service.name}: {path} has to wait, it is tried again by itself: {passed.reason}"
            _log("warning", text, service.name)
        else:
            _log("debug", f"{service.name}: {path} has to wait: {passed.reason}", service.name)

    async def _needs_restart(self, service: Service, memory: _Memory, reason: str) -> None:
        if memory.needs_restart == service.invocation:
            return
        memory.needs_restart = service.invocation
        memory.mounted = frozenset()
        message = f"{service.name}: not touched, its main process {reason}: restart it once to have its stack"
        await self._record(_event(service, Outcome.NEEDS_RESTART, message, reason=reason))

    async def _failed(self, service: Service, memory: _Memory, error: Exception) -> None:
        reason = shown(str(error))
        key = ("failed", reason)
        if key not in memory.said:
            message = f"{service.name}: its stack could not be put in place, it is tried again: {reason}"
            await self._record(_event(service, Outcome.FAILED, message, reason=reason))
        memory.said |= {key}

    async def _record(self, event: Event) -> None:
        journal.record(event)
        try:
            await trio.to_thread.run_sync(self._tools.ledger.append, event)
        except LedgerError as error:
            journal.log.error(f"history: {error}")


def accepted_stack(store: Store, name: str) -> Stack:
    """The last accepted stack; the empty one where there is none, or where its record cannot be read."""
    try:
        return store.accepted(name) or Stack()
    except Damaged as error:
        journal.log.error(f"{name}: {error}; it is made anew from what is on disk")
        return Stack()


@dataclass(frozen=True, slots=True)
class _Times:
    """Microseconds: of the swap, of the reload, from noticing to the end."""

    swap: int
    reload: int
    total: int


def _applied(
    service: Service, wanted: Wanted, converged: Converged, reloaded: Reloaded, times: _Times
) -> Event:
    stack = wanted.choice.stack
    before = wanted.accepted if converged.before.stack == wanted.accepted.id else as_stack(converged.before)
    what = describe(before, stack)
    if not converged.swaps:
        sentence = f"{(stack.id and what) or 'stack'} was in place already"
    else:
        comma = "" if " -> " in what and "," not in what else ","
        sentence = f"{what}{comma} applied in {_duration(times.swap)}"
    outcome = Outcome.APPLIED
    if not reloaded.ok:
        outcome = Outcome.FAILED
        sentence += f", but {reloaded.reason}"
    elif reloaded.told:
        sentence += f", {reloaded.told} {'sent' if reloaded.told.startswith('SIG') else 'done'}"
        sentence += f" in {_duration(times.reload)}"
    else:
        sentence += "; the service was not told to reload, it has no way to"
    top = stack.layers[-1] if stack.layers else None
    return _event(
        service,
        outcome,
        f"{service.name}: {sentence}",
        stack=stack.id,
        previous=before.id,
        image=top.name if top else "",
        version=top.version if top else "",
        digest=top.digest if top else "",
        source=top.source if top else "",
        reason=reloaded.reason,
        output=reloaded.output,
        swap_usec=times.swap,
        total_usec=times.total,
        layers=stack.layers,
    )


def _stopped(service: Service, wanted: Wanted) -> Event:
    stack = wanted.choice.stack
    what = describe(wanted.accepted, stack)
    message = f"{service.name}: {what} accepted; it is not running, its next start gets it"
    return _event(
        service,
        Outcome.APPLIED,
        message,
        stack=stack.id,
        previous=wanted.accepted.id,
        layers=stack.layers,
    )


def _refused(service: Service, passed: Passed, wanted: Wanted) -> Event:
    candidate, reason = passed.candidate, str(passed.reason)
    kept = next((one for one in wanted.choice.stack.layers if one.slot == passed.slot), None)
    keeps = f"it keeps {kept.label}" if kept else "it goes without"
    incomplete = isinstance(passed.reason, Incomplete)
    word = "incomplete" if incomplete else "refused"
    return _event(
        service,
        Outcome.INCOMPLETE if incomplete else Outcome.REFUSED,
        f"{service.name}: {shown(candidate.path)} {word}: {reason}; {keeps}",
        stack=wanted.choice.stack.id,
        image=candidate.name,
        version=candidate.version,
        source=candidate.path,
        reason=reason,
    )


def _event(service: Service, outcome: Outcome, message: str, **fields: object) -> Event:
    return Event(service.name, outcome, message, when=time.time_ns() // 1000, **fields)  # type: ignore[arg-type]


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


def _duration(usec: int) -> str:
    return (
        f"{usec} us"
        if usec < 1000
        else f"{usec / 1000:.0f} ms"
        if usec < 10_000_000
        else f"{usec / 1e6:.0f} s"
    )
