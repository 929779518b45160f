# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that is gone because its file system was unmounted has not been removed: the service keeps it.

In a directory both look alike. But after an unmount the place where the file system was is no mount point any more. So
that place is recorded with each accepted stack. What is mounted there next counts as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from watcher.model import Stack
from watcher.mounts.syscalls import is_mount_root


def noted(stack: Stack, before: Mapping[str, str]) -> dict[str, str]:
    """Where the file system of each layer's file is mounted, by that file's path; without those on the root's.

    Args:
        before: the same of the stack before, for files that are not there now.
    """
    found = {}
    for source in {layer.source for layer in stack.layers}:
        there = os.path.lexists(source)
        place = _mount_point(os.path.dirname(source)) if there else before.get(source, "/")
        if place != "/":
            found[source] = place
    return found


def unmounted(stack: Stack, mounted: Mapping[str, str]) -> dict[str, str]:
    """Which layers' files are gone together with their file system: where that was mounted, by slot."""
    gone = {}
    for layer in stack.layers:
        place = mounted.get(layer.source, "/")
        if not os.path.lexists(layer.source) and not _is_mount_point(place):
            directory = os.path.realpath(os.path.dirname(layer.source))
            if f"{directory}/".startswith(f"{place}/"):  # else the path leads elsewhere now
                gone[layer.slot] = place
    return gone


def _mount_point(directory: str) -> str:
    path = os.path.realpath(directory)
    while not _is_mount_point(path):
        path = os.path.dirname(path)
    return path


def _is_mount_point(path: str) -> bool:
    try:
        return path == "/" or is_mount_root(path)
    except OSError:
        return False  # not there or out of reach
