# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reloads that are owed: a swap was begun, and the service has not been told yet.

The mount table says which stack a service shows, not whether the service knows. A note written before a swap and
removed after the reload closes that gap: whoever is killed in between leaves it behind, and the next round then reloads
although the stack is already there. Notes live in the runtime directory, since a reboot settles all such debts.
"""

from __future__ import annotations

import os

from watcher.rounds.notes import Notes


class Pending:
    """The notes of one runtime directory.

    Args:
        runtime_directory: absolute path; must exist.
    """

    def __init__(self, runtime_directory: str) -> None:
        self._notes = Notes(os.path.join(runtime_directory, "pending"))

    def owe(self, service: str, invocation: str) -> None:
        """From now until `settle()` this start of the service has to be told to reload."""
        self._notes.write(service, invocation or "-")

    def owed(self, service: str, invocation: str) -> bool:
        """Whether this start of the service (a later one read everything anew) is still to be told."""
        return self._notes.read(service) == (invocation or "-")

    def paid(self, service: str) -> None:
        """It has been told, or there is nothing to tell."""
        self._notes.remove(service)
