# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that may hang (watch/jobs.py): one thread for each key, and nobody waits for another's.

With `records/together.py`: what is done for several jobs at once.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import pytest
import trio
import trio.testing

from watcher.records.together import Gathering, Together
from watcher.watch import offload
from watcher.watch.offload import Offload, Unanswered

PATIENCE = 30.0


@pytest.fixture
def free() -> Iterator[threading.Event]:
    """What hangs goes on when this is set."""
    event = threading.Event()
    yield event
    event.set()


async def test_results_and_errors_come_back() -> None:
    work = Offload()
    assert await work.run("web", divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await work.run("web", divmod, 7, 0)


async def test_one_at_a_time_for_each_key(free: threading.Event) -> None:
    work, order = Offload(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run, "web", free.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(work.run, "web", order.append, "second")
        await work.run("other", order.append, "other")
        free.set()
    assert order == ["other", "second"]


async def test_one_that_hangs_is_given_up_once_and_told_when_it_is_back(
    free: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = trio.Event()
    keys: list[str] = []
    work = Offload(lambda key: (keys.append(key), back.set())[0])
    with monkeypatch.context() as patch, pytest.raises(Unanswered):
        patch.setattr(offload, "HANGS_SEC", 0.1)  # too short for what has to be done on a busy machine
        await work.run("web", free.wait)
    threads = threading.active_count()
    for _ in range(5):
        with pytest.raises(Unanswered):
            await work.run("web", divmod, 7, 2)
    assert threading.active_count() == threads
    assert await work.run("other", divmod, 7, 2) == (3, 1)
    free.set()
    with trio.fail_after(30):
        await back.wait()
    assert keys == ["web"]
    assert await work.run("web", divmod, 7, 2) == (3, 1)


async def test_who_is_cancelled_goes_and_the_next_waits_for_what_he_left(free: threading.Event) -> None:
    work, order = Offload(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run, "web", free.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run, "web", order.append, "next")
        await work.run("other", order.append, "other")
        free.set()
    assert order == ["other", "next"]


async def test_a_crowd_that_hangs_keeps_nobody_waiting(free: threading.Event) -> None:
    work = Offload()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(work.run, f"{number}", free.wait)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            assert await work.run("other", divmod, 7, 2) == (3, 1)
        free.set()


async def test_a_short_wait_gives_nothing_up(free: threading.Event) -> None:
    work = Offload()
    with pytest.raises(Unanswered):
        await work.run_within(0.01, "web", free.wait)
    free.set()
    assert await work.run("web", divmod, 7, 2) == (3, 1)


async def test_our_own_files_wait_for_nobodys_turn_and_nobody_gives_them_up(
    free: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Offload()
    monkeypatch.setattr(offload, "HANGS_SEC", 0.1)
    async with trio.open_nursery() as nursery:
        with pytest.raises(Unanswered):
            await work.run("web", free.wait)
        nursery.start_soon(trio.to_thread.run_sync, lambda: (time.sleep(0.3), free.set()))
        assert await work.run_alone(divmod, 7, 2) == (3, 1)
        assert await work.run_alone(free.wait)


async def test_without_a_thread_a_job_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Offload()
    start, refused = trio.lowlevel.start_thread_soon, []

    def not_yet(*args: object) -> None:
        if len(refused) < 3:
            refused.append(args)
            raise RuntimeError("can't start new thread")
        start(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", not_yet)
    with trio.fail_after(PATIENCE):
        assert await work.run("web", divmod, 7, 2) == (3, 1)
    assert len(refused) == 3


async def test_what_never_begins_is_dropped(free: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    work, dropped = Offload(), list[str]()

    def begun() -> Gathering[None]:
        yield from ()
        dropped.append("begun")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run, "web", free.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Unanswered), monkeypatch.context() as patch:
            patch.setattr(offload, "HANGS_SEC", 0.05)
            await work.run_gathering("web", begun, lambda: dropped.append("dropped"))
        free.set()
    await work.run("web", divmod, 7, 2)
    assert dropped == ["dropped"]


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_hangs_fails_and_is_cancelled_nothing_is_lost_or_mixed_up(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "HANGS_SEC", 0.25)
    chance, busy, overlaps = random.Random(seed), set[str](), list[str]()
    work = Offload()

    def job(key: str, seconds: float, *, fails: bool) -> str:
        if key in busy:
            overlaps.append(key)
        busy.add(key)
        try:
            time.sleep(seconds)
            if fails:
                raise ValueError(key)
            return key
        finally:
            busy.discard(key)

    async def user() -> None:
        for _ in range(30):
            key, fails = f"key{chance.randrange(8)}", chance.random() < 0.1
            seconds = chance.choice([0.0, 0.0, 0.0, 0.0005, 0.005, 0.02, 0.05, 0.4 * (chance.random() < 0.1)])
            limit = chance.choice([9.0, 9.0, 9.0, 0.001, 0.01, 0.03])
            with trio.move_on_after(limit):
                try:
                    assert await work.run(key, job, key, seconds, fails=fails) == key
                    assert not fails
                except ValueError as error:
                    assert fails and error.args == (key,)
                except Unanswered:
                    pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.00001)
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for _ in range(12):
                    nursery.start_soon(user)
            while work._keys:
                await trio.sleep(0.01)
            for number in range(8):
                assert await work.run(f"key{number}", divmod, 7, 2) == (3, 1)
    finally:
        sys.setswitchinterval(interval)
    assert not overlaps and not work._queue and not work._ended


class Disk:
    """What jobs need: it counts for how many at once."""

    def __init__(self, fails: bool = False) -> None:
        self.groups: list[list[int]] = []
        self.fails = fails

    def sync(self, numbers: Sequence[int]) -> None:
        self.groups.append(list(numbers))
        if self.fails:
            raise OSError("no room")

    def job(self, number: int, *, last: bool = False) -> Gathering[int]:
        for _ in range(2):
            yield Together(self.sync, number, last)
        return number


async def all_of(work: Offload, jobs: Iterable[Gathering[int]]) -> list[int]:
    done = []

    async def run(number: int, job: Gathering[int]) -> None:
        done.append(await work.run_gathering(str(number), lambda: job))

    async with trio.open_nursery() as nursery:
        for number, job in enumerate(jobs):
            nursery.start_soon(run, number, job)
    return sorted(done)


async def test_what_several_need_is_done_for_them_together_and_for_the_first_at_once() -> None:
    work, disk = Offload(), Disk()
    assert await all_of(work, map(disk.job, range(300))) == list(range(300))
    assert len(disk.groups[0]) == 1
    assert len(disk.groups) < 40, "hardly together"
    assert sorted(number for group in disk.groups for number in group) == sorted([*range(300)] * 2)
    assert max(map(len, disk.groups)) <= 2 * offload._GATHERED_MAX


async def test_what_nobody_waits_for_is_done_when_nothing_else_is_left() -> None:
    work, disk, order = Offload(), Disk(), list[int]()

    def plain(number: int) -> Gathering[int]:
        yield from ()
        order.append(len(disk.groups))
        return number

    jobs = [disk.job(0, last=True), *(plain(number) for number in range(1, 20)), disk.job(20, last=True)]
    assert await all_of(work, jobs) == list(range(21))
    assert set(order) == {0}
    assert [len(group) for group in disk.groups] == [2, 2]


async def test_what_nobody_waits_for_is_done_though_something_else_is_always_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "HANGS_SEC", 5.0)
    jobs = Offload()
    over = False

    async def without_end(key: str) -> None:
        while not over:
            await jobs.run(key, time.sleep, 0.002)

    def last() -> Gathering[str]:
        yield Together(lambda items: None, None, last=True)
        return "done"

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(without_end, f"busy{number}")
        try:
            assert await jobs.run_gathering("one", last) == "done"
        finally:
            over = True


async def test_an_error_of_what_is_needed_is_raised_in_each_that_needs_it() -> None:
    work, disk, caught = Offload(), Disk(fails=True), list[int]()

    def job(number: int) -> Gathering[int]:
        try:
            yield Together(disk.sync, number)
        except OSError:
            caught.append(number)
        return number

    assert await all_of(work, map(job, range(10))) == list(range(10))
    assert sorted(caught) == list(range(10))
    with pytest.raises(OSError, match="no room"):
        await work.run_gathering("web", lambda: disk.job(1))


async def test_one_that_hangs_keeps_nobody_from_what_he_needs(free: threading.Event) -> None:
    work, disk = Offload(), Disk()

    def hangs() -> Gathering[int]:
        yield Together(disk.sync, -1)
        free.wait()
        yield Together(disk.sync, -2)
        return -1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run_gathering, "web", hangs)
        with trio.fail_after(PATIENCE):
            assert await all_of(work, map(disk.job, range(20))) == list(range(20))
            free.set()
    assert [-2] in disk.groups


async def test_what_is_just_being_written_down_comes_to_its_end_when_it_is_cancelled(
    free: threading.Event,
) -> None:
    work, done = Offload(), list[str]()

    def job(name: str) -> Gathering[None]:
        yield Together(lambda _: free.wait(), None)
        done.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run_gathering, "web", lambda: job("web"), lambda: None, lambda: True)
        await trio.testing.wait_all_tasks_blocked()
        threading.Timer(0.1, free.set).start()
        nursery.cancel_scope.cancel()
    assert done == ["web"]


async def test_a_lull_is_over_when_something_is_done_and_never_takes_long(free: threading.Event) -> None:
    work = Offload()
    await work.lull()  # nothing to wait for
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work.run, "web", free.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert work.is_busy
        with trio.fail_after(PATIENCE):
            await work.lull()  # one that hangs
        free.set()
    while work.is_busy:
        await trio.sleep(0.001)
