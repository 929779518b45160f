# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager of services without systemd, where it is asked for what it does not know any more."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from watcher.managers import standalone
from watcher.managers.base import Reloaded, Service
from watcher.managers.standalone import Standalone
from watcher.model import Declared
from watcher.mounts.process import Process, descendants
from watcher.mounts.workers import MountWorkers
from watcher.settings.config import ServiceSettings


@pytest.fixture
def main() -> Iterator[Process]:
    with Process(os.getpid()) as process:
        yield process


async def test_a_service_whose_registration_has_gone_meanwhile_is_not_told(
    tmp_path: Path, main: Process
) -> None:
    manager = Standalone(str(tmp_path), MountWorkers.__new__(MountWorkers))
    gone = Service("web.service", Declared(), ServiceSettings(), main=main, manager="standalone")
    assert await manager.reload(gone) == Reloaded(ok=True)
    manager.close()


async def test_the_event_loop_does_not_count_a_services_processes(
    tmp_path: Path, main: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any service can have tens of thousands of them, and as many threads to ask for their children."""
    counted_by = []

    def counted(pid: int, apart: Collection[int]) -> list[int]:
        counted_by.append(threading.current_thread())
        return descendants(pid, apart)

    monkeypatch.setattr(standalone, "descendants", counted)
    manager = Standalone(str(tmp_path), MountWorkers.__new__(MountWorkers))
    service = Service("web.service", Declared(), ServiceSettings(), main=main, manager="standalone")
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert child.pid in await manager.processes(service)
        child.kill()
    assert counted_by and threading.main_thread() not in counted_by
    manager.close()
