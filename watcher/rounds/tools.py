# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every round works with. The daemon makes it once; a test makes what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

from watcher.images.admission import Admission
from watcher.images.store import Store
from watcher.managers.aside import RunAside
from watcher.managers.base import Manager, Service
from watcher.mounts.process import Gone
from watcher.mounts.workers import MountWorkers
from watcher.records.ledger import Ledger
from watcher.records.together import Gathering
from watcher.rounds.patience import Removals
from watcher.settings.config import Settings
from watcher.watch.offload import Offload
from watcher.watch.patient import PatientWatcher
from watcher.watch.writers import Writers

T = TypeVar("T")


@dataclass(slots=True)
class Tools:
    """One of each, for all services. Only `settings` is replaced, when they are read again.

    Attributes:
        renewed: slots that were made anew as another kernel was booted: their services' drop-ins may not fit them.
    """

    store: Store
    admission: Admission
    workers: MountWorkers
    manager: Manager
    watcher: PatientWatcher
    writers: Writers
    ledger: Ledger
    offload: Offload
    removals: Removals
    settings: Settings
    run_aside: RunAside
    renewed: frozenset[str] = frozenset()

    async def in_turn(
        self,
        service: Service,
        function: Callable[[Service], Gathering[T]],
        finishes: Callable[[], bool] = lambda: False,
    ) -> T:
        """Run a function that may block, in the turn of a service, with a hold on its main process.

        The service that it is called with has that hold: the manager may let go of the process meanwhile.

        Args:
            finishes: see `Offload.run_within()`.

        Raises: as `Offload.run()`.
        """
        hold = ExitStack()
        held = hold.enter_context(holding(service))

        def job() -> Gathering[T]:
            with hold:
                return (yield from function(held))

        return await self.offload.run_gathering(service.name, job, hold.close, finishes)

    def other_mains(self, service: Service) -> list[int]:
        """The main processes of all other services. A thread may ask."""
        services = self.manager.services
        others = [services.get(name) for name in list(services) if name != service.name]
        return [one.main.pid for one in others if one is not None and one.main is not None]


@contextmanager
def holding(service: Service) -> Iterator[Service]:
    """The service, with a hold of its own on its main process, if its manager has not let go of that already."""
    try:
        main = service.main.hold() if service.main is not None else None
    except Gone:
        main = None
    with main or nullcontext():
        yield service if main is None else replace(service, main=main)
