# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager of services without systemd, where it is asked for what it does not know any more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.managers.base import Reloaded, Service
from watcher.managers.standalone import Standalone
from watcher.model import Declared
from watcher.mounts.process import Process
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


async def test_a_services_processes_are_its_main_process_and_what_that_has_started(
    tmp_path: Path, main: Process
) -> None:
    manager = Standalone(str(tmp_path), MountWorkers.__new__(MountWorkers))
    service = Service("web.service", Declared(), ServiceSettings(), main=main, manager="standalone")
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert {main.pid, child.pid} <= set(manager.processes(service))
        child.kill()
    manager.close()
