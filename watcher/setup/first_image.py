# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first version as an image: copied from the host, packed, and looked at as the daemon will.

Unlike what `build` makes, its files have the owners, modes and attributes that they have on this host: it is made here,
for here, and the service may read by its group what others may not. A squashfs can hold no access control lists; where
there is one, the image is an erofs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

from watcher.images import build_tools, made_for, staging
from watcher.images.image_check import examine
from watcher.model import Busy, Refused, shown
from watcher.records.schema import Failed
from watcher.setup import first_version
from watcher.setup.first_version import Taken

_EPOCH = 1
"""Time of all files in it: the same content is the same image, as of `build`."""


def require_room(taken: Taken, place: str) -> None:
    """Refuse what has no room: the copy, where temporary files are, and the image, which may be as large.

    Args:
        place: directory of the image; it need not be there yet.

    Raises:
        Failed: there is not enough, with what to do.
        OSError: a directory cannot be looked at.
    """
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    scratch = staging.directory()
    needed: dict[int, int] = {}
    for directory in (scratch, place):
        device = os.stat(directory).st_dev
        needed[device] = needed.get(device, 0) + taken.room
    for directory, hint in ((scratch, ", or name another directory with TMPDIR="), (place, "")):
        size = needed[os.stat(directory).st_dev]
        found = os.statvfs(directory)
        free = found.f_bfree * found.f_frsize  # root, who copies, may have the reserve
        if size > free:
            raise Failed(
                f"{shown(directory)} has no room for a first version: {size} bytes are needed at most, and {free} are"
                f" free: make room there{hint}"
            )


def build(
    sources: Sequence[str],
    excludes: Callable[[str], bool],
    name: str,
    path: str,
    image_max: int,
    root: str = "/",
) -> None:
    """Make an image of what the host has, with its owners, modes and attributes.

    Args:
        sources, excludes, root: see `first_version.take()`.
        name: of the image, for its release file.
        path: of the image; only root may read it if there is something in it that not everybody may.
        image_max: bytes (`ImageMax=`).

    Raises:
        Failed: it cannot be made, or would not be admitted: the reason.
        OSError: something cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="confext-watcher-", dir=staging.directory()) as scratch:
        tree = f"{scratch}/{name}"
        os.mkdir(tree, 0o755)
        os.chmod(tree, 0o755)
        try:
            taken = first_version.take(sources, excludes, image_max, tree, name, root)
            _pack(taken, tree, path)
        except OSError as error:
            error.filename = error.filename or scratch  # a write, such as to a disk that is full
            raise
    os.chmod(path, 0o600 if taken.private else 0o644)
    try:
        examine(path, made_for.host(), image_max)
    except (Refused, Busy) as error:
        raise Failed(f"the first version would not be admitted: {error}") from error


def _pack(taken: Taken, tree: str, path: str) -> None:
    try:
        if taken.listed:
            build_tools.erofs(tree, path, _EPOCH, kept=True)
        else:
            build_tools.squashfs(tree, path, _EPOCH, kept=True)
    except (Refused, Busy) as error:
        why = f"{shown(taken.listed[0])} has an access control list: " if taken.listed else ""
        raise Failed(f"{why}{error}") from error
