# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slots that were made where there was a device mapper, and now there is none; or the other way round.

Another kernel was booted. With files beside a slot and no device mapper each start of the unit would fail
(226/NAMESPACE); without them systemd would not verify what it starts the unit on. Units start after the daemon, so it
makes such slots anew when it starts. The stacks are the same, and stay as they are recorded. The generator has run
before that: a drop-in that does not fit the new slots is made anew before the daemon is ready (`Tools.renewed`).
"""

from __future__ import annotations

import os

from watcher.images import bundles
from watcher.images.store import Store
from watcher.model import Later, problem, shown
from watcher.records import journal
from watcher.settings import device_mapper


def renew_slots(store: Store) -> tuple[str, ...]:
    """Make the slots anew that do not fit this kernel; the units that they are of. Where that fails, say so."""
    units = f"{store.state_directory}/units"
    return tuple(unit for unit in sorted(os.listdir(units)) if _renewed(store, unit, f"{units}/{unit}"))


def _renewed(store: Store, unit: str, slots: str) -> bool:
    try:
        if bundles.fits(slots):
            return False
        with store.using():
            accepted = store.state(unit).accepted
            store.accept(unit, accepted.stack, accepted.entries)
        store.settle()
    except FileNotFoundError:
        return False  # of a record that is damaged: it is made anew when it is asked for
    except (Later, OSError) as error:
        why = problem(error) if isinstance(error, OSError) else error
        journal.log.warning(f"{shown(unit)}: what lies beside its slots does not fit this kernel: {why}")
        return False
    if device_mapper.is_there():
        said = (
            "there is a device mapper now, so systemd finds beside its slots what it verifies the images by"
        )
    else:
        said = "there is no device mapper any more, so nothing lies beside its slots by which systemd would verify them"
    journal.log.info(f"{shown(unit)}: {said}", service=unit)
    return True
