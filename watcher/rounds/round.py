# SPDX-License-Identifier: LGPL-2.1-or-later
"""A round of one service: observe, decide, take one step, and again, until nothing is left to do.

A round starts from what is on disk now and what is mounted now. It can do without what the last round remembered: after
a lost event, a crash, a restart of the service or of the watcher, another round comes to the same end. A rollback is
such a round, too: a bad stack goes into the quarantine, and the next look wants the best stack that is left.
"""

from __future__ import annotations

import enum
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from watcher.managers.base import NoShadow, Service
from watcher.model import Event, Later, Refused, problem
from watcher.mounts.etc import Moved
from watcher.mounts.process import Elsewhere, Gone
from watcher.mounts.whereabouts import WorkerLost
from watcher.mounts.workers import Hung
from watcher.records.together import Gathering
from watcher.rounds import decide, looks, messages
from watcher.rounds.decide import Step
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Facts
from watcher.rounds.memory import Memory, Round
from watcher.rounds.observe import Observer
from watcher.rounds.outcomes import Outcomes, say
from watcher.rounds.rollout import Rollout
from watcher.rounds.steps import Steps
from watcher.rounds.tools import Tools, holding
from watcher.rounds.verdicts import Verdicts
from watcher.watch.offload import Unanswered

# Seconds until another look where no event says when: a writer that uses another name of the file, a loop device that
# becomes free. Doubled each time, up to the second figure.
_AGAIN = 0.25
_AGAIN_MAX = 30.0
# Where a clock says when: not sooner than this, in seconds.
_AGAIN_MIN = 0.01

_FAULTS = (Elsewhere, Moved, Hung, WorkerLost, Refused, OSError)

# Seconds after which a swap, which may hang too, gets a job of its own.
_LONG_SEC = 1.0

# What takes time, by its name in `ServiceStatus.step`.
_STEP_NAMES: dict[type[object], str] = {
    decide.Check: "check",
    decide.Reload: "reload",
    decide.Watch: "watch",
    decide.TryStart: "start",
    decide.Revive: "start",
}

# A round takes about ten steps, and some more for each content that proves bad.
_STEPS_MAX = 1000


class Need(enum.Enum):
    """What the event loop has to do before the next step can be taken in a thread."""

    WATCH = enum.auto()
    LEARN = enum.auto()
    TURN = enum.auto()
    JOB = enum.auto()


class Rounds:
    """Rounds for services: one at a time for each, any number of services side by side.

    Args:
        tools: what rounds work with.
        told: called with every outcome, after it was recorded.
        changed: asks for a round of a service.
        accepted: called when the slots of a service are what its next start should get, long before its round is over.
        stepped: called before each step that waits for what the service does.
    """

    def __init__(
        self,
        tools: Tools,
        told: Callable[[Event], None] = lambda event: None,
        changed: Callable[[str], None] = lambda name: None,
        accepted: Callable[[str], None] = lambda name: None,
        stepped: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._tools = tools
        self._accepted = accepted
        self._stepped = stepped
        self._memories: dict[str, Memory] = {}
        self._awaited: dict[str, list[trio.Event]] = {}
        self._outcomes = Outcomes(tools.ledger, tools.store.settle, told)
        self._rollout = Rollout(changed, tools)
        self._observer = Observer(tools, self._outcomes, self._rollout, self._memories)
        self._steps_of = Steps(tools)
        self._verdicts = Verdicts(tools, self._outcomes)

    @property
    def memories(self) -> Mapping[str, Memory]:
        """What is remembered of each service."""
        return self._memories

    @property
    def mounted(self) -> frozenset[str] | None:
        """Digests of all that services run on, and of what waits for them; None while those of one are not known."""
        known: set[str] = set()
        for memory in self._memories.values():
            if memory.mounted is None:
                return None
            known |= memory.mounted | memory.at_hand
        return frozenset(known)

    @property
    def worn(self) -> frozenset[str]:
        """Digests of which a service may still show a damaged copy that there is a new one of."""
        known: set[str] = set()
        for memory in self._memories.values():
            since = max(memory.placed, memory.started[1])
            mounted = memory.mounted or frozenset()
            known |= memory.clings
            known |= {one for one in mounted if self._tools.store.whole.replaced_since([one], since)}
        return frozenset(known)

    def forget(self, name: str) -> None:
        """The service takes no part any more; its slots stay."""
        self._memories.pop(name, None)
        self._outcomes.forget(name)
        self._rollout.end(name, rolling=False)
        self._tools.watcher.drop(name)

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
            # What is removed was said, so its manager may let go of the service: then this is asked for again.
            service = await tools.manager.current(name) or tools.manager.services.get(name)
            if (service is not None and service.slots == slots) or (slots == name and not units):
                continue
            await trio.to_thread.run_sync(tools.store.forget, slots)

    async def record(self, event: Event) -> None:
        """Write down an outcome that is none of a round's."""
        await self._outcomes.outcome(event)

    def next_round(self, name: str) -> trio.Event:
        """An event, set at the end of the first round that begins after this call. The caller asks for that."""
        over = trio.Event()
        self._awaited.setdefault(name, []).append(over)
        return over

    async def glance(self, service: Service, *, thorough: bool = False) -> tuple[Facts, Desired]:
        """What a round would find now, without doing anything about it. `thorough`: see `Given`."""
        async with self._observer.using_store():
            return await self._observer.glance(service, thorough=thorough)

    async def try_check(self, service: Service) -> str:
        """What `Check=` says of the stack that the service should have now: a reason, or "" if it passed.

        Raises:
            Later: it could not be run.
        """
        async with self._observer.using_store():
            facts, _ = await self._observer.glance(service)
            try:
                ended = await self._steps_of.run_check(service, facts, facts.target)
            except (NoShadow, Gone, Unanswered, *_FAULTS) as error:
                raise Later(problem(error)) from error
            return ended.reason

    async def round(self, service: Service, since: float, looks_from: float | None = None) -> float | None:
        """One round.

        Args:
            since: when the change was noticed, `trio.current_time()`.
            looks_from: see `Round`; None: a look of its own, or of another that begins from now on.

        Returns:
            Seconds after which to look again even if nothing happens; None: there is no need.
        """
        awaited = self._awaited.pop(service.name, ())
        try:
            again = await self._round(service, since, looks.now() if looks_from is None else looks_from)
            wait = "nothing left to wait for" if again is None else f"again in {again:g} s"
            say("debug", service.name, f"round over: {wait}")
            return again
        finally:
            for over in awaited:
                over.set()

    async def _round(self, service: Service, since: float, looks_from: float) -> float | None:
        # A drop-in that does not fit new slots fails the start, and systemd starts the unit once we are ready.
        renewed = service.slots in self._tools.renewed
        memory = self._memories.setdefault(service.name, Memory(unlearned=renewed))
        busy = True
        try:
            busy = await self._steps(service, memory, since, looks_from)
            self._outcomes.came_through(service.name)
        except Gone as gone:
            say("debug", service.name, f"{gone}: its manager will say so")
            return None  # its next start asks for a round
        except Elsewhere as error:
            memory.mounted = frozenset()
            await self._outcomes.needs_restart(service.name, service.invocation, str(error))
            return None
        except Unanswered as error:
            await self._outcomes.not_placed(service.name, error)
            return None if error.returns else _AGAIN_MAX
        except (Later, *_FAULTS) as error:
            await self._outcomes.not_placed(service.name, error)
            if not memory.attempts:
                with suppress(Later):  # the next look reads the copies again that the service is to have
                    doubt = self._tools.store.doubt
                    await trio.to_thread.run_sync(doubt, service.slots, abandon_on_cancel=True)
        memory.attempts = memory.attempts + 1 if busy else 0
        backoff = min(_AGAIN * 2 ** (memory.attempts - 1), _AGAIN_MAX) if busy else None
        if memory.look_again is None:
            return backoff
        return max(min(memory.look_again, backoff or memory.look_again), _AGAIN_MIN)

    async def _steps(self, service: Service, memory: Memory, since: float, looks_from: float) -> bool:
        """Observe, decide, take the step, until nothing is left to do. True: a file is still being written."""
        looked_at = _nothing if memory.seen else self._looked_at(service)
        rolling = service.settings.rollout == "rolling"
        self._rollout.begin(service.name)
        try:
            async with self._observer.using_store():
                noticed = time.monotonic() - (trio.current_time() - since)
                this = Round(noticed, messages.now(), first=not memory.seen, looks_from=looks_from)
                memory.no_shadow = ""
                await self._observer.prepare(service, memory, this)
                for _ in range(_STEPS_MAX):
                    # The manager lets go of a process that it sees end: what becomes of it is still to be judged.
                    with holding(service) as held:
                        if not await self._turn(held, memory, this, looked_at):
                            self._tools.manager.hold_start(service, this.facts.start_on_trial)
                            return this.facts.busy
                    service = self._tools.manager.services.get(service.name, service)
        finally:
            self._rollout.end(service.name, rolling=rolling)
        raise _endless(service, this)

    async def _turn(
        self, service: Service, memory: Memory, this: Round, looked_at: Callable[[], None]
    ) -> bool:
        """All that a thread can do, then one step that waits. False: the round is over."""
        work = functools.partial(self._work, self._observer.siblings(service), memory, this, looked_at)
        try:
            this.in_reach = False
            found = await self._tools.in_turn(service, work, lambda: this.recording)
        except BaseException:
            this.over = True
            raise
        finally:
            await self._outcomes.record_found(service.name)
        match found:
            case Need.WATCH:
                await self._observer.watch(service, memory, this)
            case Need.LEARN:
                memory.unlearned = False  # where that fails, the manager tries it again
                await self._tools.manager.learn(service)
            case Need.TURN:
                this.waits = self._rollout.claim(service.name, await self._rollout.bid(service, this.facts))
            case Need.JOB:
                pass
            case _:
                return await self._take(found, service, memory, this)
        return True

    def _work(
        self,
        siblings: Sequence[Service],
        memory: Memory,
        this: Round,
        looked_at: Callable[[], None],
        service: Service,
    ) -> Gathering[Step | Need]:
        """In a thread: take all steps that need nothing but disk and kernel; then the one that waits for more."""
        begun = time.monotonic()
        for _ in range(_STEPS_MAX):
            if memory.unlearned:
                return Need.LEARN
            looked = self._observer.look(service, siblings, memory, this)
            if this.over:
                raise Later("what took so long has come to its end, and nobody waits for it any more")
            if not looked:
                return Need.WATCH
            this.facts = facts = self._observer.observe(service, memory, this)
            if facts.bids and this.waits is None:
                return Need.TURN
            memory.seen = True
            step = decide.decide(facts)
            if not facts.reachable:
                memory.mounted = frozenset()
            elif facts.has_nothing_whole:  # what is damaged is not mounted again, not even to compare it
                memory.mounted = frozenset(facts.accepted.digests)
            if not isinstance(step, decide.UNSETTLED):
                looked_at()
            if isinstance(step, decide.Swap) and time.monotonic() - begun > _LONG_SEC:
                return Need.JOB
            if not (yield from self._do(step, service, memory, this)):
                return step
            this.first, this.waits = False, None
        raise _endless(service, this)

    def _do(self, step: Step, service: Service, memory: Memory, this: Round) -> Gathering[bool]:
        """Take a step that needs nothing but disk and kernel. False: it is none, or not all of it is done."""
        steps, facts = self._steps_of, this.facts
        match step:
            case decide.LetIn():
                steps.let_in(step, service, this)
            case decide.Count():
                steps.count(service, facts, this)
            case decide.Accept():
                yield from steps.accept(step, service, facts, memory, this)
            case decide.Swap():
                steps.swap(service, facts, memory, this)
                self._outcomes.placed(service.name)
            case decide.Reload():
                steps.tell(service, this)
                return steps.judge(service, facts, this)
            case decide.Good():
                yield from self._verdicts.good(service, facts, this)
            case _:
                return False
        return True

    def _looked_at(self, service: Service) -> Callable[[], None]:
        """Says, from a thread, that the slots of a service are what its next start should get."""
        token = trio.lowlevel.current_trio_token()

        def looked_at() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._accepted, service.name)

        return looked_at

    async def _take(self, step: Step, service: Service, memory: Memory, this: Round) -> bool:
        """Take a step that waits for the service, or writes down an outcome. False: the round is over."""
        this.first, this.waits = False, None
        memory.step, memory.step_since = _STEP_NAMES.get(type(step), ""), messages.now()
        if memory.step:
            self._stepped(service.name)
        try:
            return await self._taken(step, service, memory, this)
        finally:
            memory.step = ""

    async def _taken(self, step: Step, service: Service, memory: Memory, this: Round) -> bool:
        steps, verdicts, facts = self._steps_of, self._verdicts, this.facts
        match step:
            case decide.Done() as done:
                if done.why:
                    say("debug", service.name, f"waits: {done.why}")
                return False
            case decide.Check():
                await steps.check(step, service, facts, memory, this)
            case decide.TryStart():
                await steps.try_start(service, facts, this)
            case decide.SayAccepted():
                await verdicts.say_accepted(service, facts, this)
                self._outcomes.placed(service.name)
            case decide.NeedsRestart():
                await verdicts.needs_restart(service, facts)
                return False
            case decide.Reload():
                return await steps.reload(service, facts, this)
            case decide.Watch():
                return await steps.watch(service, facts, this)
            case decide.Revive():
                await steps.revive(service, facts, this)
            case decide.Keep():
                await verdicts.keep(service, facts, this)
            case decide.Reject():
                await verdicts.reject(step, service, facts, this)
            case decide.Undone():
                await verdicts.undone(service, facts, this)
        return True


def _endless(service: Service, this: Round) -> AssertionError:
    return AssertionError(f"{service.name}: its round does not come to an end: {this.facts}")


def _nothing() -> None: ...
