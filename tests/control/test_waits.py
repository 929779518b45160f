# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of `Wait`, by how much work they make (looks, each a thread and a mount table), and when they end."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import trio
import trio.testing

from watcher.control.waits import Answers, Waits
from watcher.model import Event, Outcome
from watcher.records.schema import Failed
from watcher.rounds.answer import Answer, Kind

NGINX = "nginx.service"
IMAGE = "web_1.4.raw"


def known(kind: Kind, message: str = "said") -> Answer:
    return Answer(kind, Event(NGINX, Outcome.UNCHANGED, message, when=1))


CHECKING, ON_TRIAL = known(Kind.CHECKING), known(Kind.ON_TRIAL)
APPLIED, REFUSED = known(Kind.APPLIED), known(Kind.REFUSED)


class Looks:
    """What is looked at, and found; each look lasts until `go` is set."""

    def __init__(self) -> None:
        self.made: list[tuple[str, frozenset[str]]] = []
        self.found = CHECKING
        self.go = trio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def __call__(self, service: str, images: Collection[str]) -> Answers:
        self.made.append((service, frozenset(images)))
        found = self.found
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return dict.fromkeys(images, found)


class Calls:
    """Calls that wait, what they were told on the way, and how they ended."""

    def __init__(self, nursery: trio.Nursery, waits: Waits) -> None:
        self.told: list[Answer] = []
        self.ended: list[Answer] = []
        self._nursery = nursery
        self._waits = waits

    async def begin(self, count: int) -> None:
        for _ in range(count):
            self._nursery.start_soon(self._one)
        await trio.testing.wait_all_tasks_blocked()

    async def _one(self) -> None:
        self.ended.append(await self._waits.answer(NGINX, IMAGE, self._tell, lambda: None))

    async def _tell(self, answer: Answer) -> None:
        self.told.append(answer)


async def test_many_that_come_at_once_share_a_look(autojump_clock: trio.testing.MockClock) -> None:
    looks = Looks()
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        calls = Calls(nursery, Waits(looks))
        await calls.begin(100)
        await calls.begin(200)
        assert len(looks.made) == 1
        looks.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == 2  # the second is for those who came during the first
        assert calls.told == [CHECKING] * 300
        # While nothing happens nothing is done, for however long.
        await trio.sleep(1000)
        assert len(looks.made) == 2
        nursery.cancel_scope.cancel()


async def test_what_happens_costs_one_look_for_all() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, waits)
        await calls.begin(300)
        before = len(looks.made)
        waits.changed(NGINX)
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 1
        waits.changed("other.service", round_over=True)
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 1
        assert calls.told == [CHECKING] * 300  # the same is not told again
        looks.found = ON_TRIAL
        waits.changed(NGINX)
        await trio.testing.wait_all_tasks_blocked()
        assert calls.told[300:] == [ON_TRIAL] * 300
        looks.found = APPLIED
        waits.changed(NGINX, round_over=True)
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 3
        assert calls.ended == [APPLIED] * 300
    waits.changed(NGINX)
    assert len(looks.made) == before + 3


@pytest.mark.parametrize("final", [APPLIED, REFUSED])
async def test_what_is_known_is_told_at_once(final: Answer) -> None:
    looks = Looks()
    looks.found = final
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, Waits(looks))
        await calls.begin(1)
        assert (calls.told, calls.ended, len(looks.made)) == ([], [final], 1)


async def test_what_a_round_may_make_better_is_told_after_it() -> None:
    """Somebody has mended what an image was refused for, and asks."""
    looks = Looks()
    looks.found = REFUSED
    waits = Waits(looks, lambda service: service == NGINX)
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, waits)
        await calls.begin(1)
        waits.changed(NGINX)  # its outcome is in the history, and its record is still to be written
        await trio.testing.wait_all_tasks_blocked()
        assert (calls.told, calls.ended) == ([known(Kind.LOOKING)], [])
        looks.found = APPLIED
        waits.changed(NGINX, round_over=True)
    assert calls.ended == [APPLIED]


async def test_a_service_that_is_always_in_a_round_is_answered() -> None:
    looks = Looks()
    looks.found = REFUSED
    waits = Waits(looks, lambda service: True)
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, waits)
        await calls.begin(1)
        assert calls.ended == []
        waits.changed(NGINX, round_over=True)
    assert calls.ended == [REFUSED]


async def test_a_success_waits_for_no_round() -> None:
    looks = Looks()
    looks.found = APPLIED
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, Waits(looks, lambda service: True))
        await calls.begin(1)
        assert calls.ended == [APPLIED]


async def test_what_happens_during_a_look_is_not_missed() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        calls = Calls(nursery, waits)
        await calls.begin(1)
        looks.found = APPLIED
        waits.changed(NGINX)
        looks.go.set()
    assert calls.ended == [APPLIED]


async def test_who_looks_may_go_away() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await Calls(nursery, waits)._one()

        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        calls = Calls(nursery, waits)
        await calls.begin(2)
        looks.found = APPLIED
        scope.cancel()
        looks.go.set()
    assert calls.ended == [APPLIED] * 2


async def test_a_look_that_fails_fails_the_call_and_no_other_for_ever() -> None:
    looks = Looks()
    waits = Waits(looks)
    looks.error = Failed("the ledger cannot be read")
    failed = []

    async def one(calls: Calls) -> None:
        try:
            await calls._one()
        except Failed as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one, Calls(nursery, waits))
    assert failed == [looks.error] * 3
    looks.error, looks.found = None, APPLIED
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, waits)
        await calls.begin(1)
    assert calls.ended == [APPLIED]


async def test_a_slow_client_is_told_the_newest() -> None:
    looks = Looks()
    waits = Waits(looks)
    go = trio.Event()
    told: list[Answer] = []
    ended: list[Answer] = []

    async def tell(one: Answer) -> None:
        told.append(one)
        await go.wait()

    async with trio.open_nursery() as nursery:

        async def one() -> None:
            ended.append(await waits.answer(NGINX, IMAGE, tell, lambda: None))

        nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(1000):
            looks.found = known(Kind.INCOMPLETE, f"{number} of 1000 bytes")
            waits.changed(NGINX)
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        looks.found = REFUSED
        waits.changed(NGINX, round_over=True)
    assert ended == [REFUSED]
    assert told == [CHECKING, known(Kind.INCOMPLETE, "999 of 1000 bytes")]
