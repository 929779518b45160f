# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that ends soon after a stack proved good with it: whose fault that is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from watcher.managers.base import Service
from watcher.model import Declared, Stack
from watcher.mounts.process import Process
from watcher.rounds.rollback import Rollback
from watcher.rounds.state import Afterglow, Memory, Trials
from watcher.settings.config import ServiceSettings

STACK = Stack()


class Bad(Rollback):
    """A judge that only notes what it would keep out."""

    def __init__(self, trials: Trials) -> None:
        nothing = cast(Any, None)
        store = SimpleNamespace(accepted=lambda name: STACK, was_damaged=lambda name, since: False)
        tools = SimpleNamespace(store=store, trials=trials, pending=None, watcher=None, offload=None)
        super().__init__(cast(Any, tools), nothing)
        self.bad: list[Stack] = []

    async def keep_out(self, service: Service, memory: Memory, stack: Stack, *args: Any, **more: Any) -> None:
        self.bad.append(stack)


@pytest.fixture
def service() -> Iterator[Service]:
    with subprocess.Popen(["sleep", "infinity"]) as program:
        with Process(program.pid) as main:
            yield Service("web.service", Declared(), ServiceSettings(), main=main, invocation="new")
        program.kill()


async def test_a_service_that_goes_down_just_after_it_was_told(tmp_path: Path, service: Service) -> None:
    """Also after Reload=restart, which is a new start, and where systemd has started it again already."""
    judge, memory = Bad(Trials(str(tmp_path))), Memory()
    for down in (
        replace(service, main=None, invocation="", failed=True),
        replace(service, invocation="third", restarts=1),
    ):
        memory.afterglow = glow = Afterglow(0, trio.current_time() + 60, STACK)
        await judge.notice_failure(replace(service, invocation="second"), memory)
        assert (judge.bad, memory.afterglow) == ([], glow)  # it is up: nothing is said yet
        await judge.notice_failure(down, memory)
        assert (judge.bad, memory.afterglow) == ([STACK], None)
        judge.bad.clear()


async def test_one_that_somebody_stops_or_that_goes_down_later_says_nothing(
    tmp_path: Path, service: Service
) -> None:
    judge, memory = Bad(Trials(str(tmp_path))), Memory()
    memory.afterglow = Afterglow(3, trio.current_time() + 60, STACK)
    await judge.notice_failure(replace(service, main=None, invocation=""), memory)
    await judge.notice_failure(replace(service, invocation="second", restarts=0), memory)
    memory.afterglow = Afterglow(0, trio.current_time(), STACK)
    await judge.notice_failure(replace(service, main=None, invocation="", failed=True), memory)
    assert (judge.bad, memory.afterglow) == ([], None)
