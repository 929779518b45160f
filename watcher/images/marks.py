# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in the `etc` of a mounted image has no extended attributes that mean something to overlayfs.

The image is somebody else's, and may be made to have no end: it is walked by descriptor, without recursion, within the
limits that hold for trees.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import islice

from watcher.images.attributes import require_unmarked
from watcher.model import DEPTH_MAX, ENTRIES_MAX, Refused, shown

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def require_no_marks(root: int) -> None:
    """Look at everything in `etc` below the directory `root` (a descriptor), and at that itself.

    Raises:
        Refused: something has such an attribute, there is too much, or it cannot be read.
    """
    walk = _Walk(root)
    try:
        walk.run()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise Refused(f"broken: {walk.where} cannot be read: {error.strerror}") from error
    finally:
        walk.close()


class _Walk:
    def __init__(self, root: int) -> None:
        self._left = ENTRIES_MAX
        self._path: list[str] = []
        self._open: list[tuple[int, list[str]]] = [(root, ["etc"])]
        """From the root to where we are: each directory, and the names in it that are still to be looked at."""

    @property
    def where(self) -> str:
        return f"{shown('/'.join(self._path))} in it"

    def run(self) -> None:
        while self._open[-1][1] or len(self._open) > 1:
            parent, names = self._open[-1]
            del self._path[len(self._open) - 1 :]
            if names:
                self._visit(parent, names.pop())
            else:
                self._leave()

    def close(self) -> None:
        while len(self._open) > 1:
            self._leave()

    def _leave(self) -> None:
        directory, _ = self._open.pop()
        os.close(directory)

    def _visit(self, parent: int, name: str) -> None:
        self._path.append(name)
        # No descriptor gives a link's own attributes; no other link is on this way to them.
        require_unmarked(_attributes_of(f"/proc/self/fd/{parent}/{name}"), self.where)
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            self._enter(parent, name)

    def _enter(self, parent: int, name: str) -> None:
        if len(self._path) >= DEPTH_MAX:
            raise Refused(f"{self.where} is nested too deeply: {DEPTH_MAX} levels are the limit")
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
        names: list[str] = []
        self._open.append((directory, names))
        with os.scandir(directory) as entries:  # which may be ten million
            names += (entry.name for entry in islice(entries, self._left + 1))
        self._left -= len(names)
        if self._left < 0:
            raise Refused(f"more than {ENTRIES_MAX} entries in it")


def _attributes_of(path: str) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # an image that was made without any
            return []
        raise
