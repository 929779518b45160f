# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names in the store's directory: who may take one away, and when.

The daemon and `confext-watcher exec` use the store at the same time. A copy should not be collected after it was made
(or found) and before it is in an accepted stack: a round holds `using()` meanwhile. A round that hangs there, because
what it copies is on a dead file system, holds it for ever. So copies that are older than ten minutes, and that nothing
refers to, are collected all the same; a round that wanted one copies it again.

A stack must never be without its copies, and a temporary file must never go while it is written. `.names` and the lock
of that file see to it. What holds these locks waits for nothing but the store's own disk.

flock(2) belongs to the open file: it works between threads as between processes, and a killed process holds nothing.
To lock a file, one has to open it; for reading is enough. So every lock is on a file that its owner alone can open, in
a directory where he alone can replace it.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack

from watcher.images.stacks import TEMPORARY
from watcher.model import Busy, Kind
from watcher.records import durable

DIGEST = re.compile(r"[0-9a-f]{64}")

_LOCK = ".lock"
_NAMES = ".names"
# Seconds. A copy that is older, and that nothing refers to, is hardly about to be put into a stack.
_LEFT_SEC = 600
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Names:
    """The names of one store. Threads may share it.

    Args:
        path: of the store's directory.

    Attributes:
        directory: its descriptor.
    """

    def __init__(self, path: str) -> None:
        self.directory = os.open(path, _OPEN | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.directory)

    def hold(self, wait: bool) -> io.FileIO:
        """See `Store.hold()`."""
        return self._lock(_LOCK, fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)

    def naming(self) -> io.FileIO:
        """No name is taken away until what is returned is closed. Hold it no longer than the store's disk takes."""
        return self._lock(_NAMES, fcntl.LOCK_SH)

    def holds(self, digest: str, size: int | None) -> bool:
        """Whether there is a copy of that digest; with a `size`, an image of so many bytes."""
        try:
            found = os.stat(digest, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return size is None or (stat.S_ISREG(found.st_mode) and found.st_size == size)

    def begin(self, size: int, kind: Kind) -> tuple[str, int]:
        """Make a temporary file or directory for `size` bytes: its name, and a descriptor by which it is locked."""
        name = f"{TEMPORARY}{size}-{secrets.token_hex(8)}"
        with self.naming():
            if kind is Kind.DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=self.directory)
            flags = _OPEN | os.O_DIRECTORY if kind is Kind.DIRECTORY else _NEW
            fd = os.open(name, flags, 0o400, dir_fd=self.directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
        return name, fd

    def end(self, name: str, fd: int) -> None:
        """Remove what `begin()` has made, if it still has that name."""
        try:
            durable.remove(name, self.directory)
        finally:
            os.close(fd)

    def collect(
        self, needed: Callable[[], frozenset[str]], used: frozenset[str], worn: frozenset[str]
    ) -> tuple[str, ...]:
        """Remove copies that are neither needed nor used, and what killed processes left; see `Store.collect()`.

        Args:
            needed: called for the digests that stacks refer to, while no stack can get others.
            used: digests that are mounted.
            worn: those of them of which the damaged copy is.

        Raises:
            Busy: copies are being made, and nothing else is to be removed.
        """
        with ExitStack() as held:
            busy = None
            try:
                held.enter_context(self._lock(_LOCK, _AT_ONCE))
            except Busy as error:
                busy = error
            with self._lock(_NAMES, _AT_ONCE):
                keep = needed() | used
                names = os.listdir(self.directory)
                unneeded = tuple(name for name in names if DIGEST.fullmatch(name) and name not in keep)
                if busy:
                    unneeded = tuple(filter(self._is_left, unneeded))
                # The digest of a damaged copy is in its name.
                dead = [
                    name for name in names if not worn.intersection(name.split("-")) and self._is_dead(name)
                ]
                if busy and not unneeded and not dead:
                    raise busy
                for name in unneeded:
                    dead.append(f"{TEMPORARY}0-{secrets.token_hex(8)}")
                    os.rename(name, dead[-1], src_dir_fd=self.directory, dst_dir_fd=self.directory)
        if unneeded:
            # Otherwise a power cut may bring back the name of a tree, and half of what is in it.
            os.fsync(self.directory)
        # Without the locks: a large tree takes long, and no other process goes by these names.
        for name in dead:
            durable.remove(name, self.directory)
        return unneeded

    def _is_left(self, name: str) -> bool:
        try:
            made = os.stat(name, dir_fd=self.directory, follow_symlinks=False).st_ctime
        except FileNotFoundError:
            return False
        return time.time() - made > _LEFT_SEC

    def _is_dead(self, name: str) -> bool:
        """Whether a name is that of a temporary file or directory to which no process writes any more."""
        if not name.startswith(TEMPORARY):
            return False
        try:
            fd = os.open(name, _OPEN, dir_fd=self.directory)
        except OSError:
            return False
        try:
            fcntl.flock(fd, _AT_ONCE)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _lock(self, name: str, operation: int) -> io.FileIO:
        """Lock a file of that name until what is returned is closed. Raises Busy if `operation` does not wait."""
        lock = io.FileIO(os.open(name, _OPEN | os.O_CREAT, 0o600, dir_fd=self.directory))
        try:
            fcntl.flock(lock, operation)
        except OSError as error:
            lock.close()
            if isinstance(error, BlockingIOError):
                raise Busy("copies are being made, or removed") from error
            raise
        return lock
