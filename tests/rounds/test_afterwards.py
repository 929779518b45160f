# SPDX-License-Identifier: LGPL-2.1-or-later
"""What follows a round keeps nobody waiting: neither what is urgent, nor the other services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from watcher.rounds.afterwards import Afterwards


async def done_for(
    names: list[str],
    do: Callable[[str], Awaitable[None]],
    is_busy: Callable[[], bool] = lambda: False,
    seconds: float = 10.0,
) -> None:
    """Have it done for some services, and wait so long."""
    afterwards = Afterwards(do, 0.02, is_busy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(afterwards.run)
        for name in names:
            afterwards.due(name)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


async def test_it_is_done_once_for_each_however_often_it_is_due(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done: list[str] = []

    async def do(name: str) -> None:
        done.append(name)

    await done_for([f"{number % 50:02}" for number in range(200)], do)
    assert sorted(done) == [f"{number:02}" for number in range(50)]


async def test_one_that_hangs_goes_on_alone(autojump_clock: trio.testing.MockClock) -> None:
    done: list[str] = []

    async def do(name: str) -> None:
        if name == "05":
            await trio.sleep_forever()
        done.append(name)

    await done_for([f"{number:02}" for number in range(50)], do, seconds=1.0)
    assert len(done) == 49


async def test_a_few_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    under_way, most = 0, 0

    async def do(name: str) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await trio.sleep(0.01)
        under_way -= 1

    await done_for([f"{number}" for number in range(50)], do)
    assert most == 8


async def test_it_waits_until_nothing_is_more_urgent_but_not_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done: list[float] = []
    begun = trio.current_time()

    async def do(name: str) -> None:
        done.append(trio.current_time() - begun)

    await done_for(["web"], do, lambda: trio.current_time() < begun + 0.5)
    await done_for(["web"], do, lambda: True)
    assert 0.5 <= done[0] < 0.6
    assert 1.0 <= done[1] - 10.0 < 1.1
