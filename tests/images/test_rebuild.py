# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of what is left, a record is made that a start of the service agrees with, and that lets nothing bad back in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from watcher.images.rebuild import Remains, rebuilt
from watcher.model import Entry, Event, Kind, Layer, Outcome, Stack, Verdict
from watcher.records.state import STACK, Accepted, Damaged, Quarantine, State, Trial

NOWHERE = Damaged("nowhere")


def layer(name: str, version: str = "1", slot: str = "") -> Layer:
    digest = f"{ord(name[0]):02x}{version:0>2}" * 16
    source = f"/srv/{name}.raw.v/{name}_{version}.raw"
    return Layer(slot or f"{name}.raw", name, version, digest, Kind.IMAGE, source)


def stack(*names: str, version: str = "1") -> Stack:
    return Stack(tuple(layer(name, version) for name in names))


def remains(of: Stack, kept: tuple[Accepted, ...] = (), **fields: Any) -> Remains:
    links: Mapping[str, str] = {one.slot: one.digest for one in of.layers}
    given = {"unit": "a", "error": NOWHERE, "identity": of.id, "links": links, "when": 9, "first": False}
    return Remains(**{**given, "kept": kept, **fields})


NOTHING = Stack()


def event(outcome: Outcome, of: Stack, before: Stack = NOTHING, **fields: Any) -> Event:
    return Event("a", outcome, "", 3, of.id, before.id, layers=of.layers, **fields)


def made(left: Remains, *history: Event) -> State:
    return rebuilt(left, history, lambda digest: Kind.DIRECTORY)[0]


def test_the_order_of_the_layers_is_that_of_the_identity() -> None:
    for names in itertools.permutations("abcd"):
        state = made(remains(stack(*names)))
        assert [one.slot for one in state.accepted.stack.layers] == [f"{name}.raw" for name in names]
        assert state.accepted.when == 9
        assert {one.kind for one in state.accepted.stack.layers} == {Kind.DIRECTORY}


@pytest.mark.parametrize("left", [remains(stack(*"abcdefgh")), remains(stack("b", "a"), identity="0" * 16)])
def test_no_order_is_found(left: Remains) -> None:
    assert [one.slot for one in made(left).accepted.stack.layers] == sorted(left.links)


def test_names_and_time_come_from_the_newest_outcome_of_that_stack() -> None:
    wanted = stack("b", "a")
    older = event(Outcome.APPLIED, Stack(tuple(layer(one.name, slot="x") for one in wanted.layers)))
    history = [
        event(Outcome.APPLIED, stack("c")),
        event(Outcome.UNCHANGED, Stack()),
        event(Outcome.APPLIED, wanted),
    ]
    state = made(remains(wanted), *history, older)
    assert state.accepted == Accepted(
        wanted,
        (Entry("b.raw", "/srv/b.raw.v", Kind.IMAGE), Entry("a.raw", "/srv/a.raw.v", Kind.IMAGE)),
        3,
    )


def test_slots_are_those_of_the_links() -> None:
    told = Stack((layer("a", slot="old.raw"), layer("b")))
    links = {"new.raw": layer("a").digest, "b.raw": layer("b").digest}
    state = made(remains(told, links=links), event(Outcome.APPLIED, told))
    assert [one.slot for one in state.accepted.stack.layers] == ["new.raw", "b.raw"]


def test_one_content_in_two_slots() -> None:
    twice = Stack((layer("a", slot="y.raw"), layer("a", slot="x.raw")))
    state = made(remains(twice), event(Outcome.APPLIED, twice))
    assert state.accepted.stack == twice


def test_an_outcome_of_other_contents_is_of_no_use() -> None:
    wanted = stack("a")
    lying = Event("a", Outcome.APPLIED, "", 3, wanted.id, layers=stack("b").layers)
    assert made(remains(wanted), lying).accepted.stack.digests == wanted.digests


def test_names_that_are_not_utf8_are_in_older_stacks() -> None:
    odd = Stack((layer("caf\udce9"),))
    told = event(Outcome.APPLIED, Stack((layer("caf\\xe9"),)))
    older = Accepted(odd, (Entry("caf\udce9.raw", "/srv/caf\udce9.raw", Kind.IMAGE, options="x"),), 1)
    for history in ([told], []):
        state = made(remains(odd, (older,)), *history)
        assert (state.accepted.stack, state.accepted.entries) == (odd, older.entries)


class TestNone:
    def test_it_only_held_the_record(self) -> None:
        assert made(remains(Stack(), first=True)) == State()

    def test_its_directory_is_gone(self) -> None:
        assert made(remains(Stack(), when=0)) == State()

    @pytest.mark.parametrize("first", [False, True])
    def test_the_empty_stack_was_accepted(self, first: bool) -> None:
        told = [event(Outcome.APPLIED, Stack(), swap_usec=1)] if first else []
        state = made(remains(Stack(), first=first), *told)
        assert (state.accepted.when, state.accepted.stack) == (9, Stack())


class TestTrial:
    def test_what_no_outcome_has_judged_is_on_trial(self) -> None:
        assert made(remains(stack("a"))).trial == Trial(stack("a").id)
        assert made(remains(stack("a")), event(Outcome.APPLIED, stack("b"), swap_usec=1)).trial is not None

    def test_it_was_accepted_for_the_next_start(self) -> None:
        accepted = event(Outcome.APPLIED, stack("a"), swap_usec=0, total_usec=0)
        assert made(remains(stack("a")), accepted).trial == Trial(stack("a").id)

    @pytest.mark.parametrize("outcome", [Outcome.APPLIED, Outcome.FAILED, Outcome.ROLLED_BACK])
    def test_it_was_judged(self, outcome: Outcome) -> None:
        assert made(remains(stack("a")), event(outcome, stack("a"), swap_usec=5)).trial is None


class TestQuarantine:
    GOOD, BAD = stack("a", "b"), Stack((*stack("a").layers, layer("b", "2"), layer("c", "2")))

    def kept_out(self, *history: Event) -> tuple[str, ...]:
        state = made(remains(self.GOOD), *history)
        assert all(type(one) is Quarantine for one in state.quarantine)
        return tuple(one.digest for one in state.quarantine)

    def back(self, good: Stack, bad: Stack, **fields: Any) -> Event:
        return event(Outcome.ROLLED_BACK, good, bad, reason="no", **fields)

    def test_all_that_was_new_in_a_stack_that_was_taken_out(self) -> None:
        applied = event(Outcome.APPLIED, self.GOOD)
        told = event(Outcome.FAILED, self.BAD)
        top = layer("c", "2")
        back = self.back(self.GOOD, self.BAD, digest=top.digest, source=top.source)
        assert set(self.kept_out(back, told, applied)) == {layer("b", "2").digest, top.digest}
        # If no outcome has told its layers, the one that it was about is known.
        assert self.kept_out(back, applied) == (top.digest,)

    def test_nothing_was_new(self) -> None:
        less = stack("a")
        back = self.back(self.GOOD, less, digest=less.layers[0].digest)
        assert self.kept_out(back) == (STACK + less.id,)

    def test_a_check_has_failed(self) -> None:
        refused = event(Outcome.REFUSED, self.BAD, self.GOOD, digest=layer("c", "2").digest, reason="no")
        applied = event(Outcome.APPLIED, self.GOOD)
        expected = {layer("b", "2").digest, layer("c", "2").digest}
        assert set(self.kept_out(refused, applied)) == expected
        # What was before is not known any more: nothing that may be good is kept out.
        assert self.kept_out(refused) == (layer("c", "2").digest,)

    def test_a_check_has_failed_by_its_verdict(self) -> None:
        refused = Event("a", Outcome.REFUSED, "", 3, "1" * 16, digest="d", verdict=Verdict.CHECK_FAILED)
        assert self.kept_out(refused) == ("d",)

    def test_an_image_was_refused_which_is_no_quarantine(self) -> None:
        refused = Event("a", Outcome.REFUSED, "", 3, self.GOOD.id, image="b", source="/srv/b.raw")
        assert self.kept_out(refused) == ()

    def test_what_did_well_later_may_stay(self) -> None:
        back = self.back(self.GOOD, self.BAD, digest=layer("c", "2").digest)
        applied = event(Outcome.APPLIED, self.BAD)
        assert self.kept_out(applied, back) == ()
        assert self.kept_out(back, applied) != ()

    def test_what_had_tries_left_is_kept_out_for_now(self) -> None:
        back = [
            self.back(self.GOOD, self.BAD, digest=digest, source=f"/srv/c.raw.v/c_2+{tries}.raw")
            for digest, tries in (("d", "1-2"), ("e", "0-3"))
        ]
        state = made(remains(self.GOOD), *back)
        assert [(one.digest, one.for_now) for one in state.quarantine] == [("e", False), ("d", True)]
