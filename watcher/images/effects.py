# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an extension does to the host's `/etc` besides bringing files: what it hides, removes, or closes to others.

All of that may be meant; mostly it is how the build machine was. So it is told, and nothing is refused for it. An
overlay takes owner and mode of a directory from the uppermost one, and so closes it to users who could read it.
"""

from __future__ import annotations

import os
import stat

from watcher.images.attributes import OPAQUE, WHITEOUT
from watcher.images.walk import DIRECTORY, Path, Walk
from watcher.model import Refused, shown
from watcher.mounts.descriptors import Descriptors

_TOLD_MAX = 5
_READ = 0o055
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def effects(root: int, host_root: str) -> tuple[str, ...]:
    """One line for each of the first few things, and how many more there are; none where that cannot be read.

    Args:
        root: descriptor of the root of a mounted image or a tree.
        host_root: what it goes onto.
    """
    walk = _Comparing()
    with Descriptors() as fds:
        try:
            place = fds.add(os.open(host_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            walk.compare(root, place, ("etc",))
        except (OSError, Refused):
            pass  # admission says what is wrong with it
    more = len(walk.found) - _TOLD_MAX
    return (*walk.found[:_TOLD_MAX], *([f"and does as much to {more} more"] if more > 0 else []))


class _Comparing(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def compare(self, parent: int, host_parent: int, path: Path) -> None:
        """One name that the extension has."""
        name, where = path[-1], shown("/".join(path))
        try:
            theirs = os.stat(name, dir_fd=host_parent, follow_symlinks=False)
        except OSError:
            return  # the host does not have it
        ours = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if _is_whiteout(parent, name, ours):
            self.found.append(f"removes the host's {where} (a whiteout)")
        elif stat.S_ISDIR(ours.st_mode) != stat.S_ISDIR(theirs.st_mode):
            what = "a directory" if stat.S_ISDIR(ours.st_mode) else "what is no directory"
            self.found.append(f"hides the host's {where}, which is {_type(theirs)}, with {what}")
        elif stat.S_ISDIR(ours.st_mode):
            self._attributes(where, ours, theirs)
            with Descriptors() as fds:
                directory = fds.add(os.open(name, DIRECTORY, dir_fd=parent))
                # Overlayfs joins the roots of layers, whatever they say.
                if len(path) > 1 and _xattr(directory, OPAQUE) == b"y":
                    self.found.append(f"hides all that the host has in {where}/ (an opaque directory)")
                    return
                place = fds.add(os.open(name, _PLACE, dir_fd=host_parent))
                for child in self.names(directory, path):
                    self.compare(directory, place, (*path, child))

    def _attributes(self, where: str, ours: os.stat_result, theirs: os.stat_result) -> None:
        lost = stat.S_IMODE(theirs.st_mode) & _READ & ~ours.st_mode
        if lost:
            self.found.append(f"makes {where}/ {_owned(ours)}, and the host's is {_owned(theirs)}")


def _owned(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o} of {found.st_uid}:{found.st_gid}"


def _type(found: os.stat_result) -> str:
    return (
        "a directory"
        if stat.S_ISDIR(found.st_mode)
        else "a link"
        if stat.S_ISLNK(found.st_mode)
        else "a file"
    )


def _is_whiteout(parent: int, name: str, found: os.stat_result) -> bool:
    """Whether overlayfs takes a file for a whiteout, in either of the two forms that it knows."""
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    is_empty = stat.S_ISREG(found.st_mode) and not found.st_size
    return is_empty and _xattr(f"/proc/self/fd/{parent}/{name}", WHITEOUT) is not None


def _xattr(node: int | str, name: str) -> bytes | None:
    try:
        return os.getxattr(node, name, follow_symlinks=isinstance(node, int))
    except OSError:  # there is none, or no attributes at all
        return None
