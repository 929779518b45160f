# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager of services without systemd, where it is asked for what it does not know any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.config import ServiceSettings
from watcher.managers import Reloaded, Service
from watcher.managers.standalone import Standalone
from watcher.model import Declared
from watcher.mounts.workshop import Workshop
from watcher.process import Process


@pytest.fixture
def main() -> Iterator[Process]:
    with Process(os.getpid()) as process:
        yield process


async def test_a_service_whose_registration_has_gone_meanwhile_is_not_told(
    tmp_path: Path, main: Process
) -> None:
    manager = Standalone(str(tmp_path), Workshop.__new__(Workshop))
    gone = Service("web.service", Declared(), ServiceSettings(), main=main, manager="standalone")
    assert await manager.reload(gone) == Reloaded(ok=True)
    manager.close()
