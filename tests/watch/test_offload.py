# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that may hang: one thread for each key, and nobody waits for another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from watcher.watch import offload
from watcher.watch.offload import Offload, Unanswered


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


async def test_a_crowd_that_hangs_keeps_nobody_waiting(
    free: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CROWD_SEC", 0.01)
    work = Offload()
    async with trio.open_nursery() as nursery:
        for number in range(2 * offload.CROWD):
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
