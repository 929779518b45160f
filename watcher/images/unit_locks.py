# SPDX-License-Identifier: LGPL-2.1-or-later
"""The locks under which the stacks of a unit are changed: one file for each unit, which goes with the unit."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from watcher.records import durable

_LOCK = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class UnitLocks:
    """Locks in a directory, which is made if it is not there. They hold against other threads and processes."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        durable.make(directory, 0o700)

    @contextmanager
    def held(self, unit: str) -> Iterator[None]:
        """Wait for the lock of a unit, and hold it. Raises OSError."""
        while True:
            lock = os.open(f"{self._directory}/{unit}", _LOCK, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.fstat(lock).st_nlink:
                    yield
                    return
                # Else the process that held it has removed the unit, and this file with it.
            finally:
                os.close(lock)

    def remove(self, unit: str) -> None:
        """Remove the lock of a unit that is gone; the caller holds it."""
        os.unlink(f"{self._directory}/{unit}")
