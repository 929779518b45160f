# SPDX-License-Identifier: LGPL-2.1-or-later
"""Were the writers of a file one after the other? For those of which fanotify has told at the same time.

fanotify makes one event of the open and the close of a process, if nobody has read the first yet. Of two such events in
one read it does not tell whether the first process ended before the second began.

inotify does: it keeps the order of opens and closes, though it names nobody, and drops the second of two equal ones in
a row. Two writers one after the other are "open, close, open, close", whoever else opens the file in between. Where
that has fewer turns than there were writers, two of them wrote at once. Readers, and what is read too much, only make
more turns: that accuses nobody.
"""

from __future__ import annotations

import contextlib
import os
import re

from inotify_simple import INotify, flags

from watcher.mounts import fanotify
from watcher.mounts.fanotify import Handle, Place


class Turns:
    """In which order files were opened ("O"), and closed after writing ("C"). Not for several threads at once."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._directories: dict[int, Handle] = {}
        # Before the read of fanotify that is at hand, and after it; None: events were lost.
        self._before: dict[Place, str] | None = {}
        self._after: dict[Place, str] | None = {}

    def begin(self) -> None:
        with contextlib.suppress(OSError):  # no instance is left: it tells of nothing
            self._inotify = INotify(nonblocking=True)

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()

    def watch(self, directory: str) -> None:
        """Raises OSError: it is not there, or there are too many."""
        if self._inotify is None:
            return
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mask = flags.OPEN | flags.CLOSE_WRITE | flags.ONLYDIR
            wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", mask)
            self._directories[wd] = fanotify.name_to_handle_at(fd)
        finally:
            os.close(fd)

    def read_before(self) -> None:
        """fanotify is read next. What was known before is forgotten, but for what came after its last read."""
        self._before, self._after = _joined(self._after, self._read()), {}

    def read_after(self) -> bool:
        """fanotify was read. Whether something has come meanwhile: it may have told of that, or not."""
        self._before, self._after = _joined(self._before, self._after), self._read()
        return self._after != {}

    def count(self, place: Place) -> int:
        """How often a file was closed after it had been opened, at most; 0: that is not known."""
        runs = _joined(self._before, self._after)
        return re.sub(r"O+", "O", runs.get(place, "")).count("OC") if runs is not None else 0

    def has_just_ended(self, place: Place) -> bool:
        """Whether it was closed last, and has not been opened since."""
        if self._before is None or self._after is None:
            return False
        return self._before.get(place, "").endswith("C") and "O" not in self._after.get(place, "")

    def _read(self) -> dict[Place, str] | None:
        found: dict[Place, str] = {}
        lost = False
        for wd, mask, _, name in self._inotify.read(timeout=0) if self._inotify is not None else ():
            lost = lost or bool(mask & flags.Q_OVERFLOW)
            if mask & flags.IGNORED:
                self._directories.pop(wd, None)
            directory = self._directories.get(wd)
            if directory is not None and mask & (flags.OPEN | flags.CLOSE_WRITE):
                place = directory, name
                found[place] = found.get(place, "") + ("O" if mask & flags.OPEN else "C")
        return None if lost else found


def _joined(one: dict[Place, str] | None, then: dict[Place, str] | None) -> dict[Place, str] | None:
    if one is None or then is None:
        return None
    return {place: one.get(place, "") + then.get(place, "") for place in one.keys() | then}
