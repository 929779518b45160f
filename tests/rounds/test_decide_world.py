# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watcher comes to the right end, whatever happens and wherever it is killed (rounds/round.py).

What a round remembers (rounds/memory.py) is lost by a kill. Hypothesis plays a world (`support/world.py`) against the
real rounds. It takes the same examples each time that the same modules are loaded, whose constants Hypothesis tries,
too. To look further, for as long as that takes:

    WORLD_EXAMPLES=20000 .venv/bin/python -m pytest -q tests/rounds/test_decide_world.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.world import Killed, World
from support.world_things import ENTRIES, FATES, File, Unit
from watcher.model import Stack
from watcher.rounds.facts import Facts
from watcher.settings.config import ServiceSettings

EXAMPLES = int(os.environ.get("WORLD_EXAMPLES", "0"))

UNITS = st.builds(
    Unit,
    st.just(""),
    st.builds(
        ServiceSettings,
        check=st.sampled_from([(), ("check",)]),
        rollback=st.sampled_from([True, True, False]),
        rollout=st.sampled_from(["parallel", "rolling"]),
        reload=st.sampled_from(["auto", "auto", "restart"]),
    ),
    manager=st.sampled_from(["systemd", "systemd", "standalone"]),
    restarting=st.booleans(),
    slowly=st.integers(0, 9),
    restarts_max=st.integers(1, 3),
    host=st.sampled_from([False, False, False, True]),
    headless=st.sampled_from([False, False, False, True]),
)
SOON = st.integers(1, 15)
WHEN = st.one_of(st.just(0), st.integers(1, 25))
"""After so many ticks: in the middle of a round."""
NUMBER = st.integers(0, 2)
FILES = st.builds(
    File,
    st.sampled_from(ENTRIES),
    st.integers(1, 3),
    st.sampled_from((*FATES, "good", "good")),
    st.sampled_from([None, None, 1, 2]),
)


class Play(RuleBasedStateMachine):
    @initialize(units=st.lists(UNITS, min_size=1, max_size=3))
    def begin(self, units: list[Unit]) -> None:
        # A service that is told by a restart is systemd's.
        for number, unit in enumerate(units):
            unit.name = f"s{number}.service"
            if unit.manager == "standalone":
                unit.settings, unit.headless = replace(unit.settings, reload="auto"), False
        self.world = World(units).__enter__()
        for unit in units:
            self.world.start(unit)
        self.put(File("web", 1, "good"))
        self.world.work()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.quiet()
            finally:
                self.world.__exit__()

    def happens(self, when: int, action: Callable[[], None]) -> None:
        world = self.world
        if when:
            world.planned.append((when, action))
            return
        try:
            world.act(action)
        except Killed:
            world.boot_watcher()
        world.work()

    def unit(self, number: int) -> Unit:
        units = list(self.world.units.values())
        return units[number % len(units)]

    # --- what happens ---

    def put(self, file: File) -> None:
        world = self.world
        world.fates[file.digest] = file.fate
        same = [one for one in world.files if (one.name, one.version) == (file.name, file.version)]
        world.files = [*(one for one in world.files if one not in same), file]
        world.changed[file] = world.clock
        world.dirty |= world.units.keys()

    @rule(when=WHEN, file=FILES)
    def drop(self, when: int, file: File) -> None:
        self.happens(when, lambda: self.put(file))

    @rule(file=FILES, when=SOON, other=FILES)
    def drop_two(self, file: File, when: int, other: File) -> None:
        self.happens(when, lambda: self.put(other))
        self.happens(0, lambda: self.put(file))

    @rule(file=FILES, when=SOON, number=NUMBER, what=st.sampled_from(["kill", "start", "stop", "crash"]))
    def drop_amid(self, file: File, when: int, number: int, what: str) -> None:
        world, unit = self.world, self.unit(number)

        def action() -> None:
            if what == "kill":
                world.kill()
            elif what == "crash" and unit.alive:
                unit.was_killed = True
                world.crash(unit)
            elif what != "crash":
                world.stop(unit)
            if what == "start":
                world.start(unit)

        self.happens(when, action)
        self.happens(0, lambda: self.put(file))

    @rule(when=WHEN)
    def host_changes(self, when: int) -> None:
        """What a check refuses may be tried again."""

        def action() -> None:
            world = self.world
            world.host_changed = world.clock
            world.dirty |= world.units.keys()

        self.happens(when, action)

    @rule(when=WHEN, number=st.integers(0, 5))
    def remove(self, when: int, number: int) -> None:
        def action() -> None:
            world = self.world
            if world.files:
                world.files.pop(number % len(world.files))
                world.dirty |= world.units.keys()

        self.happens(when, action)

    @rule(when=WHEN, number=NUMBER, slowly=st.booleans())
    def operator_starts(self, when: int, number: int, slowly: bool) -> None:
        def action() -> None:
            unit = self.unit(number)
            self.world.stop(unit)
            self.world.start(unit, slowly=slowly and unit.manager == "systemd")

        self.happens(when, action)

    @rule(when=WHEN, number=NUMBER)
    def has_started(self, when: int, number: int) -> None:
        self.happens(when, lambda: self.world.started(self.unit(number)))

    @rule(when=WHEN, number=NUMBER)
    def operator_stops(self, when: int, number: int) -> None:
        self.happens(when, lambda: self.world.stop(self.unit(number)))

    @rule(when=WHEN, number=NUMBER)
    def crashes(self, when: int, number: int) -> None:
        unit = self.unit(number)
        unit.was_killed = True
        self.happens(when, lambda: self.world.crash(unit) if unit.alive else None)

    @rule(when=WHEN, number=NUMBER, which=st.integers(0, 3))
    def pin(self, when: int, number: int, which: int) -> None:
        def action() -> None:
            slots = self.unit(number).service.slots
            stacks = self.world.store.stacks(slots)
            if stacks:
                target = stacks[which % len(stacks)].id
                self.world.store.change(slots, lambda state: replace(state, pin=target))
                self.world.dirty.add(self.unit(number).name)

        self.happens(when, action)

    @rule(when=WHEN, number=NUMBER)
    def forget(self, when: int, number: int) -> None:
        def action() -> None:
            slots = self.unit(number).service.slots
            self.world.store.change(slots, lambda state: replace(state, quarantine=(), pin=None))
            self.world.proved_bad = {one for one in self.world.proved_bad if one[0] != slots}
            self.world.dirty |= self.world.units.keys()

        self.happens(when, action)

    @rule(number=NUMBER, which=st.integers(0, 3))
    def damage(self, number: int, which: int) -> None:
        layers = [
            layer for one in self.world.store.stacks(self.unit(number).service.slots) for layer in one.layers
        ]
        if layers:
            self.world.store.damaged |= {layers[which % len(layers)].digest}

    @rule(when=WHEN)
    def kill(self, when: int) -> None:
        self.happens(when, self.world.kill)

    @rule()
    def watcher_ends(self) -> None:
        self.world.up = False

    @precondition(lambda self: not self.world.up)
    @rule()
    def watcher_begins(self) -> None:
        self.world.boot_watcher()
        self.world.work()

    @rule()
    def reboot(self) -> None:
        world = self.world

        def action() -> None:
            for unit in world.units.values():
                world.stop(unit)
                unit.failed = False
                world.start(unit)
            world.kill()

        self.happens(0, action)

    @rule()
    def time_passes(self) -> None:
        self.world.clock += 5_000_000

    # --- what holds ---

    @invariant()
    def each_shows_what_was_accepted(self) -> None:
        for unit in self.world.units.values() if hasattr(self, "world") else ():
            known = self.world.store.ever.get(unit.service.slots, {"": Stack()})
            assert unit.shown.id in known

    @rule()
    def quiet(self) -> None:
        """At the end each service is on what it should have, and all is said."""
        world = self.world
        for _, action in world.planned:
            with contextlib.suppress(Killed):
                world.act(action)
        world.planned = []
        for unit in world.units.values():
            while unit.starting or unit.to_start:
                world.end_start(unit)
        if not world.up:
            world.boot_watcher()
        # What one service refuses is no news for those that did not wait for it. It goes from one to the next.
        for _ in range(max(2, len(world.units))):
            world.dirty |= world.units.keys()
            world.work()
            world.clock += 5_000_000
        before = dict(world.store.states), list(world.events), [replace(one) for one in world.units.values()]
        world.dirty |= world.units.keys()
        world.work()
        after = dict(world.store.states), list(world.events), [replace(one) for one in world.units.values()]
        assert after == before
        facts = world.facts()
        for unit in world.units.values():
            self.is_done(unit, facts[unit.name])
        rolling = [unit for unit in world.units.values() if unit.settings.rollout == "rolling"]
        if all(unit.service.main and not unit.host and unit.settings.rollback for unit in rolling):
            assert not any(facts[unit.name].waits for unit in rolling)

    def is_done(self, unit: Unit, facts: Facts) -> None:
        world, service = self.world, unit.service
        state = world.store.state(service.slots)
        accepted = state.accepted.stack
        # What was let in again is judged at its next start.
        assert state.undoing is None or (
            state.undoing.stack.id == accepted.id and not state.why_bad(accepted)
        )
        assert state.replaced is None or (
            unit.alive and unit.host
        )  # the restart that it needs is still to come
        assert not unit.alive or state.owed != service.invocation
        pinned = state.pin is not None and state.pin in [one.id for one in world.store.stacks(service.slots)]
        assert pinned or not accepted.layers or not state.why_bad(accepted)
        to_be_judged = (
            state.trial is not None and state.trial.stack == accepted.id and not state.trial.verdict
        )
        assert pinned or to_be_judged or (service.slots, accepted.id) not in world.proved_bad
        said = {event.stack for event in world.events if event.service == unit.name}
        said |= {event.previous for event in world.events if event.service == unit.name}
        # A start by `exec` is no outcome, and that a restart is needed is said of no stack.
        if unit.manager == "systemd" and not unit.host:
            said |= {one for slots, one in world.store.superseded if slots == service.slots}
            assert set(world.store.ever.get(service.slots, ())) - said <= {""}
        rolls_back = unit.manager == "systemd" and unit.settings.rollback and not pinned
        if unit.failed and rolls_back and not unit.was_killed:
            assert world.kills(accepted), "the good stack is back, and its service stays down"
        assert facts.recorded or not state.accepted.when
        assert not facts.offered or facts.stays
        if facts.reachable and state.accepted.when:
            assert unit.shown.id == accepted.id == unit.told.id
            assert pinned or not to_be_judged


@pytest.mark.parametrize("reload", ["auto", "restart"])
@pytest.mark.parametrize("restarts_max", [1, 2])
@pytest.mark.parametrize("slowly", range(1, 13))
def test_a_start_on_the_bad_stack_may_be_the_last_that_its_manager_makes(
    slowly: int, restarts_max: int, reload: Literal["auto", "restart"]
) -> None:
    """Its manager starts it while the good stack comes back, and gives it up then (`StartLimitBurst=`)."""
    settings = ServiceSettings(reload=reload)
    unit = Unit("s.service", settings, restarting=True, slowly=slowly, restarts_max=restarts_max)
    with World([unit]) as world:
        for file in (File("web", 1, "good"), File("web", 2, "dies")):
            world.fates[file.digest] = file.fate
            world.files.append(file)
            world.changed[file] = world.clock
            if not unit.alive:
                world.start(unit)
            world.dirty.add(unit.name)
            world.work()
        assert unit.alive and world.fates[unit.told.digests[0]] == "good"
        assert world.store.state(unit.name).undoing is None


Play.TestCase.settings = hypothesis.settings(
    max_examples=EXAMPLES or 100,
    stateful_step_count=30,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
TestPlay = pytest.mark.limit(7 * 24 * 3600 if EXAMPLES else 180)(Play.TestCase)
