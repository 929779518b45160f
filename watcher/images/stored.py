# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy in the store, for one that only looks: it makes nothing there, and needs no `Store`."""

from __future__ import annotations

import os
import stat

from watcher.images import bundles
from watcher.images.formats.probe import probe
from watcher.images.store_names import DIGEST
from watcher.model import Copy, Kind, Refused


def stored(state_directory: str, digest: str) -> Copy:
    """The copy of that digest; the size of a tree is not looked for, and is 0.

    Raises:
        FileNotFoundError: there is none.
        Refused: it is damaged.
        OSError: it cannot be read.
    """
    if not DIGEST.fullmatch(digest):
        raise Refused("its digest is none")
    path = f"{state_directory}/store/{digest}"
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode) and bundles.is_bundle(fd):
            return bundles.copy(fd, digest, path)
        if stat.S_ISDIR(found.st_mode):
            return Copy(digest, path, 0, Kind.DIRECTORY)
        return Copy(digest, path, found.st_size, Kind.IMAGE, probe(fd, found.st_size))
    finally:
        os.close(fd)
