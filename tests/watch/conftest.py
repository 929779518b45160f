# SPDX-License-Identifier: LGPL-2.1-or-later
"""`told`: a watcher, and what it told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.told import Told
from watcher.watch.watcher import Watcher


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    fence = tmp_path / "fence"
    fence.mkdir()
    with Watcher() as watcher:
        yield Told(watcher, fence)
