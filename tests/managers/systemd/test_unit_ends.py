# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a unit went down is known until it goes down again, whatever systemd has forgotten or counted since."""

from __future__ import annotations

import signal
from typing import Any, cast

import pytest

from watcher.managers.systemd import journal_entries
from watcher.managers.systemd.systemd1 import Systemd1
from watcher.managers.systemd.unit_ends import UnitEnds

WEB = "web.service"
KILLED = {
    "Result": "signal",
    "NRestarts": 0,
    "ExecMainPID": 42,
    "ExecMainCode": 2,  # CLD_KILLED
    "ExecMainStatus": signal.SIGKILL,
}


class Systemd:
    """What it tells of one unit."""

    def __init__(self) -> None:
        self.invocation_id = "1"
        self.state = "failed"
        self.values: dict[str, Any] = dict(KILLED)
        self.job = ""

    async def service_properties(self, name: str) -> dict[str, Any]:
        return self.values

    async def invocation(self, name: str) -> str:
        return self.invocation_id

    async def job_type(self, name: str) -> str:
        return self.job

    async def get(self, name: str, key: str) -> str:
        return {"ActiveState": self.state, "SubState": self.state}[key]


async def test_a_kill_from_outside_is_remembered_while_the_next_start_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def sent(unit: str, invocation: str, pid: int) -> frozenset[str]:
        return frozenset({"SIGKILL"}) if (invocation, pid) == ("1", 42) else frozenset()

    monkeypatch.setattr(journal_entries, "sent_by_clients", sent)
    systemd, ends = Systemd(), UnitEnds()
    asked = cast(Systemd1, systemd)
    assert await ends.look(asked, WEB) == "1"
    why = "systemd was asked to send it SIGKILL"
    assert ends.blameless(WEB, 0, failed=True) == why
    systemd.values |= {"NRestarts": 1, "ExecMainPID": 0}  # auto-restart-queued
    await ends.look(asked, WEB)
    assert ends.blameless(WEB, 1, failed=True) == ends.blameless(WEB, 1, failed=False) == why
    systemd.invocation_id = "2"
    systemd.state = "active"  # started again, before anybody has seen that it was down
    systemd.values |= {"Result": "success", "ExecMainPID": 43}
    assert await ends.look(asked, WEB) is None
    assert ends.blameless(WEB, 1, failed=False) == why
    systemd.state = "failed"
    systemd.values |= KILLED | {"NRestarts": 1, "ExecMainPID": 43}
    await ends.look(asked, WEB)
    assert not ends.blameless(WEB, 1, failed=True)


@pytest.mark.parametrize(
    ("job", "blameless"), [("stop", True), ("restart", True), ("start", False), ("", False)]
)
async def test_how_it_takes_a_stop_is_not_its_own_doing(
    monkeypatch: pytest.MonkeyPatch, job: str, blameless: bool
) -> None:
    async def sent(*_: object) -> frozenset[str]:
        return frozenset()

    monkeypatch.setattr(journal_entries, "sent_by_clients", sent)
    systemd, ends = Systemd(), UnitEnds()
    systemd.job = job
    await ends.look(cast(Systemd1, systemd), WEB)
    assert bool(ends.blameless(WEB, 0, failed=True)) is blameless
    # We have asked for a restart ourselves since: that is another matter.
    systemd.job = "restart"
    await ends.look(cast(Systemd1, systemd), WEB)
    assert bool(ends.blameless(WEB, 0, failed=True)) is blameless
