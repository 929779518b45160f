# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree that an image is made of: a private copy of what goes in, with the same modes whoever builds it.

A copy has a file's content, and of its mode whether it may be executed and whether all may read it; nothing else: no
owner, time, extended attribute, hard link or hole. These differ between two checkouts of one repository, and the same
content is to be the same image. How it is copied: staging.py.
"""

from __future__ import annotations

import grp
import os
import stat

from watcher.images.build_sources import Source
from watcher.images.staging import Staging
from watcher.images.walk import Path
from watcher.model import shown
from watcher.mounts.descriptors import Descriptors

_NAMED_MAX = 5


class Stage(Staging):
    """Puts one source after the other into an empty directory."""

    def __init__(self, root: int, size_max: int) -> None:
        super().__init__(size_max)
        self._root = root
        self._leftovers: list[str] = []
        self._private: list[str] = []
        self._opened: list[str] = []
        self._set_id: list[str] = []

    @property
    def private(self) -> bool:
        """Whether some file in it is for root alone."""
        return bool(self._private)

    def add(self, source: Source) -> None:
        """Copy what a source has.

        Raises:
            Refused: it has what no image can have, two sources have the same file, or it is too large.
            Busy: it changes, or is being written.
            OSError: it cannot be read, or not be written here.
        """
        with Descriptors() as fds:
            if not source.place:
                top = fds.add(os.open(source.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                self._node(top, "etc", self._root, ("etc",), os.path.join(source.path, "etc"), follow=False)
                return
            parent = self._root
            for depth in range(1, len(source.place)):
                parent = fds.add(self._made(parent, source.place[:depth], source.path))
            self._note_parents(source)
            # A slash at the end would have the link followed.
            path = source.path if source.follow else source.path.rstrip("/")
            self._node(None, path, parent, source.place, source.path, follow=source.follow)

    def notes(self) -> tuple[str, ...]:
        """What is in the image otherwise than it was, one line for each kind."""
        return tuple(
            f"{said}: {_some(found)}"
            for said, found in (
                ("left out, as editors and package managers leave such files behind", self._leftovers),
                ("for root alone, as not all may read it here", self._private),
                ("open to all in the image, and not here", self._opened),
                ("without its set-user-ID or set-group-ID bit", self._set_id),
            )
            if found
        )

    def _takes(self, path: Path) -> bool:
        if super()._takes(path):
            return True
        self._leftovers.append("/".join(path))
        return False

    def _note_parents(self, source: Source) -> None:
        """Of a file that is named by its place on this host: which directories above it are closed there."""
        if not source.follow and source.path.startswith("/"):
            for depth in range(2, len(source.place)):
                path = source.place[:depth]
                self._note_directory(os.stat("/" + "/".join(path)), path)

    def _note_directory(self, st: os.stat_result, path: Path) -> None:
        if not st.st_mode & stat.S_IXOTH:
            self._opened.append("/".join(path))

    def _found_directory(self, fd: int, st: os.stat_result, path: Path) -> None:
        if path != ("etc",):
            self._note_directory(st, path)

    def _found_file(self, fd: int, st: os.stat_result, path: Path) -> None:
        where = "/".join(path)
        if not st.st_mode & stat.S_IROTH:
            self._private.append(where + _group(st))
        if st.st_mode & (stat.S_ISUID | stat.S_ISGID):
            self._set_id.append(where)

    def _finish_file(self, fd: int, st: os.stat_result, made: int, path: Path) -> None:
        mode = 0o644 if st.st_mode & stat.S_IROTH else 0o600
        if st.st_mode & stat.S_IXUSR:
            mode |= (mode & 0o444) >> 2
        os.fchmod(made, mode)


def _group(st: os.stat_result) -> str:
    """The group that may read a file here, and cannot in the image."""
    if not st.st_mode & stat.S_IRGRP or st.st_gid == 0:
        return ""
    try:
        name = grp.getgrgid(st.st_gid).gr_name
    except KeyError:
        name = str(st.st_gid)
    return f" (here for group {name}, too)"


def _some(paths: list[str]) -> str:
    paths = list(dict.fromkeys(paths))  # what is named twice is looked at twice
    more = len(paths) - _NAMED_MAX
    said = ", ".join(map(shown, paths[:_NAMED_MAX]))
    return f"{said} and {more} more" if more > 0 else said
