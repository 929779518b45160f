# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a watcher tells, for a test that asks."""

from __future__ import annotations

from pathlib import Path

import trio

from watcher.model import Interest, Scope
from watcher.watch.watcher import Watcher


class Told:
    """A watcher, and what it told since one last asked."""

    def __init__(self, watcher: Watcher, fence: Path) -> None:
        self.watcher = watcher
        self._changes = watcher.changes()
        self._fence = fence
        watcher.set("fence", [Interest(str(fence))])

    def watch(
        self, path: Path | str, scope: Scope = Scope.CHILDREN, pattern: str | None = None, key: str = "web"
    ) -> None:
        self.watcher.set(key, [Interest(str(path), scope, pattern)])

    async def reports(self) -> list[frozenset[str]]:
        """One by one, without the fence's own."""
        (self._fence / "crossed").touch()
        reports = []
        with trio.fail_after(30):
            async for keys in self._changes:
                reports.append(keys - {"fence"})
                if "fence" in keys:
                    return [report for report in reports if report]
        raise AssertionError("the changes ended")

    async def keys(self) -> set[str]:
        return set().union(*await self.reports())

    async def next(self) -> frozenset[str] | None:
        """The next report, without a fence; None: there is none for a day (of a clock that jumps when all wait)."""
        with trio.move_on_after(24 * 3600):
            return await anext(self._changes)
        return None

    async def expect(self, keys: set[str]) -> None:
        with trio.fail_after(300):
            assert await anext(self._changes) == keys
