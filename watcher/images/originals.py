# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a candidate is, open: an image with what lies beside it, or a tree. It has a key, and can be copied."""

from __future__ import annotations

import os
from contextlib import ExitStack

from watcher.images import tree
from watcher.images.complete import Seen
from watcher.images.files import stat_key
from watcher.images.formats.probe import probe
from watcher.images.sidecars import Beside, has_new, read, with_parts
from watcher.images.store import Store
from watcher.images.verdicts import Key
from watcher.model import Busy, Candidate, Copy, Refused, shown
from watcher.resolve.strict_modes import Guard, Way
from watcher.watch.lease import Lease, coarse_now_ns
from watcher.watch.writers import Writers

_SECOND_NS = 1_000_000_000


class ImageFile:
    """An image, open.

    Args:
        files: what lies beside it.
        writers: who writes to files.

    Attributes:
        key: what `stat` says of it, and of what lies beside it.
        lasting: set by `copy()`: no other content of the file can have this key.
    """

    def __init__(self, fd: int, candidate: Candidate, files: Beside, writers: Writers | None = None) -> None:
        self._fd = fd
        self._writers = writers
        self._candidate = candidate
        self._beside = files
        self.key = self._key()
        self.lasting = False

    def copy(self, store: Store) -> Copy:
        with ExitStack() as leases:
            lease = self._lease(self._fd, leases)
            for suffix, fd in self._beside.fds.items():
                self._lease(fd, leases, f"{shown(self._beside.names[suffix])} beside it: ")
            found = os.fstat(self._fd)
            self.key = self._key()
            try:
                return self._copied(store, found.st_size, lease)
            except Refused:
                lease.check()
                raise
            finally:
                changed_ns = max(found.st_ctime_ns, self._beside.changed_ns)
                self.lasting = _is_past(changed_ns, lease.proven_ns)

    def _lease(self, fd: int, leases: ExitStack, which: str = "") -> Lease:
        """A lease on a file that nobody is writing to. Raises Refused for one that two programs wrote to at once."""
        writers = self._writers
        if writers is None:
            return leases.enter_context(Lease(fd))
        writers.watch((os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")),))
        try:
            lease = leases.enter_context(Lease(fd))
        except Busy as busy:
            who = writers.writing(fd)
            raise Busy(f"{which}{busy} by {who}" if who else f"{which}{busy}") from busy
        if who := writers.blend(fd, alone=lease.exact):
            raise Refused(
                f"{which}two programs wrote to it at once ({who}), so it may be a mix: copy it again;"
                " or touch it, if you know that it is whole"
            )
        return lease

    def _key(self) -> Key:
        return ("image", *stat_key(os.fstat(self._fd)), self._beside.key)

    def _copied(self, store: Store, size: int, lease: Lease) -> Copy:
        image, parts = probe(self._fd, size), None
        if self._beside:
            name = self._candidate.filename
            parts = read(self._beside, name)
            image = with_parts(image, parts, size, name)
        copy = store.add_image(self._fd, image, lease, parts)
        if has_new(self._candidate):
            raise Busy("what it is verified by has just come beside it")
        return copy


class Tree:
    """A directory tree, open, with the same attributes."""

    def __init__(self, root: int, guard: Guard | None) -> None:
        self._root = root
        self._signature = tree.signature(root, guard)
        self.key: Key = ("tree", self._signature.key)
        self.lasting = False

    def seen(self, path: str, way: Way) -> Seen:
        """As `complete.py` judges it; `path` is where the look found it, `way` how that leads to it."""
        linked_ns = max((os.lstat(f"{parent}/{name}").st_ctime_ns for parent, name in way.links), default=0)
        real_path = os.readlink(f"/proc/self/fd/{self._root}")
        return Seen(path, os.fstat(self._root), real_path, linked_ns, self._signature)

    def copy(self, store: Store) -> Copy:
        try:
            return store.add_tree(self._root, self._signature)
        finally:
            self.lasting = _is_past(self._signature.youngest_ns, coarse_now_ns())


def _is_past(ctime_ns: int, proven_ns: int) -> bool:
    """Whether a change after `proven_ns` must show in the ctime: timestamps are as coarse as the timer's tick.

    A time far in the future (the clock was set back) will not come again by itself.
    """
    return ctime_ns < proven_ns or ctime_ns > proven_ns + _SECOND_NS
