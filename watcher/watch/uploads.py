# SPDX-License-Identifier: LGPL-2.1-or-later
"""What events tell of uploads, beside that something has changed.

A look at the disk cannot know these two things. They only ever shorten or lengthen a wait: an event that was lost, or
was before the watcher started, makes nothing wrong.

- A directory was renamed into place: it came with all that is in it.
- An upload under a temporary name is going on in a directory: what disappears there meanwhile may be about to be
  replaced (`rsync --delete` removes first).

Threads may ask while the event loop notes: each answer is one look-up in a dict.
"""

from __future__ import annotations

import re
import time
from typing import TypeVar

from inotify_simple import flags

from watcher.resolve.vpick import NO_LEFTOVER

T = TypeVar("T")

_KEPT_MAX = 10_000
"""So many names and directories are remembered; of more the oldest is forgotten."""

_CAME = int(flags.CREATE | flags.MOVED_TO | flags.CLOSE_WRITE | flags.MOVED_FROM)


class Uploads:
    """What was seen of uploads so far."""

    def __init__(self) -> None:
        self._moved_in: dict[str, int] = {}
        self._temporary: dict[str, float] = {}

    def note(self, directory: str, name: str, mask: int) -> None:
        """An event of inotify(7) for a name in a drop directory, which is without links."""
        path = f"{directory}/{name}"
        if mask & flags.ISDIR:
            if mask & flags.MOVED_TO:
                _put(self._moved_in, path, time.time_ns())  # not earlier than any timestamp up to now
            elif mask & (flags.CREATE | flags.DELETE | flags.MOVED_FROM):
                self._moved_in.pop(path, None)
        if mask & _CAME and not re.fullmatch(NO_LEFTOVER, name):
            _put(self._temporary, directory, time.monotonic())

    def forget(self, directory: str) -> None:
        """A directory is not there any more, with all below it. Another one may come in its place.

        Or it is the one that has just come: the kernel tells the parent of a rename first. So when it came is kept.
        """
        self._temporary.pop(directory, None)
        for kept in (self._moved_in, self._temporary):
            for path in [path for path in kept if path.startswith(f"{directory}/")]:
                del kept[path]

    def moved_in_ns(self, path: str) -> int:
        """When the directory `path` was renamed to that, nanoseconds since the epoch; 0: that is not known."""
        return self._moved_in.get(path, 0)

    def temporary_at(self, directory: str) -> float | None:
        """When a temporary name last came, was written or became another one there, `time.monotonic()`."""
        return self._temporary.get(directory)


def _put(kept: dict[str, T], key: str, value: T) -> None:
    kept.pop(key, None)
    if len(kept) >= _KEPT_MAX:
        kept.pop(next(iter(kept)))
    kept[key] = value
