# SPDX-License-Identifier: LGPL-2.1-or-later
"""The records of the services of a state directory, as a test reads them."""

from __future__ import annotations

import os

from watcher.records.state import State, decoded


def record(state_directory: str | os.PathLike[str], slots: str) -> State:
    """The record of a service, by the name of its slots ("web.service.exec")."""
    path = os.path.join(state_directory, "units", slots, ".state.json")
    with open(path, "rb") as file:
        return decoded(file.read(), path)


def under_way(state_directory: str | os.PathLike[str]) -> list[str]:
    """What is not at its end: services on trial, owed a reload, being undone, or with an outcome that is not said."""
    units = os.path.join(state_directory, "units")
    found = []
    for slots in os.listdir(units):
        state = record(state_directory, slots)
        trial = state.trial is not None and state.trial.verdict is None
        if trial or state.owed or state.undoing is not None or state.replaced is not None:
            found.append(slots)
    return found
