# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many daemon-reloads come of how many requests."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from watcher.managers.systemd.daemon_reload import DaemonReload, ReloadRefused


class Systemd:
    """Counts; each reload takes `seconds`."""

    def __init__(self, seconds: float = 0.05, refusals: int = 0) -> None:
        self.begun: list[float] = []
        self.refusals = refusals
        self._seconds = seconds

    async def reload(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ReloadRefused("rate limit")
        self.begun.append(trio.current_time())
        await trio.sleep(self._seconds)


async def test_a_hundred_requests_in_a_second_make_one_or_two(autojump_clock: trio.testing.MockClock) -> None:
    systemd = Systemd()
    shared = DaemonReload(systemd.reload, 5, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        async with trio.open_nursery() as requests:
            for _ in range(100):
                requests.start_soon(shared.request)
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert len(systemd.begun) == 2


async def test_a_request_during_a_reload_gets_another_one(autojump_clock: trio.testing.MockClock) -> None:
    systemd = Systemd(seconds=5)
    shared = DaemonReload(systemd.reload, 5, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        first = shared.ask()
        await trio.sleep(1)
        second = shared.ask()
        await first.over.wait()
        assert len(systemd.begun) == 1 and not second.over.is_set()
        await second.over.wait()
        assert len(systemd.begun) == 2
        nursery.cancel_scope.cancel()


async def test_no_more_than_the_limit_begin_in_any_interval(autojump_clock: trio.testing.MockClock) -> None:
    systemd = Systemd()
    shared = DaemonReload(systemd.reload, 3, 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        for _ in range(12):
            await shared.request()
        nursery.cancel_scope.cancel()
    for before, after in zip(systemd.begun, systemd.begun[3:], strict=False):
        assert after - before >= 20


async def test_no_limit_still_keeps_a_distance(autojump_clock: trio.testing.MockClock) -> None:
    systemd = Systemd(seconds=0)
    shared = DaemonReload(systemd.reload, 0, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        for _ in range(3):
            await shared.request()
        nursery.cancel_scope.cancel()
    assert all(after - before >= 1 for before, after in zip(systemd.begun, systemd.begun[1:], strict=False))


async def test_what_systemd_refuses_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    systemd = Systemd(refusals=3)
    shared = DaemonReload(systemd.reload, 5, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        with pytest.raises(ReloadRefused, match="rate limit"):
            await shared.request()
        assert not systemd.begun  # who waits for it is let go
        await trio.sleep(60)
        assert len(systemd.begun) == 1
        nursery.cancel_scope.cancel()


async def test_a_request_whose_turn_does_not_come_is_let_go_and_stays_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    systemd = Systemd()
    shared = DaemonReload(systemd.reload, 1, 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        await shared.request()
        with pytest.raises(ReloadRefused, match="its turn has not come"):
            await shared.request()
        await trio.sleep(1000)
        assert len(systemd.begun) == 2
        nursery.cancel_scope.cancel()


async def test_what_goes_wrong_is_tried_again_and_holds_nobody_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    systemd = Systemd()
    errors = [OSError(24, "Too many open files"), ValueError()]

    async def reload() -> None:
        if errors:
            raise errors.pop()
        await systemd.reload()

    shared = DaemonReload(reload, 5, 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        await shared.request()
        assert not systemd.begun
        await trio.sleep(60)
        assert len(systemd.begun) == 1
        nursery.cancel_scope.cancel()
