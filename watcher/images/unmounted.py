# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that was unmounted has taken its files away, but nobody has removed them.

Both look alike in a directory. What differs is that the place where the file system was mounted is none any more, so
that place is recorded with each stack that is accepted, and outlives whoever looks. Whatever is mounted there next
counts as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from watcher.model import Stack
from watcher.mounts.syscalls import mount_id


def noted(stack: Stack, before: Mapping[str, str]) -> dict[str, str]:
    """Where the file system of each layer's file is mounted, by that file's path; without those on the root's.

    Args:
        before: the same as it was, for files that are not to be seen.
    """
    found = {}
    for source in (layer.source for layer in stack.layers):
        there = os.path.lexists(source)
        place = _mount_point(os.path.dirname(source)) if there else before.get(source, "/")
        if place != "/":
            found[source] = place
    return found


def unmounted(stack: Stack, mounted: Mapping[str, str]) -> dict[str, str]:
    """The slots of layers whose file is gone together with the file system it was on, with where that was mounted."""
    gone = {}
    for layer in stack.layers:
        place = mounted.get(layer.source, "/")
        if not os.path.lexists(layer.source) and not _is_mount_point(place):
            directory = os.path.realpath(os.path.dirname(layer.source))
            if f"{directory}/".startswith(f"{place}/"):  # else the way there is another one now
                gone[layer.slot] = place
    return gone


def _mount_point(directory: str) -> str:
    path = os.path.realpath(directory)
    while not _is_mount_point(path):
        path = os.path.dirname(path)
    return path


def _is_mount_point(path: str) -> bool:
    try:
        return path == "/" or mount_id(path) != mount_id(os.path.dirname(path))
    except OSError:
        return False  # not there or out of reach
