# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a copy in the store still is what its name says: its digest, taken again.

The store writes a copy once and never changes it. A disk, a repair of its file system or a hand may. So each process
reads a copy before it uses it for the first time, and again when what `stat` says of it has changed, or when something
went wrong with it (`doubt`). That costs what hashing costs: about 2 s for a GiB.

A damaged copy is renamed away, and so is not mounted again. The next round finds none, and copies the dropped file
again, where that is whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable

from watcher.images import tree
from watcher.images.files import digest_of, stat_key
from watcher.images.stacks import TEMPORARY
from watcher.model import Busy, Refused
from watcher.mounts.process import may_mount
from watcher.records import journal

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Whole:
    """Which copies are whole. Threads may share it.

    Args:
        directory: descriptor of the store.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._seen: dict[str, tuple[int, ...]] = {}
        self._damaged: dict[str, float] = {}
        self._turns: dict[str, threading.Lock] = {}
        # A user namespace knows few owners: those of a tree may be none that a copy can have there.
        self._owners_are_kept = may_mount()

    def made(self, digest: str) -> None:
        """This process has just written a copy, and taken its digest on the way."""
        with contextlib.suppress(FileNotFoundError):
            self._seen[digest] = stat_key(os.stat(digest, dir_fd=self._directory, follow_symlinks=False))

    def doubt(self, digests: Iterable[str]) -> None:
        """Something went wrong with these copies: they are read again before they are used."""
        for digest in digests:
            self._seen.pop(digest, None)

    def damaged_since(self, digests: Iterable[str], since: float) -> bool:
        """Whether one was found damaged after `since`, `time.monotonic()`. It may have been copied again by now."""
        return any(self._damaged.get(digest, -1.0) >= since for digest in digests)

    def verify(self, digest: str) -> bool:
        """Whether a copy is there and whole. Blocks while the copy is read, where that has to be.

        Raises:
            OSError: the store cannot be looked into.
        """
        if self._is_seen(digest):
            return True
        # Many services may have the same image: one thread reads it.
        with self._turns.setdefault(digest, threading.Lock()):
            if self._is_seen(digest):
                return True
            try:
                fd = os.open(digest, _OPEN, dir_fd=self._directory)
            except FileNotFoundError:
                return False
            try:
                found = os.fstat(fd)
                if problem := self._problem(fd, found, digest):
                    self._damaged[digest] = time.monotonic()
                    self._put_away(digest, found, problem)
                    return False
                self._seen[digest] = stat_key(found)
            finally:
                os.close(fd)
        return True

    def _is_seen(self, digest: str) -> bool:
        try:
            found = os.stat(digest, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return self._seen.get(digest) == stat_key(found)

    def _problem(self, fd: int, found: os.stat_result, digest: str) -> str:
        """What is wrong with it, "" if nothing is."""
        try:
            if stat.S_ISDIR(found.st_mode):
                same = tree.digest(fd, whole=True) == digest or not self._owners_are_kept
            else:
                same = digest_of(fd, found.st_size) == digest
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        except (Refused, Busy) as error:
            return str(error)
        return "" if same else "its content has changed"

    def _put_away(self, digest: str, found: os.stat_result, problem: str) -> None:
        """Rename it: `Names.collect()` removes it once nothing is mounted from it."""
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        away = f"{TEMPORARY}{size}-{digest}-{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(digest, dir_fd=self._directory, follow_symlinks=False)
            if now.st_ino == found.st_ino:  # else another process was first, and has made a good one
                os.rename(digest, away, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                journal.log.warning(
                    f"the copy {digest} in the store is damaged and not used any more: {problem}"
                )
