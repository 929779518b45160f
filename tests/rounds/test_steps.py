# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that find another world than the look: a file system that was mounted or unmounted in between."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from support.facts import entries, facts, record, stack
from watcher.managers.base import Service
from watcher.model import Declared, Look, Picks, Stack
from watcher.records.state import Accepted, State
from watcher.records.together import Gathering, alone
from watcher.rounds import exec_service
from watcher.rounds.decide import Accept
from watcher.rounds.desired import Desired
from watcher.rounds.memory import Memory, Round
from watcher.rounds.steps import Steps
from watcher.settings.config import ServiceSettings

OLD, NEW = stack("web1"), stack("web2")
SERVICE = Service("web.service", Declared(), ServiceSettings(), invocation="first")


class Unmounting:
    """A store that finds other mounts than the look whenever it accepts a stack."""

    def __init__(self) -> None:
        self.kept = record(OLD)
        self.accepted = 0

    def state(self, slots: str) -> State:
        return self.kept

    def accepting(self, slots: str, one: Stack, all_entries: Any, change: Any) -> Gathering[State]:
        yield from ()
        return self.accept(slots, one, all_entries, change)

    def accept(self, slots: str, one: Stack, all_entries: Any, change: Any) -> State:
        self.accepted += 1
        place = {one.layers[0].source: f"/srv{self.accepted}"}
        self.kept = change(replace(self.kept, accepted=Accepted(one, entries(one), 2, place)))
        return self.kept

    def settle(self) -> None:
        """Nobody cuts the power here."""


def look(one: Stack) -> Desired:
    return Desired(Look(tuple(Picks(entry, ()) for entry in entries(one)), ()), (), one, OLD)


def test_what_was_recorded_otherwise_than_it_was_seen_counts_as_it_was_recorded() -> None:
    store = Unmounting()
    tools = SimpleNamespace(store=store, manager=SimpleNamespace(learned=lambda service: True))
    this = Round(0.0, 0, state=record(OLD), desired=look(NEW))
    alone(
        Steps(cast(Any, tools)).accept(Accept(NEW, new=True), SERVICE, facts(OLD, wanted=NEW), Memory(), this)
    )
    assert this.desired is not None
    assert this.desired.mounted == this.state.accepted.mounted == {NEW.layers[0].source: "/srv1"}


def test_exec_does_not_wait_for_mounts_to_stay_as_they_are() -> None:
    store = Unmounting()
    options = SimpleNamespace(name="web.service", own_settings=ServiceSettings())
    found = exec_service._accept(cast(Any, store), cast(Any, options), look(NEW))
    assert (found, store.accepted) == (NEW, 1)
