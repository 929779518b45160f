# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a round does in a thread, and what it leaves to the event loop."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from support.world import World
from support.world_things import File, Records, Unit
from watcher.managers.base import Service
from watcher.model import Event, Later, Stack
from watcher.records.together import alone
from watcher.rounds import decide
from watcher.rounds.memory import Memory, Round
from watcher.rounds.round import Rounds
from watcher.settings.config import ServiceSettings
from watcher.watch.offload import Unanswered


def test_a_look_that_comes_back_when_nobody_waits_for_it_any_more_changes_nothing() -> None:
    """The next round looks anew: only that one may accept what was found, and tell the service."""
    unit = Unit("web.service", ServiceSettings(), manager="standalone")
    with World([unit]) as world:
        world.start(unit)
        world.work()
        hung: list[Callable[[], Any]] = []

        async def hangs(service: Service, function: Callable[[Service], Any], finishes: Any) -> Any:
            hung.append(lambda: alone(function(service)))
            raise Unanswered

        in_turn, world._tools.in_turn = world._tools.in_turn, hangs
        file = File("web", 1, "good")
        world.files.append(file)
        world.fates[file.digest] = file.fate
        world.dirty.add(unit.name)
        world.work()
        before = world.store.state(unit.service.slots)
        with pytest.raises(Later):
            hung[0]()
        assert world.store.state(unit.service.slots) == before
        assert not unit.shown.layers
        world._tools.in_turn = in_turn
        world.dirty.add(unit.name)
        world.work()
        assert [layer.name for layer in unit.told.layers] == ["web"]


def test_the_manager_is_told_of_a_stack_whose_acceptance_came_back_late() -> None:
    unit = Unit("web.service", ServiceSettings())
    with World([unit]) as world:
        world.start(unit)
        world.work()
        learns: list[str] = []

        async def learn(service: Service) -> None:
            learns.append(service.name)
            manager.learned = staticmethod(lambda service: True)

        manager = type(world._tools.manager)
        manager.learn, manager.learned = staticmethod(learn), staticmethod(lambda service: False)
        in_turn = world._tools.in_turn

        async def late(service: Service, function: Callable[[Service], Any], finishes: Any) -> Any:
            found = await in_turn(service, function)
            if world.accepted(unit).layers:
                raise Unanswered
            return found

        file = File("web", 1, "good")
        world.files.append(file)
        world.fates[file.digest] = file.fate
        world._tools.in_turn = late
        world.dirty.add(unit.name)
        world.work()
        assert world.accepted(unit).layers and not learns
        world._tools.in_turn = in_turn
        world.dirty.add(unit.name)
        world.work()
        assert learns == [unit.name] and unit.told.layers


def test_a_unit_whose_slots_were_made_anew_gets_its_drop_in_before_it_starts() -> None:
    """The daemon is ready, and by that the unit starts, once the unit was looked at."""
    unit = Unit("web.service", ServiceSettings())
    with World([unit]) as world:
        done: list[str] = []

        async def learn(service: Service) -> None:
            done.append("drop-in")

        type(world._tools.manager).learn = staticmethod(learn)
        world._tools.renewed = frozenset({"web.service"})
        rounds = Rounds(world._tools, accepted=lambda name: done.append("looked at"))
        for _ in range(2):
            trio.run(rounds.round, unit.service, 0.0)
        assert done == ["drop-in", "looked at"]


def test_nobody_is_told_of_a_stack_before_it_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Records, "settle", lambda store: done.append("on the disk"))
    unit = Unit("web.service", ServiceSettings(), manager="standalone")
    with World([unit]) as world:
        world.start(unit)
        world.work()
        done.clear()
        accept, append = world.store.accept, world._tools.ledger.append

        def accepts(*arguments: Any) -> Any:
            done.append("accepted")
            return accept(*arguments)

        def records(*events: Event) -> None:
            done.append("recorded")
            append(*events)

        world.store.accept = accepts
        world._tools.ledger.append = records
        file = File("web", 1, "good")
        world.files.append(file)
        world.fates[file.digest] = file.fate
        world.dirty.add(unit.name)
        world.work()
        assert done == ["accepted", "on the disk", "recorded"]


def test_steps_without_an_end_are_a_mistake_that_says_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = object.__new__(Rounds)
    known = SimpleNamespace(bids=False, reachable=True, has_nothing_whole=False)
    rounds._observer = cast(Any, SimpleNamespace(look=lambda *_: True, observe=lambda *_: known))
    rounds._steps_of = cast(Any, SimpleNamespace(accept=lambda *_: iter(())))
    monkeypatch.setattr(decide, "decide", lambda facts: decide.Accept(Stack()))
    service = cast(Any, SimpleNamespace(name="web.service"))
    with pytest.raises(AssertionError, match=r"web\.service: its round does not come to an end: namespace"):
        alone(rounds._work([], Memory(), Round(0.0, 0), lambda: None, service))
