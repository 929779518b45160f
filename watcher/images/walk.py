# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every walk through a tree of strangers has in common: its limits, and how it names a place.

A walk goes by descriptor, one name at a time, and follows no link. It may recurse: Python's limit is far beyond
DEPTH_MAX.
"""

from __future__ import annotations

import os
from itertools import islice

from watcher.model import DEPTH_MAX, ENTRIES_MAX, Refused, shown

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Path = tuple[str, ...]
"""From the root of the walk, which is ()."""


def where(path: Path) -> str:
    """A place, for messages."""
    return f"{shown('/'.join(path))} in it" if path else "it"


class Walk:
    """Counts the entries of one walk."""

    def __init__(self) -> None:
        self.entries = 0

    def names(self, directory: int, path: Path) -> list[str]:
        """The names in a directory, in the order of their bytes.

        Raises:
            Refused: it is nested too deeply, or the tree has too many entries.
            OSError: it cannot be read.
        """
        if len(path) >= DEPTH_MAX:
            raise Refused(f"{where(path)} is nested too deeply: {DEPTH_MAX} levels are the limit")
        with os.scandir(directory) as entries:  # there may be ten million
            names = [entry.name for entry in islice(entries, ENTRIES_MAX - self.entries + 1)]
        # ASCII, which it nearly always is, sorts as its bytes do.
        names.sort(key=None if "".join(names).isascii() else os.fsencode)
        self.entries += len(names)
        if self.entries > ENTRIES_MAX:
            raise Refused(f"more than {ENTRIES_MAX} entries in it")
        return names
