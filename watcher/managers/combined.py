# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several managers as one: a systemd host may have standalone services, too."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence

import trio

from watcher.managers.base import Ended, Manager, Reloaded, Service
from watcher.model import Copy
from watcher.mounts.process import Process


class Combined:
    """See `Manager`. A service that two of them know by one name belongs to the first."""

    def __init__(self, managers: Sequence[Manager]) -> None:
        self._managers = managers

    @property
    def services(self) -> Mapping[str, Service]:
        # ChainMap is typed for mappings that can be changed; this one is only read.
        return ChainMap(*(manager.services for manager in self._managers))  # type: ignore[arg-type]

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for manager in self._managers:
                await nursery.start(manager.run, changed)
            task_status.started()

    async def current(self, name: str) -> Service | None:
        found = (manager for manager in self._managers if name in manager.services)
        return await next(found, self._managers[-1]).current(name)

    async def learn(self, service: Service) -> None:
        await self._of(service).learn(service)

    def learned(self, service: Service) -> bool:
        return self._of(service).learned(service)

    def tell(self, service: Service, main: Process) -> Reloaded | None:
        return self._of(service).tell(service, main)

    async def reload(self, service: Service) -> Reloaded:
        return await self._of(service).reload(service)

    async def started(self, service: Service) -> bool:
        return await self._of(service).started(service)

    async def revive(self, service: Service) -> Reloaded:
        return await self._of(service).revive(service)

    def hold_start(self, service: Service, other: str | None) -> None:
        self._of(service).hold_start(service, other)

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        return await self._of(service).execute(service, namespace, words, timeout_sec)

    async def execute_at_start(
        self, service: Service, copies: Sequence[Copy], words: Sequence[str], timeout_sec: float
    ) -> Ended:
        return await self._of(service).execute_at_start(service, copies, words, timeout_sec)

    def processes(self, service: Service) -> list[int]:
        return self._of(service).processes(service)

    async def logged(self, service: Service, since: int) -> str:
        return await self._of(service).logged(service, since)

    def _of(self, service: Service) -> Manager:
        found = (manager for manager in self._managers if service.name in manager.services)
        return next(found, self._managers[-1])
