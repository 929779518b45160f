# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in the `etc` of a mounted image has no extended attributes that mean something to overlayfs.

Strangers made the image, perhaps one without end: the walk keeps to the limits for trees (`walk.py`).
"""

from __future__ import annotations

import errno
import os
import stat

from watcher.images.attributes import require_unmarked
from watcher.images.walk import DIRECTORY, Path, Walk, where
from watcher.model import Refused
from watcher.mounts.descriptors import Descriptors


def require_no_marks(root: int) -> None:
    """Look at everything in `etc` below the directory `root` (a descriptor), and at that itself.

    Raises:
        Refused: something has such an attribute, there is too much, or it cannot be read.
        OSError: no memory, no descriptors.
    """
    _look(Walk(), root, ("etc",))


def _look(walk: Walk, parent: int, path: Path) -> None:
    name = path[-1]
    try:
        # No descriptor gives a link's own attributes; no other link is on this way to them.
        require_unmarked(_attributes_of(f"/proc/self/fd/{parent}/{name}"), where(path))
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            with Descriptors() as fds:
                directory = fds.add(os.open(name, DIRECTORY, dir_fd=parent))
                for child in walk.names(directory, path):
                    _look(walk, directory, (*path, child))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise Refused(f"broken: {where(path)} cannot be read: {error.strerror}") from error


def _attributes_of(path: str) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # an image that was made without any
            return []
        raise
