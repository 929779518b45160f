# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of systemd's manager that needs no systemd; the rest is tested in tests/beds/."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from jeepney import HeaderFields, Message

from watcher.managers.systemd import manager, systemd1
from watcher.settings.config import Settings


def signal(member: str, signature: str, *body: object) -> Message:
    fields = {HeaderFields.member: member, HeaderFields.signature: signature}
    return cast(Message, SimpleNamespace(header=SimpleNamespace(fields=fields), body=body))


async def test_a_systemd_that_starts_anew_ends_the_waiting(tmp_path: Path) -> None:
    systemd = manager.Systemd(Settings(state_directory=str(tmp_path)))
    with systemd._job_results.listening() as listener:
        systemd._on_signal(signal("NameOwnerChanged", "sss", systemd1.NAME, ":1.0", ""))
        assert await listener.result("/job/1") == ""
