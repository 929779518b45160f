# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reloads that are owed: a swap was begun, and the service has not been told yet.

The mount table says which stack a service shows, not whether the service knows. A note written before a swap and
removed after the reload closes that gap: whoever is killed in between leaves it behind, and the next round then reloads
although the stack is already there. Notes live in the runtime directory, since a reboot settles all such debts.
"""

from __future__ import annotations

import contextlib
import os


class Pending:
    """The notes of one runtime directory.

    Args:
        runtime_directory: absolute path; must exist.
    """

    def __init__(self, runtime_directory: str) -> None:
        self._directory = os.path.join(runtime_directory, "pending")
        os.makedirs(self._directory, 0o700, exist_ok=True)

    def owe(self, service: str, invocation: str) -> None:
        """From now until `settle()` this start of the service has to be told to reload."""
        path = self._path(service)
        temporary = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        # A link whose target is the note: made and read by one system call each.
        os.symlink(invocation or "-", temporary)
        os.rename(temporary, path)

    def owed(self, service: str, invocation: str) -> bool:
        """Whether this start of the service (a later one read everything anew) is still to be told."""
        try:
            return os.readlink(self._path(service)) == (invocation or "-")
        except FileNotFoundError:
            return False

    def settle(self, service: str) -> None:
        """It has been told, or there is nothing to tell."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(service))

    def _path(self, service: str) -> str:
        return os.path.join(self._directory, service)
