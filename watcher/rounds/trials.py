# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which stack of a service is on trial: accepted, and not judged yet.

A stack is put on trial before it is accepted, and taken off when there is an outcome: it proved good, or another one
is back in its place. So whoever is killed in between (the watcher, the host) finds out what is still to be judged, and
does not take a stack that proved good long ago for the culprit. Notes live in the state directory: what was accepted
for a service that does not run is judged after its next start, perhaps that of the next boot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from watcher.rounds.notes import Notes

_FAILED = "failed"
_BAD = "bad"


@dataclass(frozen=True, slots=True)
class Trial:
    """A stack on trial.

    Attributes:
        stack: its identity.
        was_down: the service had failed already when the stack was accepted: that it has does not speak against it.
        bad: it was judged, did not do, and stays all the same (`Rollback=no`). No other service is to follow
            (`Rollout=rolling`).
    """

    stack: str
    was_down: bool = False
    bad: bool = False


class Trials:
    """The trials of all services.

    Args:
        state_directory: absolute path; must exist.

    Attributes:
        directory: where they are: on the disk before a stack is that is on trial (`after=` of `Store.accept`).
    """

    def __init__(self, state_directory: str) -> None:
        self.directory = os.path.join(state_directory, "trials")
        self._notes = Notes(self.directory)

    def begin(self, service: str, trial: Trial) -> None:
        """From now until `end()` this stack is on trial."""
        flag = _BAD if trial.bad else _FAILED if trial.was_down else ""
        self._notes.write(service, f"{trial.stack or '-'} {flag}")

    def of(self, service: str) -> Trial | None:
        """What is on trial for a service, None if nothing is."""
        text = self._notes.read(service)
        if text is None:
            return None
        stack, _, flag = text.partition(" ")
        return Trial("" if stack == "-" else stack, was_down=flag == _FAILED, bad=flag == _BAD)

    def end(self, service: str) -> None:
        """It was judged."""
        self._notes.remove(service)
