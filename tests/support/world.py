# SPDX-License-Identifier: LGPL-2.1-or-later
"""A world in which rounds are made: dropped files, services, records, and a watcher that may be killed at any moment.

The rounds, the decisions and the records' changes are the real ones (`watcher/rounds/`). What they have an effect on is
plain data here. Each effect comes between two ticks: at a tick the watcher may be killed, or anything else happen that
was planned for it. What is not persisted is lost with the watcher.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import trio

from support.world_things import ENTRIES, File, Main, Records, Unit
from watcher.images import tries
from watcher.images.made_for import Host
from watcher.managers.base import Ended, Reloaded, Service
from watcher.model import (
    Busy,
    Candidate,
    Copy,
    Declared,
    Entry,
    Event,
    Kind,
    Look,
    Picks,
    Stack,
    Trust,
    Verdict,
)
from watcher.mounts.converge import Converged
from watcher.mounts.process import Gone, namespace_id
from watcher.mounts.workers import HostNamespace
from watcher.records import journal
from watcher.records.state import State
from watcher.records.together import alone
from watcher.resolve import scan
from watcher.rounds import exec_service, messages, observe, retry, rollout, steps, verdicts
from watcher.rounds import round as rounds
from watcher.rounds.desired import Given, find
from watcher.rounds.facts import Facts, Judged
from watcher.rounds.judge import Asked
from watcher.rounds.patience import Removals
from watcher.settings.config import Settings

_ANY = Host({}, "x86-64")
_HOST = namespace_id("/dev/null")
_STEPS_MAX = 60
_ROUNDS_MAX = 300


class Killed(BaseException):
    """The process ends here."""


class World:
    """Files, services and a watcher; a context manager."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit.name: unit for unit in units}
        self.files: list[File] = []
        self.fates: dict[str, str] = {}
        self.events: list[Event] = []
        self.proved_bad: set[tuple[str, str]] = set()
        self.store = Records(self.tick, self._tried, self._kept_out)
        self.clock = 10**9
        self.changed: dict[File, int] = {}
        self.host_changed = 0
        self.up = True
        self.dirty: set[str] = set()
        self.planned: list[tuple[int, Callable[[], None]]] = []
        self._patches = contextlib.ExitStack()
        self._acting = False
        self._in_thread = False

    # --- time ---

    def tick(self) -> None:
        """Between two effects."""
        self.clock += 1
        if self._acting:
            return
        due = [action for left, action in self.planned if left <= 1]
        self.planned = [(left - 1, action) for left, action in self.planned if left > 1]
        for action in due:
            self.act(action)

    def act(self, action: Callable[[], None]) -> None:
        """Nothing else happens meanwhile."""
        self._acting = True
        try:
            action()
        finally:
            self._acting = False

    def kill(self) -> None:
        raise Killed

    def boot_watcher(self) -> None:
        """A new watcher: what was only remembered is gone."""
        self.up = True
        # A verdict that was not recorded is lost: the stack is judged again, unless another takes its place before.
        kept_out = {
            (slots, one.id)
            for slots, stacks in self.store.ever.items()
            for one in stacks.values()
            if self.store.state(slots).why_bad(one)
        }
        self.proved_bad &= kept_out
        self.dirty = set(self.units)
        self.rounds = rounds.Rounds(self._tools, changed=self.dirty.add)

    def work(self) -> None:
        """Rounds, until there is nothing left to do."""
        trio.run(self._work)

    async def _work(self) -> None:
        for _ in range(_ROUNDS_MAX):
            self._end_doomed()
            self._end_starts()
            if not self.up or not self.dirty:
                return
            name = min(self.dirty)
            self.dirty.discard(name)
            try:
                if await self.rounds.round(self.units[name].service, 0.0) is not None:
                    self.dirty.add(name)
            except Killed:
                self.boot_watcher()
        raise AssertionError("the watcher never comes to rest")

    def _end_doomed(self) -> None:
        for unit in self.units.values() if not self.dirty or not self.up else ():
            if unit.doomed is not None:
                self.clock = max(self.clock, unit.doomed)
                self.act(functools.partial(self.crash, unit))

    def _end_starts(self) -> None:
        """What a manager starts by itself runs once the watcher has looked at it."""
        for unit in self.units.values() if not self.dirty or not self.up else ():
            if unit.to_start or (unit.starting and unit.restarts):
                self.end_start(unit)

    def end_start(self, unit: Unit) -> None:
        """However long it takes."""
        self.act(functools.partial(self._start_again if unit.to_start else self.started, unit))

    # --- what an operator, a manager and the world do ---

    def start(self, unit: Unit, restarts: int = 0, *, slowly: bool = False) -> None:
        stack = self._exec(unit) if unit.manager == "standalone" else self.accepted(unit)
        unit.failed, unit.restarts, unit.to_start = False, restarts, False
        unit.shown = Stack() if unit.host else stack
        unit.starting = True
        self.dirty.add(unit.name)
        if not slowly:
            self.started(unit)

    def started(self, unit: Unit) -> None:
        """It was systemd's executor until now."""
        if unit.starting:
            unit.starts += 1
            unit.alive, unit.starting = True, False
            self._read(unit)

    def stop(self, unit: Unit) -> None:
        unit.alive, unit.starting, unit.doomed, unit.to_start = False, False, None, False
        unit.failed = unit.manager == "standalone"
        self.dirty.add(unit.name)

    def crash(self, unit: Unit) -> None:
        unit.alive, unit.starting, unit.failed, unit.doomed = False, False, True, None
        self.dirty.add(unit.name)
        if unit.manager == "systemd" and unit.restarting and unit.restarts < unit.restarts_max:
            if not unit.slowly:
                self.start(unit, unit.restarts + 1)
                return
            unit.to_start = True
            self.planned.append((unit.slowly, functools.partial(self._start_again, unit)))

    def _start_again(self, unit: Unit) -> None:
        """As `RestartSec=` and systemd's executor take their time."""
        if unit.to_start:
            self.start(unit, unit.restarts + 1, slowly=True)
            self.planned.append((unit.slowly, functools.partial(self.started, unit)))

    def _read(self, unit: Unit) -> None:
        unit.told, unit.doomed = unit.shown, None
        self.dirty.add(unit.name)
        if self._has(unit.shown, "dies"):
            self.crash(unit)
        elif self._has(unit.shown, "dies later"):
            unit.doomed = self.clock + 100_000

    def facts(self) -> dict[str, Facts]:
        """What the next rounds would find, by service."""

        async def glance() -> dict[str, Facts]:
            return {name: (await self.rounds.glance(one.service))[0] for name, one in self.units.items()}

        return trio.run(glance)

    def accepted(self, unit: Unit) -> Stack:
        return self.store.state(unit.service.slots).accepted.stack

    def _tried(self, slots: str, state: State, stack: Stack) -> None:
        """A stack is accepted that was never before: its try was counted, and it was checked."""
        for layer in stack.layers:
            if layer.digest not in state.accepted.stack.digests and tries.counted(layer.source):
                assert layer.digest[:16] in state.counted
        (unit,) = (one for one in self.units.values() if one.service.slots == slots)
        runs = unit.service.main is not None and not unit.host
        if unit.settings.check and (runs or unit.manager == "systemd"):
            assert state.checked.endswith(f" {stack.id}") and not self._has(stack, "check fails")

    def _kept_out(self, slots: str, before: State, after: State) -> None:
        """Something is kept out now: something in that, or beneath it, is bad, if the service did not die of itself."""
        new = [digest for digest in after.kept_out.keys() - before.kept_out.keys() if digest in self.fates]
        (unit,) = (one for one in self.units.values() if one.service.slots == slots)
        beneath = before.accepted.stack.digests
        if (
            new and not unit.was_killed and unit.manager == "systemd"
        ):  # of the other nobody knows why it ended
            assert any(self.fates[digest] != "good" for digest in (*new, *beneath))

    def _has(self, stack: Stack, fate: str) -> bool:
        return any(self.fates[digest] == fate for digest in stack.digests)

    def kills(self, stack: Stack) -> bool:
        """Whether a service that starts on it ends."""
        return self._has(stack, "dies") or self._has(stack, "dies later")

    def _exec(self, unit: Unit) -> Stack:
        slots = unit.service.slots
        state = self.store.state(slots)
        if state.undoing is None:
            state = replace(state, quarantine=tuple(one for one in state.quarantine if not one.for_now))
        found = find(self._tools.store, self._tools.admission, Given(slots, Declared(), _ANY, state))
        options: Any = SimpleNamespace(name=unit.name, own_settings=unit.settings)
        return exec_service._accept(self._tools.store, options, found)

    # --- what rounds have an effect on ---

    def _look(self, declared: Declared, modes: object = None) -> Look:
        picks = []
        for name in ENTRIES:
            files = [one for one in self.files if one.name == name]
            files.sort(key=lambda one: (one.left != 0, one.version, one.left is None), reverse=True)
            entry = Entry(f"{name}.raw", f"/srv/{name}.raw.v", Kind.IMAGE)
            picks.append(Picks(entry, tuple(one.candidate for one in files)))
        return Look(tuple(picks), ())

    def _admit(
        self, candidate: Candidate, made_for: object, at_hand: set[str], modes: object, rule: object
    ) -> Copy:
        file = next((one for one in self.files if one.path == candidate.path), None)
        if file is None:
            raise Busy("it has just been renamed")
        at_hand.add(file.digest)
        self.store.heal(file.digest)
        return Copy(file.digest, "/store", 1, Kind.IMAGE)

    def _begin(self, stack: Stack, keys: Sequence[str], *_: object) -> Stack:
        return self._renamed(
            stack,
            keys,
            lambda file: replace(file, left=file.left - 1, done=file.done + 1) if file.left else file,
        )

    def _succeed(self, stack: Stack, *_: object) -> Stack:
        keys = [digest[:16] for digest in stack.digests]
        with contextlib.suppress(FileNotFoundError):
            return self._renamed(stack, keys, lambda file: replace(file, left=None, done=0))
        return stack

    def _renamed(self, stack: Stack, keys: Sequence[str], change: Callable[[Any], File]) -> Stack:
        layers = []
        for layer in stack.layers:
            if layer.digest[:16] in keys and tries.counted(layer.source) is not None:
                self.tick()
                old = next((one for one in self.files if one.path == layer.source), None)
                if old is None:
                    raise FileNotFoundError(layer.source)
                new = change(old)
                if all(one.path != new.path for one in self.files):
                    self.files[self.files.index(old)] = new
                    self.changed[new] = self.clock
                    layer = replace(layer, source=new.path)
                self.tick()
                self.dirty |= self.units.keys()
            layers.append(layer)
        return Stack(tuple(layers))

    async def _check(self, tools: Any, service: Service, stack: Stack, *_: Any) -> Ended:
        self.tick()
        if service.main is None or not service.main.alive():
            raise Gone("it has ended")
        self.tick()
        return Ended("check failed", "") if self._has(stack, "check fails") else Ended("", "")

    async def _check_at_start(self, manager: Any, service: Service, stack: Stack, *_: Any) -> Ended:
        unit = self.units[service.name]
        assert unit.manager == "systemd" and (unit.host or service.main is None)
        self.tick()
        return Ended("check failed", "") if self._has(stack, "check fails") else Ended("", "")

    def _converge(
        self,
        workers: Any,
        main: Main,
        pids: Any,
        stack: Stack,
        copies: Any,
        owe: Any,
        *_: Any,
        anew: bool,
        **__: Any,
    ) -> Any:
        assert not main.unit.host and stack.id in self.store.ever[main.unit.service.slots]
        # The real one opens the namespace first, and so meets that even if there is nothing to swap
        # (tests/mounts/test_converge.py).
        if not main.alive():
            raise Gone("it has ended")
        before, swaps = main.unit.shown, int(anew or main.unit.shown.id != stack.id)
        if swaps:
            owe()
            self.tick()
            if main.alive():  # else only the old namespace is swapped, which is still open
                main.unit.shown = stack
        self.tick()
        mounted: Any = SimpleNamespace(stack=before.id, layers=())
        return Converged(mounted, swaps, anew=anew)

    def _tell(self, service: Service, main: Main) -> Reloaded | None:
        """A standalone service is told by a signal."""
        if main.unit.manager != "standalone" or service.settings.reload == "restart":
            return None
        self.tick()
        if not main.alive():
            raise Gone("it has ended")
        self._read(main.unit)
        self.tick()
        return Reloaded(ok=True, told="SIGHUP")

    async def _reload(
        self,
        manager: Any,
        service: Service,
        main: Main,
        stack: Stack,
        asked: Asked | None = None,
        *,
        undoing: bool,
    ) -> Judged | None:
        self.tick()
        unit, told = main.unit, "restart" if service.settings.reload == "restart" else "reload"
        if asked is None and main.alive():
            if told == "restart":
                self.start(unit)
            else:
                self._read(unit)
        self.tick()
        main = unit.service.main if told == "restart" else main  # type: ignore[assignment]
        return self._judged(service, main, stack, told, "reload fails")

    async def _watch(self, manager: Any, service: Service, main: Main, stack: Stack) -> Judged | None:
        self.tick()
        return self._judged(service, main, stack, "", "")

    def _judged(
        self, service: Service, main: Main | None, stack: Stack, told: str, fails: str
    ) -> Judged | None:
        judged = Judged(stack, Verdict.GOOD, told, "")
        unit = self.units[service.name]
        if main is None or not main.alive():
            down = unit.service.went_down_since(service.restarts)
            judged = replace(judged, verdict=Verdict.WENT_DOWN, reason="it ended")
            if not down:
                return None
        elif self._has(unit.shown, fails):
            judged = replace(judged, verdict=Verdict.RELOAD_FAILED, reason="reload failed")
        elif self._has(unit.shown, "unhealthy"):
            judged = replace(judged, verdict=Verdict.HEALTH_CHECK_FAILED, reason="unhealthy")
        self._note(unit, judged)
        self.tick()
        return judged

    def _note(self, unit: Unit, judged: Judged) -> None:
        """What proved bad must not stay, with Rollback= and if it was not chosen by hand."""
        slots = unit.service.slots
        state = self.store.state(slots)
        on_trial = (
            state.trial is not None and state.trial.stack == judged.stack.id and not state.trial.verdict
        )
        if judged.good:
            self.proved_bad.discard((slots, judged.stack.id))
        elif unit.settings.rollback and state.pin is None and on_trial and judged.stack.layers:
            self.proved_bad.add((slots, judged.stack.id))

    async def _revive(self, service: Service) -> Reloaded:
        self.tick()
        unit = self.units[service.name]
        if unit.manager == "standalone" or unit.alive or unit.starting:
            return Reloaded(ok=True, interrupted=unit.manager != "standalone")
        self.start(unit)
        self.tick()
        return Reloaded(ok=unit.alive, told="start", reason="" if unit.alive else "it ended")

    def _processes(self, service: Service) -> list[int]:
        assert self._in_thread, "a service may have tens of thousands, and hold up the event loop"
        return []

    def _append(self, *events: Event) -> None:
        self.tick()
        self.events += events
        self.tick()

    def _touched(self, path: str) -> int | None:
        return next((self.changed.get(one, 0) for one in self.files if one.path == path), None)

    def _check_foreign(self, namespace: tuple[int, int]) -> None:
        if namespace == _HOST:
            raise HostNamespace("is in the host's mount namespace")

    def _make_tools(self) -> Any:
        async def run(name: str, function: Any, *args: Any) -> Any:
            return function(*args)

        async def run_within(seconds: float, name: str, function: Any) -> Any:
            return function()

        async def in_turn(service: Service, function: Any, finishes: Any = None) -> Any:
            self._in_thread = True
            try:
                return alone(function(service))
            finally:
                self._in_thread = False

        def call(function: Any, *args: Any, **more: Any) -> Any:
            return function(*args, **more)

        async def run_alone(function: Any, *args: Any) -> Any:
            found = function(*args)
            return alone(found) if isinstance(found, Generator) else found

        async def nothing(*_: Any) -> list[int]:
            return []

        async def silent_service(*_: Any) -> str:
            return ""

        world = self

        class Manager:
            learn, revive = staticmethod(nothing), staticmethod(self._revive)
            processes = staticmethod(self._processes)
            learned = staticmethod(lambda service: True)
            tell = staticmethod(self._tell)
            logged = staticmethod(silent_service)
            hold_start = staticmethod(lambda service, other: None)

            @property
            def services(self) -> dict[str, Service]:
                return {name: unit.service for name, unit in world.units.items()}

        return SimpleNamespace(
            store=self.store,
            admission=SimpleNamespace(
                admit=self._admit,
                trust=lambda copy: Trust(),
                effects=lambda digest: (),
                asks_for=lambda layer, names: "",
            ),
            workers=SimpleNamespace(
                call=call,
                check_foreign=self._check_foreign,
                images=SimpleNamespace(missing=lambda copies: ()),
            ),
            manager=Manager(),
            watcher=SimpleNamespace(watch=nothing, renaming=nothing, drop=lambda name: None),
            writers=SimpleNamespace(watch=lambda directories: None),
            ledger=SimpleNamespace(append=self._append),
            removals=Removals(),
            settings=Settings(remove_usec=0),
            offload=SimpleNamespace(run=run, run_within=run_within, run_alone=run_alone),
            in_turn=in_turn,
            renewed=frozenset(),
        )

    def __enter__(self) -> World:
        async def direct(function: Any, *args: Any, **_: Any) -> Any:
            return function(*args)

        async def is_there(verdicts: object, service: Service, path: str) -> bool:
            return any(one.path == path for one in self.files)

        clock = SimpleNamespace(monotonic=lambda: self.clock / 1e6)
        silent = SimpleNamespace(
            **dict.fromkeys(("debug", "info", "warning", "error"), lambda *_, **__: None)
        )
        for where, name, what in (
            (trio.to_thread, "run_sync", direct),
            (journal, "log", silent),
            (journal, "record", lambda event, level: None),
            (messages, "now", lambda: self.clock),
            *((module, "time", clock) for module in (observe, rounds, steps)),
            (observe, "host", lambda root: _ANY),
            (retry, "touched", self._touched),
            (retry, "_changes", lambda etc: (self.host_changed,)),
            (verdicts, "touched", self._touched),
            (scan, "look", self._look),
            (rollout, "_offers", lambda service: {one.path for one in self.files}),
            (tries, "begin", self._begin),
            (tries, "succeed", self._succeed),
            (steps, "check", self._check),
            (steps, "check_at_start", self._check_at_start),
            (steps, "converge", self._converge),
            (steps, "reload_and_judge", self._reload),
            (steps, "judged_at_once", lambda *_: None),
            (steps, "judge_start", self._watch),
            (verdicts.Verdicts, "_is_there", is_there),
            (rounds, "_STEPS_MAX", _STEPS_MAX),
        ):
            self._patches.enter_context(mock.patch.object(where, name, what))
        self._tools = self._make_tools()
        self.boot_watcher()
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()
