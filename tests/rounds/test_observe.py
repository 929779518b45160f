# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is to be watched for many services that have the same directories is found out once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from watcher.managers.base import Service
from watcher.model import Declared, Interest
from watcher.records.together import alone
from watcher.rounds.memory import Memory, Round
from watcher.rounds.observe import Observer
from watcher.settings.config import ServiceSettings
from watcher.watch.offload import Unanswered

MANY = 20


class Bench:
    """An observer, with jobs that take a while.

    Attributes:
        jobs: the services in whose turn there was one.
        watched: what is watched, by service.
        fate: what becomes of the first job, "hangs" or "fails"; "": as all others, it ends well.
    """

    def __init__(self, directory: Path) -> None:
        self.jobs: list[str] = []
        self.watched: dict[str, tuple[Interest, ...]] = {}
        self.fate = ""
        self.memories = {f"web@{number}.service": Memory() for number in range(MANY)}
        self._declared = Declared(confext_dirs=(str(directory),))
        tools = SimpleNamespace(in_turn=self._in_turn, watcher=SimpleNamespace(watch=self._watch))
        self._observer = Observer(cast(Any, tools), cast(Any, None), cast(Any, None), self.memories)

    async def _in_turn(self, service: Service, job: Callable[[Service], Any]) -> Any:
        self.jobs.append(service.name)
        fate = self.fate if len(self.jobs) == 1 else ""
        await trio.sleep(30 if fate == "hangs" else 0.01)
        if fate == "hangs":
            raise Unanswered
        if fate == "fails":
            raise OSError("no descriptor is left")
        return alone(job(service))

    async def _watch(self, name: str, interests: Iterable[Interest]) -> bool:
        self.watched[name] = tuple(interests)
        return True

    async def prepare(self, name: str) -> None:
        service = Service(name, self._declared, ServiceSettings())
        await self._observer.prepare(service, self.memories[name], Round(0.0, 0))

    async def prepare_all(self) -> float:
        """All at once. How long it took the slowest of those that have come to an end, seconds."""
        took = []

        async def one(name: str) -> None:
            begun = trio.current_time()
            try:
                await self.prepare(name)
            except (OSError, Unanswered):
                assert name == self.jobs[0]
            else:
                took.append(trio.current_time() - begun)

        async with trio.open_nursery() as nursery:
            for name in self.memories:
                nursery.start_soon(one, name)
        return max(took)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def run(function: Callable[[], Any]) -> Any:
    return trio.run(function, clock=MockClock(autojump_threshold=0))


def test_one_job_finds_out_for_all(bench: Bench, tmp_path: Path) -> None:
    run(bench.prepare_all)
    assert len(bench.jobs) == 1 and len(bench.watched) == MANY
    assert len(set(bench.watched.values())) == 1
    assert str(tmp_path) in {interest.path for interest in bench.watched["web@1.service"]}
    assert all(memory.interests is not None for memory in bench.memories.values())


def test_what_is_watched_already_is_not_asked_for_again(bench: Bench) -> None:
    run(bench.prepare_all)
    bench.watched.clear()
    run(bench.prepare_all)
    assert len(bench.jobs) == 1 and not bench.watched


def test_one_that_comes_later_looks_for_itself(bench: Bench) -> None:
    """What was seen then may not be so any more."""
    run(lambda: bench.prepare("web@1.service"))
    run(lambda: bench.prepare("web@2.service"))
    assert bench.jobs == ["web@1.service", "web@2.service"]


@pytest.mark.parametrize("fate", ["hangs", "fails"])
def test_one_that_hangs_or_fails_keeps_the_others_waiting_for_no_longer_than_a_moment(
    bench: Bench, fate: str
) -> None:
    bench.fate = fate
    assert run(bench.prepare_all) < 0.5
    assert len(bench.watched) == MANY - 1
    run(lambda: bench.prepare(bench.jobs[0]))
    assert len(bench.watched) == MANY
