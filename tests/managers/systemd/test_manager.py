# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of systemd's manager that needs no systemd; the rest is tested in tests/beds/."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, new_signal

from watcher.images.stacks import Stacks
from watcher.managers.base import Service
from watcher.managers.systemd import manager, systemd1
from watcher.managers.systemd.unit_files import Index
from watcher.managers.systemd.wire import Received
from watcher.model import Declared, Entry, Kind, Layer, Stack
from watcher.settings.config import ServiceSettings, Settings

WEB = Service("web.service", Declared(), ServiceSettings())


def signal(member: str, signature: str, *body: object) -> Received:
    message = new_signal(DBusAddress("/", interface="a.b"), member, signature, body)
    return Received(message.serialise(serial=1))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[manager.Systemd]:
    systemd = manager.Systemd(Settings(state_directory=str(tmp_path)))
    yield systemd
    systemd.close()


async def test_a_systemd_that_starts_anew_ends_the_waiting(systemd: manager.Systemd) -> None:
    with systemd._job_results.listening() as listener:
        systemd._on_signal(signal("NameOwnerChanged", "sss", systemd1.NAME, ":1.0", ""))
        assert await listener.result("/job/1") == ""


async def test_a_drop_in_is_compared_again_only_when_something_else_is_listed(
    systemd: manager.Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def stale(index: Index, names: Iterable[str], *_: Any, **__: Any) -> dict[str, str]:
        compared.extend(names)
        return {}

    monkeypatch.setattr(manager, "stale", stale)

    async def learned(*slots: str, digest: str = "0", missing: str = "", sysext: str = "") -> bool:
        """Whether it was compared, once these are accepted."""
        compared.clear()
        layers = [Layer(s, "x", "", digest * 64, Kind.IMAGE, "") for s in slots if s != missing]
        entries = [Entry(slot, f"/srv/{slot}", Kind.IMAGE) for slot in slots]
        sysexts = (sysext,) if sysext else ()
        change = functools.partial(replace, sysexts=sysexts)
        Stacks(str(tmp_path)).accept("web.service", Stack(tuple(layers)), entries, change=change)
        if not systemd.learned(WEB):
            await systemd.learn(WEB)
        return bool(compared)

    assert await learned("web.raw")
    assert not await learned("web.raw", digest="1")
    assert await learned("web.raw", "base.raw")
    assert not await learned("web.raw", "base.raw")
    assert await learned("web.raw", "base.raw", missing="web.raw")
    # Which of its files a sysext is, the drop-in says, too.
    assert await learned("web.raw", sysext="/srv/tools.raw.v")
    assert await learned("web.raw", sysext="/srv/tools.raw.v")
    assert await learned("web.raw")
    assert not await learned("web.raw")
    systemd._tracker.index = Index(())  # a daemon-reload
    assert await learned("web.raw")


async def test_a_drop_in_that_is_not_loaded_yet_is_compared_again(
    systemd: manager.Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stacks(str(tmp_path)).accept("web.service", Stack(()), [Entry("web.raw", "/srv/web.raw", Kind.IMAGE)])
    asked: list[str] = []

    async def request() -> None:
        asked.append("daemon-reload")

    monkeypatch.setattr(systemd._reloads, "request", request)
    monkeypatch.setattr(manager, "stale", lambda index, names, *_, **__: dict.fromkeys(names, "text"))
    for _ in range(2):
        await systemd.learn(WEB)
    assert asked == ["daemon-reload"] * 2
