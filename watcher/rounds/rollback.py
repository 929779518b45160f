# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of a stack that was put in place: it proved good, it is kept out from now on, or it stays as it is.

A stack that proves bad goes into the quarantine, and nothing else is done here: the next look then finds that the
accepted stack is not to be used, and the newest one that is gets back in its place. Only a stack on trial
(`trials.py`) can be found bad. If the way back fails too, that is said, and nothing more is tried.
"""

from __future__ import annotations

import functools

import trio

from watcher.images import tries
from watcher.images.store import Store
from watcher.managers.base import Reloaded, Service
from watcher.managers.command import last_line
from watcher.model import Event, Stack
from watcher.mounts.converge import Converged, as_stack
from watcher.records import journal
from watcher.rounds import messages
from watcher.rounds.desired import Desired, bad
from watcher.rounds.messages import Times
from watcher.rounds.outcomes import Outcomes
from watcher.rounds.state import Afterglow, Memory, Pending, Trial, Trials
from watcher.watch.offload import Offload
from watcher.watch.watcher import Watcher

# Seconds after a reload in which the end of the main process is put down to it. Nothing waits for this.
_AFTERGLOW_SEC = 1.0


class Rollback:
    """Verdicts, and what follows from them.

    Who is killed in between leaves the next one to go on, so the order matters: the outcome is recorded, then the
    service is owed no reload any more, then its stack is on trial no more. The other way round, a reload that is still
    owed for a stack that was judged already would be made again, and recorded as an outcome of its own. What may come
    twice is the same outcome.
    """

    def __init__(
        self,
        store: Store,
        pending: Pending,
        trials: Trials,
        record: Outcomes,
        watcher: Watcher,
        offload: Offload,
    ) -> None:
        self._store = store
        self._pending = pending
        self._trials = trials
        self._record = record
        self._watcher = watcher
        self._offload = offload

    async def before_look(self, service: Service, memory: Memory) -> None:
        """What has become of the last stack since: the service may have gone down with it."""
        if not service.settings.rollback:
            return
        glow = memory.afterglow
        if glow is not None and trio.current_time() >= glow.until:
            memory.afterglow = None
        elif glow is not None and service.went_down_since(glow.restarts):
            memory.afterglow = None
            reason = "its main process ended soon after the reload"
            await self.keep_out(service, memory, glow.stack, reason, down=True)
        await self._failed_to_start(service, memory)

    async def _failed_to_start(self, service: Service, memory: Memory) -> None:
        # Why a standalone service ended only its parent is told: short-lived programs are no failures.
        if (
            service.main is not None
            or service.starting
            or not service.failed
            or service.manager == "standalone"
        ):
            return
        trial, current = self._trials.of(service.name), self._store.accepted(service.slots)
        if trial is None or trial.was_down or current is None or current.id != trial.stack:
            return
        await self.keep_out(service, memory, current, "the service failed on it before it had proved good")

    async def reloaded(
        self,
        service: Service,
        memory: Memory,
        desired: Desired,
        converged: Converged,
        reloaded: Reloaded,
        times: Times,
    ) -> bool:
        """A stack is in place and the service was told; False: something else is wanted now."""
        name, stack = service.name, desired.stack
        memory.afterglow = None
        if desired.bad is not None:
            event = messages.rolled_back(
                name, desired.bad, stack, desired.why, reloaded, times, running=True, output=memory.output
            )
            await self._outcome(event, critical=not reloaded.ok)
            self._trials.end(name)
            return False
        rebased = _is_rebased(converged, desired)
        before = stack if rebased else _shown_before(converged, desired, self._before(service, desired))
        if reloaded.ok:
            swapped = bool(converged.swaps)
            event = messages.applied(name, before, stack, reloaded, times, swapped=swapped, rebased=rebased)
            await self._outcome(event)
            await self._proved_good(service, memory, desired)
            return True
        if not service.settings.rollback or desired.pinned or not desired.on_trial:
            self._end_as_bad(service, desired)
            await self._outcome(messages.failed(name, before, stack, reloaded, times, rebased=rebased))
            return True
        # Its reload stays owed until the way back has been judged: what is kept out for the moment only is forgotten by
        # who is killed now, and the next one has to find out again that this stack does not do.
        await self.keep_out(
            service, memory, stack, reloaded.reason + last_line(reloaded.output), reloaded.output
        )
        return False

    def _end_as_bad(self, service: Service, desired: Desired) -> None:
        """End the trial of what did not do and stays. Before the outcome: on trial it would be taken for good next."""
        if desired.on_trial and service.settings.rollout == "rolling":
            self._trials.begin(service.name, Trial(desired.stack.id, bad=True))
        else:
            self._trials.end(service.name)

    async def _outcome(self, event: Event, *, critical: bool = False) -> None:
        await self._record.outcome(event, critical=critical)
        self._pending.paid(event.service)

    async def started(self, service: Service, memory: Memory, desired: Desired, judged: Reloaded) -> bool:
        """A service was started on a stack on trial; False: something else is wanted now."""
        if judged.ok:
            journal.log.info(
                f"{service.name}: started well on {_labels(desired.stack)}", service=service.name
            )
            await self._proved_good(service, memory, desired)
            if service.manager == "standalone":
                memory.afterglow = None  # as in _failed_to_start()
            return True
        if not service.settings.rollback:
            event = messages.failed(
                service.name, self._before(service, desired), desired.stack, judged, Times()
            )
            self._end_as_bad(service, desired)
            await self._record.outcome(event)
            return True
        await self.keep_out(
            service, memory, desired.stack, judged.reason + last_line(judged.output), judged.output
        )
        return False

    async def stopped(self, service: Service, memory: Memory, desired: Desired, revived: Reloaded) -> None:
        """The slots of a service that does not run have a good stack again."""
        assert desired.bad is not None
        event = messages.rolled_back(
            service.name,
            desired.bad,
            desired.stack,
            desired.why,
            revived,
            Times(),
            running=bool(revived.told),
            output=memory.output,
        )
        await self._outcome(event, critical=not revived.ok)
        self._trials.end(service.name)

    async def keep_out(
        self,
        service: Service,
        memory: Memory,
        stack: Stack,
        reason: str,
        output: str = "",
        event: Event | None = None,
        *,
        down: bool = False,
    ) -> None:
        """Whatever is new in a stack is not to come (back) into the service.

        Args:
            output: what the command printed that the stack failed by.
            event: the outcome, if it is one already (`Outcomes.quarantine`).
            down: the service went down with it, though it may have been started again since.
        """
        memory.output = output
        # Why a standalone service ended nobody tells us; its next `exec` makes the next try by itself.
        memory.fell = service.manager != "standalone" and (down or not _runs(service))
        good = await trio.to_thread.run_sync(self._newest_good, service, stack, dict(memory.held))
        memory.held |= await self._record.quarantine(service.name, good, stack, reason, event)

    def _newest_good(self, service: Service, stack: Stack, held: dict[str, str]) -> Stack:
        kept_out = held | self._record.kept_out(service.name)
        stacks = (self._store.accepted(service.slots) or Stack(), *self._store.stacks(service.slots))
        return next((one for one in stacks if one.id != stack.id and not bad(one, kept_out)), Stack())

    def _before(self, service: Service, desired: Desired) -> Stack:
        """The newest accepted stack that is another than the wanted one."""
        if desired.current.id != desired.stack.id:
            return desired.current
        stacks = self._store.stacks(service.slots)
        return next((stack for stack in stacks if stack.id != desired.stack.id), Stack())

    async def _proved_good(self, service: Service, memory: Memory, desired: Desired) -> None:
        stack = desired.stack
        if tries.are_counted(stack):
            renaming = functools.partial(self._watcher.renaming, service.name)
            stack = await self._offload.run(
                service.name, tries.succeed, stack, service.name, renaming, service.trust
            )
        if stack != desired.stack:
            entries = [pick.entry for pick in desired.look.picks]
            await self._offload.run(service.name, self._store.accept, service.slots, stack, entries)
        if desired.on_trial:
            until = trio.current_time() + _AFTERGLOW_SEC
            memory.afterglow = Afterglow(service.restarts, until, stack)
        self._trials.end(service.name)


def _is_rebased(converged: Converged, desired: Desired) -> bool:
    """Whether the service had this very stack, and was given it anew because what lies beneath is another now."""
    if desired.on_trial or desired.current.id != desired.stack.id:
        return False
    # One that systemd made for a start on its slots, and that does not show what these would: what was done to the
    # host's /etc was done while nobody was looking.
    return converged.rebased or (converged.swaps > 0 and converged.before.layers is None)


def _shown_before(converged: Converged, desired: Desired, good: Stack) -> Stack:
    """What the service showed, in the words of the accepted stack it came from, if it is one."""
    if converged.before.layers is None:  # systemd started it on its slots
        return good
    for stack in (desired.current, good):
        if converged.before.stack == stack.id:
            return stack
    return as_stack(converged.before)


def _runs(service: Service) -> bool:
    return service.main is not None and service.main.pidfd >= 0 and service.main.alive()


def _labels(stack: Stack) -> str:
    return ", ".join(layer.label for layer in reversed(stack.layers)) or "its own /etc"
