# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that was unmounted has taken its files away, but nobody has removed them.

Both look alike in a directory. What differs is that the place where the file system was mounted is none any more, so
that place is remembered, for as long as the daemon runs. Whatever is mounted there next counts as it is.
"""

from __future__ import annotations

import os

from watcher.model import Stack
from watcher.mounts.syscalls import mount_id


class Origins:
    """Where the layers of one service were found."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str]] = {}

    def note(self, stack: Stack) -> None:
        """Remember the directory of each layer whose file is there, and where its file system is mounted."""
        found = {}
        for layer in stack.layers:
            if os.path.lexists(layer.source):
                directory = os.path.realpath(os.path.dirname(layer.source))
                found[layer.source] = directory, _mount_point(directory)
            elif layer.source in self._found:
                found[layer.source] = self._found[layer.source]
        self._found = found

    def unmounted(self, stack: Stack) -> dict[str, str]:
        """The slots of layers whose file is gone together with the file system it was on, with its directory."""
        gone = {}
        for layer in stack.layers:
            directory, mounted = self._found.get(layer.source, ("", "/"))
            if not os.path.lexists(layer.source) and not _is_mount_point(mounted):
                gone[layer.slot] = directory
        return gone


def _mount_point(path: str) -> str:
    while not _is_mount_point(path):
        path = os.path.dirname(path)
    return path


def _is_mount_point(path: str) -> bool:
    try:
        return path == "/" or mount_id(path) != mount_id(os.path.dirname(path))
    except OSError:
        return False  # not there or out of reach
