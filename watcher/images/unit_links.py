# SPDX-License-Identifier: LGPL-2.1-or-later
"""The links `units/UNIT`: each leads to the accepted stack of a unit (`stacks.py`). When they are on the disk.

A service may be swapped to a stack before the link is there for certain: a power cut ends that service, too.
"""

from __future__ import annotations

import contextlib
import errno
import os

from watcher.records import durable
from watcher.records.together import Gathering, Together


class UnitLinks:
    """Those of one state directory. Threads may share it, each for a unit that it has locked.

    Attributes:
        directory: path of `units/`.
    """

    def __init__(self, state_directory: str) -> None:
        self.directory = f"{state_directory}/units"
        # Where the link of a unit leads on the disk for certain; and where it leads, if that may not be there yet.
        self._durable: dict[str, str] = {}
        self._moved: dict[str, str] = {}
        # A process before us may have been killed before it has brought its own there.
        self._inherited = True
        durable.make(self.directory)

    def units(self) -> tuple[str, ...]:
        """The units that have one, in no order."""
        return tuple(name for name in os.listdir(self.directory) if not name.startswith("."))

    def stack(self, unit: str) -> str:
        """The name of the stack that the link of a unit leads to; "" if it has none. Raises OSError."""
        try:
            return os.path.basename(os.readlink(f"{self.directory}/{unit}"))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            return ""

    def lead(self, unit: str, stack: str, temporary: str) -> None:
        """Make the link of a unit lead to another of its stacks, in one step. Raises OSError.

        A power cut may undo that until `settle()` or `sync()`.

        Args:
            temporary: a path for the new link, on the same file system.
        """
        os.symlink(f"../stacks/{unit}/{stack}", temporary)
        os.rename(temporary, f"{self.directory}/{unit}")
        self._moved[unit] = stack

    def remove(self, unit: str) -> None:
        """Remove the link of a unit, if it has one, from the disk, too. Raises OSError."""
        self._durable.pop(unit, None)
        self._moved.pop(unit, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{unit}")
        self.sync_all()

    def sync(self, unit: str) -> Gathering[None]:
        """Bring the link of a unit to the disk: another process may have been killed before it did. Raises OSError."""
        stack = self.stack(unit)
        if self._durable.get(unit) != stack:
            yield Together(durable.fsync_all, (self.directory,))
            self._durable[unit] = stack

    def sync_all(self) -> None:
        """Bring all links to the disk, whoever made them. Raises OSError."""
        durable.fsync(self.directory)

    def settle(self) -> None:
        """Bring to the disk those that lead elsewhere now. Raises OSError: it is not known that they are."""
        moved = tuple(self._moved.items())
        if moved or self._inherited:
            self.sync_all()
            self._inherited = False
        for unit, stack in moved:
            self._durable[unit] = stack
            if self._moved.get(unit) == stack:  # no other thread has made it lead elsewhere meanwhile
                self._moved.pop(unit, None)
