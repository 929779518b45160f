# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the control socket's calls do: look at what is known, or change what is decided and wait for the outcome."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import BinaryIO, TypeVar

import trio

from watcher.control import status
from watcher.control.plan import plan, remarks_of
from watcher.control.server import Tell, TellWaited
from watcher.control.trace_process import Asked, Traces
from watcher.control.waits import Answers, Waits
from watcher.managers.base import Service
from watcher.model import Event, Later, Outcome, Remark, Stack, problem, shown
from watcher.mounts.process import Gone
from watcher.records import schema
from watcher.records.ledger import LedgerError
from watcher.records.schema import (
    Failed,
    NoSuchStack,
    PlannedChange,
    Quarantined,
    ServiceNotFound,
    ServiceStatus,
    Waited,
    Which,
    utf8,
)
from watcher.records.state import Quarantine, State
from watcher.rounds import candidates, dropped, messages
from watcher.rounds.answer import Answer, Kind, answer
from watcher.rounds.drift import Drift
from watcher.rounds.image_policies import demands_of
from watcher.rounds.rollout import rolling
from watcher.rounds.round import Rounds
from watcher.rounds.tools import Tools
from watcher.watch.offload import Unanswered

T = TypeVar("T")


class Commands:
    """The daemon's side of the control socket: `server.Backend`.

    Args:
        tools: what rounds work with.
        changed: asks for a round of a service.
        in_round: whether a round of a service goes on or is due.
        reload_settings: reads the settings again and looks at everything.

    Attributes:
        rounds: set by the daemon. They tell their outcomes here, so they are made after this.
    """

    rounds: Rounds
    drift: Drift

    def __init__(
        self,
        tools: Tools,
        changed: Callable[[str], None],
        in_round: Callable[[str], bool],
        reload_settings: Callable[[], None],
    ) -> None:
        self._tools = tools
        self._changed = changed
        self._reload_settings = reload_settings
        self._listeners: list[Callable[[Event], None]] = []
        self._traces = Traces()
        self._waits = Waits(self._look_at_images, in_round)

    def tell(self, event: Event) -> None:
        """Pass an outcome on to the calls that wait for one."""
        self._waits.changed(event.service)
        for listener in self._listeners:
            listener(event)

    def stepped(self, name: str) -> None:
        """A round of a service takes a step that takes time: calls that wait can say which."""
        self._waits.changed(name)

    def round_over(self, name: str) -> None:
        """A round of a service is over: more may be known of the images that calls wait for."""
        self._waits.changed(name, round_over=True)

    async def status(self, service: str | None, *, deep: bool) -> Sequence[ServiceStatus]:
        services = self._services(service)
        if deep:
            with trio.move_on_after(_DRIFT_SEC):
                await self.drift.look_now(services[0].name)
        newest = await _in_thread(self._tools.ledger.newest)
        found = await _in_thread(lambda: [self._status(one, newest) for one in services])
        told = [await self._without_gone(one) for one in found]
        return [await self._in_depth(services[0], told[0])] if deep else told

    async def _in_depth(self, service: Service, found: ServiceStatus) -> ServiceStatus:
        """With all that lies there for it, as a look finds it now."""
        try:
            with trio.fail_after(_LOOK_SEC):
                facts, desired = await self.rounds.glance(service, thorough=True)
        except (trio.TooSlowError, Unanswered, Later, OSError) as error:  # it stays on what it has
            slow = f"what lies there is not known: a look takes longer than {_LOOK_SEC} s"
            words = slow if isinstance(error, trio.TooSlowError) else problem(error)
            return replace(found, remarks=(Remark("warning", service.name, words),))
        facts = replace(facts, shown=found.stack if found.state == "running" else None)
        history = await _in_thread(self._tools.ledger.history, service.name, _LOOKED_BACK)
        entries = candidates.entries(service, facts, desired, history)
        return replace(found, entries=entries, remarks=tuple(remarks_of(desired)))

    async def _without_gone(self, found: ServiceStatus) -> ServiceStatus:
        if not status.about(found):
            return found
        history = functools.partial(self._tools.ledger.history, found.service, status.LOOKED_BACK)
        try:
            return await self._tools.offload.run(found.service, status.without_gone, found, history)
        except (Unanswered, LedgerError):
            return found  # it cannot be seen, which is not gone

    async def history(self, service: str | None, limit: int, which: Which) -> Sequence[Event]:
        unknown = None
        if service is not None:
            try:
                service = self._service(service).name
            except ServiceNotFound as error:
                unknown = error  # it may have been one
        events: Sequence[Event] = await _in_thread(self._tools.ledger.history, service, limit, which)
        if unknown is not None and not events:
            raise unknown
        return events

    async def plan(self, service: str | None, *, debug: bool, check: bool) -> Sequence[PlannedChange]:
        return [
            await plan(self.rounds, one, await _in_thread(self._status, one, {}), debug=debug, check=check)
            for one in self._services(service)
        ]

    async def wait(self, service: str, image: str, tell: TellWaited, waits: Callable[[], None]) -> Waited:
        name = self._service(service).name

        async def told(known: Answer) -> None:
            await tell(_waited(known))

        await told(Answer(Kind.LOOKING, messages.event(name, Outcome.UNCHANGED, f"looks at {shown(image)}")))
        return _waited(await self._waits.answer(name, image, told, waits))

    async def rollback(self, service: str, to: str | None, by: str, tell: Tell) -> Event:
        found = self._service(service)
        name, store = found.name, self._tools.store
        before = await _in_thread(store.state, found.slots)
        stacks = await _in_thread(store.stacks, found.slots)
        target = _target(name, stacks, to, before)
        asked = messages.rollback_requested(name, before.accepted.stack, target, by)
        await self.rounds.record(asked)
        await tell(asked)
        left = _left(before, stacks, target)
        await self._decide(found, lambda state: replace(state, pin=target.id, left=left))
        done = [event for event in await self._next_round(name) if event.stack in (target.id, "")]
        if (await _in_thread(store.state, found.slots)).accepted.stack.id != target.id:
            # It must not go there one day, when nobody expects that any more.
            with suppress(Failed):
                await self._decide(found, lambda state: replace(state, pin=before.pin, left=before.left))
            self._changed(name)
            stays = messages.labels(before.accepted.stack)
            raise Failed(f"not done, {shown(name)} stays on {stays}: the log says why")
        return done[-1] if done else await self._without_outcome(name, target)

    async def _decide(self, service: Service, change: Callable[[State], State]) -> None:
        """Change what is decided about a service. Raises Failed: it could not be written down, and does not hold."""
        before = await _in_thread(self._tools.store.state, service.slots)
        try:
            await trio.to_thread.run_sync(self._tools.store.change, service.slots, change)
        except Later as error:
            with suppress(Later):  # nor does it hold in memory then
                await trio.to_thread.run_sync(
                    self._tools.store.change,
                    service.slots,
                    lambda state: replace(state, pin=before.pin, left=before.left),
                )
            cause = error.__cause__
            why = cause.strerror if isinstance(cause, OSError) else str(error)
            raise Failed(f"not done, it cannot be written down: {why}")

    async def _next_round(self, name: str) -> list[Event]:
        """Ask for a round of a service. Returns the outcomes of what it did."""
        events: list[Event] = []
        over = self.rounds.next_round(name)
        self._changed(name)
        self._listeners.append(events.append)
        try:
            await over.wait()
        finally:
            self._listeners.remove(events.append)
        return [event for event in events if event.service == name and event.outcome in _DONE]

    async def _without_outcome(self, name: str, target: Stack) -> Event:
        """What to say of a round without an outcome: there was nothing to do, or it has said before why it cannot."""
        now = await _in_thread(self._status, self._service(name), {})
        if now.stack == target.id or now.pid is None:
            sentence = "is on that stack already, and stays on it until `rollback --forget`"
            return messages.event(name, Outcome.UNCHANGED, sentence, stack=target.id)
        sentence = "gets that stack at its next start, but could not be given it yet: the log says why"
        return messages.event(name, Outcome.FAILED, sentence, stack=target.id)

    async def forget(self, service: str, digest: str | None, by: str) -> Sequence[Quarantined]:
        found = self._service(service)
        forgotten: list[Quarantine] = []

        def change(state: State) -> State:
            """Anything that is kept out for the moment may be tried again, too."""
            forgotten[:] = [
                one for one in state.quarantine if not one.for_now and digest in (None, one.digest)
            ]
            stays = [one for one in state.quarantine if not one.for_now and one not in forgotten]
            state = replace(state, quarantine=tuple(stays))
            if digest is not None:
                return state
            undoing = state.undoing
            if undoing is not None and undoing.stack.id == state.accepted.stack.id:
                undoing = None  # it is let in before it was taken out
            return replace(state, pin=None, left=(), undoing=undoing)

        await self.rounds.record(messages.forget_requested(found.name, by))
        failed = None
        try:
            await trio.to_thread.run_sync(self._tools.store.change, found.slots, change)
        except Later as error:  # it holds in memory all the same
            failed = error
        self._changed(found.name)
        if found.settings.rollout == "rolling":
            # Its quarantine kept that out of the other services, too.
            for other in rolling(self._tools):
                self._changed(other.name)
        if failed:
            raise Failed(
                f"could not be written down, so it may not have happened yet; it is tried again: {failed}"
            )
        return status.quarantined(found.name, forgotten)

    async def trace(self, asked: Asked) -> BinaryIO:
        return await self._traces.look(self._tools.settings, asked)

    async def reload(self) -> None:
        self._reload_settings()

    def _services(self, service: str | None) -> list[Service]:
        if service is not None:
            return [self._service(service)]
        services = self._tools.manager.services
        return [services[name] for name in sorted(services)]

    def _service(self, name: str) -> Service:
        for service in self._tools.manager.services.values():
            if name in (utf8(service.name), *map(utf8, service.aliases)):
                return service
        if "." not in name:  # as systemctl has it
            with suppress(ServiceNotFound):
                return self._service(f"{name}.service")
        raise ServiceNotFound.among(name, self._tools.manager.services)

    def _status(self, service: Service, newest: dict[str, Event]) -> ServiceStatus:
        tools = self._tools
        with ExitStack() as held:
            main = None
            with suppress(Gone):
                main = held.enter_context(service.main.hold()) if service.main is not None else None
            state, memory = tools.store.state(service.slots), self.rounds.memories.get(service.name)
            found = status.of_service(
                tools.store.state_directory,
                service.name,
                service.manager,
                main,
                newest.get(utf8(service.name)),
                state,
                tools.ledger.placed,
                service.settings,
                service.invocation,
                demands_of(tools.settings, service),
            )
        if memory is None:  # no round has looked at it yet
            return found
        since = memory.step_since if memory.step else None
        newer = candidates.newer(service, state, memory.passed)
        return replace(found, newer=newer, step=memory.step, step_since=since)

    async def _look_at_images(self, name: str, images: Collection[str]) -> Answers:
        """The answers for images of a service, as things are now."""
        service = self._tools.manager.services.get(name)
        if service is None:
            raise ServiceNotFound.among(name, self._tools.manager.services)
        try:
            facts, desired = await self.rounds.glance(service, thorough=True)
            find = functools.partial(dropped.dropped, desired=desired, declared=service.declared)
            found = await self._tools.offload.run(name, lambda: [find(image) for image in images])
        except (Unanswered, Later, OSError) as error:
            stuck = messages.event(name, Outcome.UNCHANGED, f"cannot be looked at: {problem(error)}")
            return dict.fromkeys(images, Answer(Kind.WAITING, stuck))
        now = await _in_thread(self._status, service, {})
        facts = replace(facts, shown=now.stack if now.state == "running" else None)
        # After the facts: an outcome is in the history before the state says that nothing is left to do.
        history = await _in_thread(self._tools.ledger.history, service.name, _LOOKED_BACK)
        return {image: answer(name, facts, one, history) for image, one in zip(images, found, strict=True)}


# Outcomes of what a round has done. The others only say what it found.
_DONE = (Outcome.APPLIED, Outcome.FAILED, Outcome.ROLLED_BACK, Outcome.NEEDS_RESTART)

_LOOK_SEC = 5
"""For so long `status` waits for a look. It is asked when something hangs, too."""

_DRIFT_SEC = 1
"""For so long it waits for a look at the host's files below those of images."""

_LOOKED_BACK = 100
"""Outcomes among which that is which an answer is the end of."""


def _target(service: str, stacks: Sequence[Stack], to: str | None, state: State) -> Stack:
    """The stack to go back to: the one that `to` names, or the newest before the current one that did not prove bad,
    and that was not left by a rollback.

    Args:
        to: how the identity of the stack begins, None for the newest before.

    Raises:
        NoSuchStack: there is none, or more than one begins so.
    """
    if to is None:
        others = (stack for stack in stacks[1:] if stack.id not in state.left)
        before = next((stack for stack in others if not state.why_bad(stack)), None)
        if before is None:
            raise NoSuchStack(service, "")
        return before
    found = [stack for stack in stacks if to and stack.id.startswith(to)]
    if len(found) != 1:
        raise NoSuchStack(service, to)
    return found[0]


def _left(before: State, stacks: Sequence[Stack], target: Stack) -> tuple[str, ...]:
    """`State.left` once the service is on another stack, which is one of these, newest first."""
    if target.id in before.left:
        return before.left[: before.left.index(target.id)]
    newer = [stack.id for stack in stacks]
    return tuple(dict.fromkeys((*before.left, *newer[: newer.index(target.id)])))


def _waited(known: Answer) -> Waited:
    kind, event = known.kind, known.event
    return Waited(event, schema.Answer(kind.word, int(kind.status), known.text, known.command))


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run what blocks in a thread. Raises Failed if the ledger or a record cannot be read."""
    try:
        return await trio.to_thread.run_sync(function, *arguments)
    except (LedgerError, Later) as error:
        raise Failed(str(error))
