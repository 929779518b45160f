# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that was unmounted has taken its files away, but nobody has removed them.

Both look alike in a directory. What differs is the device behind the directory in which the file was, so that is
remembered, for as long as the daemon runs.
"""

from __future__ import annotations

import os

from watcher.model import Stack


class Origins:
    """Where the layers of one service were found."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}

    def note(self, stack: Stack) -> None:
        """Remember the directory and the device of each layer whose file is there."""
        found = {}
        for layer in stack.layers:
            directory = os.path.realpath(os.path.dirname(layer.source))
            if os.path.lexists(layer.source):
                found[layer.source] = (directory, os.stat(directory).st_dev)
            elif layer.source in self._found:
                found[layer.source] = self._found[layer.source]
        self._found = found

    def unmounted(self, stack: Stack) -> str:
        """The directory of a layer whose file is gone together with the file system it was on; "" if there is none."""
        for layer in stack.layers:
            directory, device = self._found.get(layer.source, ("", 0))
            if directory and not os.path.lexists(layer.source) and _device(directory) != device:
                return directory
        return ""


def _device(path: str) -> int:
    """The device of a directory, or of what is left of the way there."""
    while True:
        try:
            return os.stat(path).st_dev
        except FileNotFoundError:
            path = os.path.dirname(path)
