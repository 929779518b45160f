# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of a stack that was put in place: it proved good, it is kept out from now on, or it stays as it is.

`keep_out()` puts a stack that proves bad into the quarantine, and does nothing else. The next look (`desired.py`) finds
that the accepted stack is bad, and desires the newest accepted one that is not. The same round swaps that in. Only a
stack on trial, or in its afterglow, can prove bad. If the way back fails too, the watcher says so and tries no more.

The watcher writes down that a stack proved good, or that another is back in its place, in this order: the outcome, then
that no reload is owed, then that the trial is over. If it is killed in between, the next round may record the same
outcome twice. In another order that round would reload for a stack that was judged already, and record another outcome.
"""

from __future__ import annotations

import functools
import time

import trio

from watcher.images import tries
from watcher.managers.base import Reloaded, Service
from watcher.managers.command import last_line
from watcher.model import Event, Stack
from watcher.mounts.converge import Converged, as_stack
from watcher.rounds import messages
from watcher.rounds.desired import Desired, why_bad
from watcher.rounds.messages import Times
from watcher.rounds.outcomes import Outcomes, say
from watcher.rounds.state import Afterglow, Memory, Next, Trial
from watcher.rounds.tools import Tools

# If the main process ends within so many seconds after a good verdict, the stack is to blame. No round waits for that.
_AFTERGLOW_SEC = 1.0


class Rollback:
    """Verdicts, and what follows from them."""

    def __init__(self, tools: Tools, outcomes: Outcomes) -> None:
        self._store = tools.store
        self._pending = tools.pending
        self._trials = tools.trials
        self._watcher = tools.watcher
        self._offload = tools.offload
        self._outcomes = outcomes

    # --- before a look ---

    async def notice_failure(self, service: Service, memory: Memory) -> None:
        """If the service has gone down with its last stack since the last round, keep that out."""
        await self._look_at_copies(service, memory)
        if memory.blameless or not service.settings.rollback:
            return
        glow = memory.afterglow
        if glow is not None and trio.current_time() >= glow.until:
            memory.afterglow = None
        elif glow is not None and service.went_down_since(glow.restarts):
            memory.afterglow = None
            reason = "its main process ended soon after the reload"
            await self.keep_out(service, memory, glow.stack, reason, down=True)
        await self._notice_failed_start(service, memory)

    async def _look_at_copies(self, service: Service, memory: Memory) -> None:
        """If a service went down with a damaged copy, its configuration is not to blame."""
        if service.main is not None:
            memory.ran = time.monotonic()
        if service.main is not None or not service.failed:
            memory.blameless = None
        elif memory.blameless is None:
            damaged = functools.partial(self._store.was_damaged, service.slots, memory.ran)
            memory.blameless = await trio.to_thread.run_sync(damaged, abandon_on_cancel=True)
            if memory.blameless:
                memory.afterglow = None

    async def _notice_failed_start(self, service: Service, memory: Memory) -> None:
        down = service.main is None and service.failed and not service.starting
        if not down or not _says_why_it_ended(service):
            return
        trial, current = self._trials.of(service.name), self._store.accepted(service.slots)
        if trial is None or trial.was_down or current is None or current.id != trial.stack:
            return
        await self.keep_out(service, memory, current, "the service failed on it before it had proved good")

    # --- verdicts ---

    async def after_reload(
        self,
        service: Service,
        memory: Memory,
        desired: Desired,
        converged: Converged,
        reloaded: Reloaded,
        times: Times,
    ) -> Next:
        """Record the verdict on a stack that is in place; the service was asked to reload."""
        name, stack = service.name, desired.stack
        memory.afterglow = None
        say("debug", name, _verdict(reloaded))
        if desired.bad is not None:
            return await self._rolled_back(service, memory, desired, reloaded, times, running=True)
        rebased = _is_rebased(converged, desired)
        before = stack if rebased else _shown_before(converged, desired, self._before(service, desired))
        if reloaded.ok:
            swapped = bool(converged.swaps)
            event = messages.applied(name, before, stack, reloaded, times, swapped=swapped, rebased=rebased)
            await self._outcome(event)
            await self._proved_good(service, memory, desired)
            return Next.DONE
        if not service.settings.rollback or desired.pinned or not desired.on_trial:
            self._stays_though_bad(service, desired)
            await self._outcome(messages.failed(name, before, stack, reloaded, times, rebased=rebased))
            return Next.DONE
        # The reload stays owed until the way back was judged. `Memory` alone keeps out what has tries left: if the
        # watcher is killed now, the next one reloads again, and finds out again that this stack is bad.
        reason = reloaded.reason + last_line(reloaded.output)
        await self.keep_out(service, memory, stack, reason, reloaded.output)
        return Next.LOOK_AGAIN

    async def after_start(self, service: Service, memory: Memory, desired: Desired, judged: Reloaded) -> Next:
        """Record the verdict on a stack on trial, which the service was started on."""
        say("debug", service.name, _verdict(judged))
        if judged.ok:
            say("info", service.name, f"started well on {messages.labels(desired.stack)}")
            await self._proved_good(service, memory, desired)
            if not _says_why_it_ended(service):
                memory.afterglow = None
            return Next.DONE
        if not service.settings.rollback:
            before = self._before(service, desired)
            self._stays_though_bad(service, desired)
            await self._outcomes.outcome(
                messages.failed(service.name, before, desired.stack, judged, Times())
            )
            return Next.DONE
        reason = judged.reason + last_line(judged.output)
        await self.keep_out(service, memory, desired.stack, reason, judged.output)
        return Next.LOOK_AGAIN

    async def after_revival(
        self, service: Service, memory: Memory, desired: Desired, revived: Reloaded
    ) -> Next:
        """The slots of a stopped service have a good stack again. If it had gone down, it was started on that."""
        running = bool(revived.told)
        return await self._rolled_back(service, memory, desired, revived, Times(), running=running)

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
        """Keep whatever is new in a stack out of the service from now on.

        Args:
            output: what the command printed that failed.
            event: the outcome, where no way back follows: the check failed, so the service never had the stack.
            down: the service went down with it, though it may have been started again since.
        """
        say("debug", service.name, f"kept out: {messages.labels(stack)}: {reason}")
        memory.output = output
        # A standalone service never `fell`, so its next `exec` makes the next try.
        memory.fell = _says_why_it_ended(service) and (down or not _runs(service))
        good = await trio.to_thread.run_sync(self._newest_good, service, stack, dict(memory.held))
        memory.held |= await self._outcomes.quarantine(service.name, good, stack, reason, event)

    # --- parts ---

    async def _rolled_back(
        self,
        service: Service,
        memory: Memory,
        desired: Desired,
        reloaded: Reloaded,
        times: Times,
        *,
        running: bool,
    ) -> Next:
        assert desired.bad is not None
        event = messages.rolled_back(
            service.name,
            desired.bad,
            desired.stack,
            desired.why,
            reloaded,
            times,
            running=running,
            output=memory.output,
        )
        await self._outcome(event, critical=not reloaded.ok)
        self._trials.end(service.name)
        return Next.LOOK_AGAIN

    async def _outcome(self, event: Event, *, critical: bool = False) -> None:
        await self._outcomes.outcome(event, critical=critical)
        self._pending.paid(event.service)

    def _stays_though_bad(self, service: Service, desired: Desired) -> None:
        """End its trial, before the outcome: if the watcher is killed then, the next round must not judge it good."""
        if desired.on_trial and service.settings.rollout == "rolling":
            self._trials.begin(service.name, Trial(desired.stack.id, bad=True))
        else:
            self._trials.end(service.name)

    def _newest_good(self, service: Service, stack: Stack, held: dict[str, str]) -> Stack:
        kept_out = held | self._outcomes.kept_out(service.name)
        stacks = (self._store.accepted(service.slots) or Stack(), *self._store.stacks(service.slots))
        return next((one for one in stacks if one.id != stack.id and not why_bad(one, kept_out)), Stack())

    def _before(self, service: Service, desired: Desired) -> Stack:
        """The newest accepted stack that is not the desired one."""
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
    """Whether the service had this very stack, and got it anew because the `/etc` beneath it has changed."""
    if desired.on_trial or desired.current.id != desired.stack.id:
        return False
    # systemd mounted it at the start of the service, from these slots. It shows something else now, so the host's /etc
    # was changed while no watcher ran.
    return converged.rebased or (converged.swaps > 0 and converged.before.layers is None)


def _shown_before(converged: Converged, desired: Desired, good: Stack) -> Stack:
    """What the service showed, in the words of the accepted stack it came from, if it is one."""
    if converged.before.layers is None:  # systemd started it on its slots
        return good
    for stack in (desired.current, good):
        if converged.before.stack == stack.id:
            return stack
    return as_stack(converged.before)


def _says_why_it_ended(service: Service) -> bool:
    """Not a standalone one: the kernel tells only its parent. That it ends is no failure, it may be short-lived."""
    return service.manager != "standalone"


def _runs(service: Service) -> bool:
    return service.main is not None and service.main.pidfd >= 0 and service.main.alive()


def _verdict(judged: Reloaded) -> str:
    return "judged good" if judged.ok else f"judged bad: {judged.reason}"
