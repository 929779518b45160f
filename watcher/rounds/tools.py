# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every round works with. The daemon makes it once; a test makes what it needs of it."""

from __future__ import annotations

from dataclasses import dataclass

from watcher.images.admission import Admission
from watcher.images.store import Store
from watcher.managers.base import Manager
from watcher.mounts.workers import MountWorkers
from watcher.records.ledger import Ledger
from watcher.watch.offload import Offload
from watcher.watch.patient import PatientWatcher


@dataclass(frozen=True, slots=True)
class Tools:
    """One of each, for all services."""

    store: Store
    admission: Admission
    workers: MountWorkers
    manager: Manager
    watcher: PatientWatcher
    ledger: Ledger
    offload: Offload
