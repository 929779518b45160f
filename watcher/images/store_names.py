# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names in the store's directory: who may take one away, and when.

The daemon and `confext-watcher exec` use it at the same time. A copy should not be collected between having been made
(or found) and having become part of an accepted stack: whoever does both holds `using()` around them. One that hangs
there (what it copies lies on a dead file system) holds it for ever: so copies older than ten minutes that nothing
refers to go all the same, and a round that wanted one copies it again. What must never be is a stack without its
copies, or a temporary file that goes while it is written: `.names` and the lock of that file see to it, and who holds
these waits for nothing but the store's own disk.

flock(2) belongs to the open file, so all this works between threads as between processes, and a killed process holds
nothing. Whoever can open a file can lock it, for reading is enough: every lock of ours is on a file that its owner
alone can open, where only he can replace it.
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
# Seconds. A copy that is older, and that nothing refers to, is not about to be put into a stack.
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
        """Until what is returned is closed, no name is taken away; not for longer than the store's disk takes."""
        return self._lock(_NAMES, fcntl.LOCK_SH)

    def holds(self, digest: str, size: int | None) -> bool:
        """Whether there is a copy; with a `size`, an image of that size."""
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

    def collect(self, needed: Callable[[], frozenset[str]], used: frozenset[str]) -> tuple[str, ...]:
        """Remove what is neither needed nor used, and what the dead left; see `Store.collect()`.

        Args:
            needed: asked for the digests that stacks refer to, while no stack can get others.
            used: digests that are mounted.

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
                # A damaged copy of a tree is what a service that runs on it still sees.
                dead = [
                    name
                    for name in names
                    if name.startswith(TEMPORARY)
                    and self._is_dead(name)
                    and not used.intersection(name.split("-"))
                ]
                if busy and not unneeded and not dead:
                    raise busy
                for name in unneeded:
                    dead.append(f"{TEMPORARY}0-{secrets.token_hex(8)}")
                    os.rename(name, dead[-1], src_dir_fd=self.directory, dst_dir_fd=self.directory)
        if unneeded:
            # Or a power cut may bring the name of a tree back, and half of what is in it.
            os.fsync(self.directory)
        # Their names are nobody's any more, so a large tree keeps nobody waiting.
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
        """Whether nobody writes to a temporary file or directory any more, as far as can be found out now."""
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
        """Until what is returned is closed. Raises Busy."""
        lock = io.FileIO(os.open(name, _OPEN | os.O_CREAT, 0o600, dir_fd=self.directory))
        try:
            fcntl.flock(lock, operation)
        except OSError as error:
            lock.close()
            if isinstance(error, BlockingIOError):
                raise Busy("copies are being made, or removed") from error
            raise
        return lock
