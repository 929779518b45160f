# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of `Wait`, by how much work they make: looks, each of which is a thread, a mount table and a history."""

from __future__ import annotations

from collections.abc import Collection

import trio
import trio.testing

from watcher.control.waits import EventByImage, Waits
from watcher.model import Event, Kind, Layer, Outcome
from watcher.records.schema import Failed

NGINX = "nginx.service"


def event(outcome: Outcome, source: str = "/srv/web_1.4.raw", service: str = NGINX) -> Event:
    return Event(service, outcome, "said", when=1, source=source)


class Looks:
    """What is looked at; each look lasts until `go` is set."""

    def __init__(self) -> None:
        self.made: list[tuple[str, frozenset[str]]] = []
        self.known: dict[str, Event] = {}
        self.go = trio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def __call__(self, service: str, images: Collection[str]) -> EventByImage:
        self.made.append((service, frozenset(images)))
        before = dict(self.known)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return {image: before.get(image) for image in images}


async def wait(waits: Waits, image: str, verdicts: list[Event], service: str = NGINX) -> None:
    async def tell(event: Event) -> None:
        verdicts.append(event)

    verdicts.append(await waits.verdict(service, image, tell, lambda: None))


async def waiting(nursery: trio.Nursery, waits: Waits, count: int) -> list[Event]:
    verdicts: list[Event] = []
    for _ in range(count):
        nursery.start_soon(wait, waits, "web_1.4.raw", verdicts)
    await trio.testing.wait_all_tasks_blocked()
    return verdicts


async def test_many_that_come_at_once_share_a_look(autojump_clock: trio.testing.MockClock) -> None:
    looks = Looks()
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        waits = Waits(looks)
        await waiting(nursery, waits, 100)
        await waiting(nursery, waits, 200)
        assert len(looks.made) == 1
        looks.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == 2  # the second is for those who came during the first
        # While nothing happens nothing is done, for however long.
        await trio.sleep(1000)
        assert len(looks.made) == 2
        nursery.cancel_scope.cancel()


async def test_an_outcome_costs_no_look_and_wakes_only_those_it_is_about() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        verdicts = await waiting(nursery, waits, 300)
        before = len(looks.made)
        waits.tell(event(Outcome.REFUSED, "/srv/web_1.5.raw"))
        waits.tell(event(Outcome.REFUSED, service="other.service"))
        await trio.testing.wait_all_tasks_blocked()
        assert verdicts == []
        waits.tell(event(Outcome.INCOMPLETE))
        waits.tell(event(Outcome.REFUSED, "/srv/web_1.4+2-1.raw"))
        await trio.testing.wait_all_tasks_blocked()
        assert len(verdicts) == 600
        assert len(looks.made) == before


async def test_a_round_costs_one_look_for_all() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        verdicts = await waiting(nursery, waits, 300)
        before = len(looks.made)
        waits.round_over(NGINX)
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 1
        waits.round_over("other.service")
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 1
        # A stack that proved good without an outcome.
        looks.known["web_1.4.raw"] = event(Outcome.APPLIED)
        waits.round_over(NGINX)
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks.made) == before + 2
        assert verdicts == [looks.known["web_1.4.raw"]] * 300
    waits.round_over(NGINX)
    assert len(looks.made) == before + 2


async def test_what_is_known_while_a_round_goes_on_is_not_told() -> None:
    """Somebody has made a directory safe, and asks: the refusal before that is no answer."""
    looks = Looks()
    looks.known["web_1.4.raw"] = event(Outcome.REFUSED)
    waits = Waits(looks, lambda service: service == NGINX)
    async with trio.open_nursery() as nursery:
        verdicts = await waiting(nursery, waits, 1)
        assert verdicts == [] == looks.made
        looks.known["web_1.4.raw"] = event(Outcome.APPLIED)
        waits.round_over(NGINX)
    assert verdicts == [event(Outcome.APPLIED)]


async def test_what_happens_during_a_look_is_not_missed() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        verdicts = await waiting(nursery, waits, 1)
        looks.known["web_1.4.raw"] = event(Outcome.APPLIED)
        waits.round_over(NGINX)
        looks.go.set()
    assert verdicts == [event(Outcome.APPLIED)]
    async with trio.open_nursery() as nursery:
        looks.known.clear()
        looks.go = trio.Event()
        verdicts = await waiting(nursery, waits, 3)
        waits.tell(event(Outcome.REFUSED))
        looks.go.set()
    assert verdicts == [event(Outcome.REFUSED)] * 3


async def test_what_happens_during_a_look_is_newer_than_what_it_finds() -> None:
    """It has seen the image on the service, and that nothing is on trial any more: the rollback was in between."""
    looks = Looks()
    looks.known["web_1.4.raw"] = event(Outcome.APPLIED)
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        verdicts = await waiting(nursery, waits, 1)
        waits.tell(event(Outcome.ROLLED_BACK))
        looks.go.set()
    assert verdicts == [event(Outcome.ROLLED_BACK)]


async def test_who_looks_may_go_away() -> None:
    looks = Looks()
    waits = Waits(looks)
    async with trio.open_nursery() as nursery:
        looks.go = trio.Event()
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await wait(waits, "web_1.4.raw", [])

        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        verdicts = await waiting(nursery, waits, 2)
        looks.known["web_1.4.raw"] = event(Outcome.APPLIED)
        scope.cancel()
        looks.go.set()
    assert verdicts == [event(Outcome.APPLIED)] * 2


async def test_a_look_that_fails_fails_the_call_and_no_other_for_ever() -> None:
    looks = Looks()
    waits = Waits(looks)
    looks.error = Failed("the ledger cannot be read")
    failed = []

    async def one() -> None:
        try:
            await wait(waits, "web_1.4.raw", [])
        except Failed as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert failed == [looks.error] * 3
    looks.error = None
    async with trio.open_nursery() as nursery:
        verdicts = await waiting(nursery, waits, 1)
        waits.tell(event(Outcome.APPLIED))
    assert verdicts == [event(Outcome.APPLIED)]


async def test_an_outcome_of_a_stack_is_about_each_of_its_images() -> None:
    layer = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw")
    waits = Waits(Looks())
    applied = Event(NGINX, Outcome.APPLIED, "said", when=1, layers=(layer,))
    async with trio.open_nursery() as nursery:
        verdicts = await waiting(nursery, waits, 1)
        waits.tell(applied)
    assert verdicts == [applied]


async def test_a_slow_client_misses_the_oldest_and_never_the_verdict() -> None:
    waits = Waits(Looks())
    go = trio.Event()
    told: list[Event] = []

    async def tell(one: Event) -> None:
        told.append(one)
        await go.wait()

    async with trio.open_nursery() as nursery:
        verdicts: list[Event] = []

        async def one() -> None:
            verdicts.append(await waits.verdict(NGINX, "web_1.4.raw", tell, _nothing))

        nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(1000):
            waits.tell(event(Outcome.INCOMPLETE))
        waits.tell(event(Outcome.REFUSED))
        go.set()
    assert verdicts == [event(Outcome.REFUSED)]
    assert len(told) < 100


def _nothing() -> None:
    pass
