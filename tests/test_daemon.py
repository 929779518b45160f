# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon itself: when it is ready, which units it sees to, what does not end it.

With wiring.py and records/alone.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import trio
import trio.testing

from watcher import wiring
from watcher.daemon import Daemon
from watcher.managers.base import Service
from watcher.managers.systemd import sd_notify
from watcher.model import Busy, Later
from watcher.mounts.whereabouts import WorkerLost
from watcher.records import journal
from watcher.records.alone import AlreadyRunning, alone
from watcher.rounds.tools import Tools
from watcher.settings.config import Settings

UNIT = Path(__file__).parent.parent / "units/confext-watcher.service.in"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged, and "ready" where systemd is told so."""
    lines: list[str] = []
    monkeypatch.setattr(journal, "log", SimpleNamespace(info=lines.append, warning=lines.append))
    monkeypatch.setattr(sd_notify, "ready", lambda: lines.append("ready"))
    yield lines


def made(collect: Callable[..., object] = lambda mounted, worn: ()) -> Daemon:
    async def run(key: str, function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)

    def call(function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)

    tools = SimpleNamespace(
        store=SimpleNamespace(collect=collect, without_layers=lambda: (), settle=lambda: None),
        workers=SimpleNamespace(call=call, images=SimpleNamespace(retain=lambda mounted: None)),
        admission=SimpleNamespace(forget=lambda digests: None),
        manager=SimpleNamespace(services={"web": None}),
        watcher=None,
        ledger=None,
        offload=SimpleNamespace(run=run),
        run_aside=None,
    )
    return Daemon(Settings(), cast(Tools, tools))


async def test_it_is_ready_when_all_were_looked_at(
    said: list[str], autojump_clock: trio.testing.MockClock
) -> None:
    daemon = made()
    daemon._unseen = {"web", "db"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon._when_looked)
        for name in ("web", "db"):
            await trio.sleep(1)
            assert said == []
            daemon._looked_at(name)
    assert said == ["watching for 1 service", "ready"]
    assert trio.current_time() < 3


async def test_it_is_ready_before_systemd_loses_patience(
    said: list[str], autojump_clock: trio.testing.MockClock
) -> None:
    daemon = made()
    daemon._unseen = {"web"}
    begun = trio.current_time()
    await daemon._when_looked()
    patience = re.search(r"^TimeoutStartSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert patience is not None
    assert said[-1] == "ready" and "not looked at within 30 s" in said[0] and said[0].endswith(": web")
    assert trio.current_time() - begun <= int(patience[1]) / 2


async def test_a_bug_in_a_round_loses_no_drop(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "log", SimpleNamespace(exception=lambda text, service: said.append(text)))
    daemon, errors = made(), [ValueError("one"), ValueError("two"), TypeError("one"), None]

    async def round(*_: object) -> float | None:
        if (error := errors.pop(0)) is not None:
            raise error
        return None

    monkeypatch.setattr(daemon._rounds, "round", round)
    again = [await daemon._round(cast(Service, SimpleNamespace(name="web")), 0.0, 0.0) for _ in range(4)]
    assert again == [30.0, 30.0, 30.0, None]
    assert said == ["web: a bug in confext-watcher; it keeps what it has, and is tried again"] * 2


async def test_the_first_service_of_a_burst_does_not_wait_until_all_others_have_begun() -> None:
    daemon, begun, lulls = made(), list[str](), list[int]()

    async def rounds_of(name: str) -> None:
        begun.append(name)

    async def lull() -> None:
        lulls.append(len(begun))

    vars(daemon)["_rounds_of"] = rounds_of
    vars(daemon._tools.offload)["lull"] = lull
    names = {f"{number}" for number in range(40)}
    async with trio.open_nursery() as nursery:
        for name in names:
            daemon.changed(name)
        nursery.start_soon(daemon._start_rounds, nursery)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert set(begun) == names
    assert lulls == [1, 5, 21, 37]


async def test_it_is_ready_at_once_without_services(said: list[str]) -> None:
    await made()._when_looked()
    assert said[-1] == "ready"


@pytest.mark.parametrize(
    "error", [Later("no copy can be removed: Read-only file system"), WorkerLost("no way back")]
)
async def test_what_cannot_be_tidied_up_is_said_once(said: list[str], error: Exception) -> None:
    broken = True

    def collect(mounted: frozenset[str], worn: frozenset[str]) -> tuple[str, ...]:
        if broken:
            raise error
        return ()

    daemon = made(collect)
    for _ in range(2):
        await daemon._tidy(frozenset())
    assert said == [f"not tidied up, it is tried again: {error}"]
    broken = False
    await daemon._tidy(frozenset())
    broken = True
    await daemon._tidy(frozenset())
    assert len(said) == 2


async def test_it_tidies_up_once_for_what_is_dropped_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, said: list[str], autojump_clock: trio.testing.MockClock
) -> None:
    tidied: list[bool] = []

    def collect(mounted: frozenset[str], worn: frozenset[str]) -> tuple[str, ...]:
        tidied.append(bool(daemon._running))
        return ()

    async def at_once(function: Callable[..., object], *arguments: object, **_: object) -> object:
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)  # that clock knows nothing of threads
    daemon = made(collect)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon._when_idle)
        for _ in range(5):  # rounds that follow one another
            daemon._running.add("web")
            await trio.sleep(0.04)
            daemon._running.clear()
            daemon._idle.set()
            await trio.sleep(0.01)
        assert tidied == []
        daemon._running.add("web")  # it has waited long enough, but a round runs
        await trio.sleep(1)
        assert tidied == []
        daemon._running.clear()
        daemon._idle.set()
        await trio.sleep(1)
        assert tidied == [False]
        nursery.cancel_scope.cancel()


async def test_a_start_of_a_service_puts_tidying_up_off_in_silence(said: list[str]) -> None:
    def collect(mounted: frozenset[str], worn: frozenset[str]) -> NoReturn:
        raise Busy("copies are being made")

    await made(collect)._tidy(frozenset())
    assert said == []


def test_an_error_of_its_own_is_not_put_down_to_another_daemon(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), alone(str(tmp_path)):
        with pytest.raises(AlreadyRunning), alone(str(tmp_path)):
            pass
        raise BlockingIOError


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root on a host that systemd runs."""
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system" or isdir(path))
    monkeypatch.setattr(wiring, "may_mount", lambda: True)


@pytest.mark.usefixtures("booted")
def test_the_systems_daemon_sees_to_units_and_one_with_a_state_of_its_own_does_not() -> None:
    assert wiring.on_systemd(Settings())
    assert not wiring.on_systemd(dataclasses.replace(Settings(), state_directory="/tmp/demo/state"))
