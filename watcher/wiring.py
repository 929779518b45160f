# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes what all rounds work with, and takes it apart again at the end."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from watcher.images.admission import Admission
from watcher.images.complete import Complete
from watcher.images.renewal import renew_slots
from watcher.images.store import Store
from watcher.images.upgrade import upgrade
from watcher.images.verified_mounts import VerifiedMounts
from watcher.managers.aside import RunAside, run_as_child
from watcher.managers.base import Manager
from watcher.managers.combined import Combined
from watcher.managers.standalone import Standalone
from watcher.managers.systemd.aside import Aside
from watcher.managers.systemd.manager import Systemd
from watcher.mounts import dm_verity
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers
from watcher.records import durable, journal
from watcher.records.ledger import Ledger
from watcher.rounds.patience import Removals
from watcher.rounds.tools import Tools
from watcher.settings.config import Settings
from watcher.watch.offload import Offload
from watcher.watch.patient import PatientWatcher
from watcher.watch.writers import Writers

# Outcomes of a service that are read to make its lost record anew.
_HISTORY_READ = 1000


@contextmanager
def tools_of(settings: Settings) -> Iterator[Tools]:
    """All that rounds work with, for the block.

    Raises:
        OSError: a directory, inotify or the mounts cannot be had.
    """
    with ExitStack() as stack:
        dm_verity.remove_leftovers()
        mounts = VerifiedMounts()
        workers = stack.enter_context(MountWorkers(privileged=may_mount(), fsmount=mounts.fsmount))
        durable.make(settings.state_directory)
        for remark in upgrade(settings.state_directory, settings.runtime_directory):
            journal.say(remark)
        ledger = stack.enter_context(Ledger(settings.state_directory, settings.history_max))
        store = stack.enter_context(
            Store(
                settings.state_directory,
                settings.store_max,
                settings.image_max,
                settings.keep_stacks,
                functools.partial(ledger.history, limit=_HISTORY_READ),
            )
        )
        renewed = frozenset(renew_slots(store))
        manager: Manager
        run_aside: RunAside = run_as_child
        if on_systemd(settings):
            systemd = Systemd(settings)
            stack.callback(systemd.close)
            standalone = Standalone(settings.runtime_directory, workers, systemd.transient.run)
            manager = Combined([systemd, standalone])
            run_aside = Aside(systemd.transient, settings.runtime_directory).run
        else:
            manager = standalone = Standalone(settings.runtime_directory, workers)
        stack.callback(standalone.close)
        watcher = stack.enter_context(PatientWatcher())
        writers = stack.enter_context(Writers(settings.state_directory))
        writers.begin()
        yield Tools(
            store=store,
            admission=Admission(
                store, workers, Complete(watcher.uploads.moved_in_ns), mounts=mounts, writers=writers
            ),
            workers=workers,
            manager=manager,
            watcher=watcher,
            writers=writers,
            ledger=ledger,
            offload=Offload(start=workers.start),
            removals=Removals(watcher.uploads),
            settings=settings,
            run_aside=run_aside,
            renewed=renewed,
        )


def on_systemd(settings: Settings) -> bool:
    """Whether systemd runs this host (sd_booted(3)), and this daemon is the one for its units.

    A unit's drop-in looks for its slots in the system's state directory. A daemon with another state directory (a
    demonstration, a test) leaves units alone, also as root.
    """
    ours = settings.state_directory == Settings().state_directory
    return ours and os.path.isdir("/run/systemd/system") and may_mount()
