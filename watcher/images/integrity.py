# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a copy in the store still is what its name says: its digest, taken again.

The store writes a copy once and never changes it. A disk, a repair of its file system or a hand may. So each process
reads a copy before it uses it for the first time, and again when what `stat` says of it has changed, or when something
went wrong with it (`doubt`). That costs what hashing costs: about 2 s for a GiB. In the background the daemon reads
all copies from the disk again (`scrub.py`).

A damaged copy is not used any more, but it keeps its name: a service that is started now would else get a stack that
lacks a layer. The next round copies the dropped file again, where that is whole, and the two change places in one step
(`place`). Or it accepts another stack. What was replaced may still be mounted: the digest stays in its name, and it is
removed once no service shows it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable

from watcher.images import tree
from watcher.images.files import hash_file, hash_from_disk, stat_key
from watcher.images.stacks import TEMPORARY
from watcher.images.tree import Read
from watcher.model import Busy, Refused
from watcher.mounts import syscalls
from watcher.mounts.process import may_mount
from watcher.records import journal
from watcher.resolve.scan import LACKS

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC

# renameat2(2): a file system that cannot exchange two names.
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def now() -> float:
    """Seconds since boot, as the kernel has it for the start of a process (`Process.started`)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Whole:
    """Which copies are whole. Threads may share it.

    Args:
        directory: descriptor of the store.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._seen: dict[str, tuple[int, ...]] = {}
        self._bad: dict[str, tuple[int, ...]] = {}
        # Those of them that the disk has so: the kernel may remember them whole.
        self._rotten: set[str] = set()
        self._damaged: dict[str, float] = {}
        self._replaced: dict[str, float] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._placing = threading.Lock()
        # A user namespace knows few owners: those of a tree may be none that a copy can have there.
        self._owners_are_kept = may_mount()
        self.find_replaced()

    def doubt(self, digests: Iterable[str]) -> None:
        """Something went wrong with these copies: they are read again before they are used.

        Not those that were read from the disk, and damaged: what the kernel remembers of them says nothing.
        """
        for digest in digests:
            self._seen.pop(digest, None)
            if digest not in self._rotten:
                self._bad.pop(digest, None)

    def damaged_since(self, digests: Iterable[str], since: float) -> bool:
        """Whether one was found damaged after `since`, `time.monotonic()`. It may have been copied again by now."""
        return any(self._damaged.get(digest, -1.0) >= since for digest in digests)

    @property
    def damaged(self) -> frozenset[str]:
        """Digests of those that were found damaged, and not made anew since."""
        return frozenset(self._bad)

    def replaced_since(self, digests: Iterable[str], since: float) -> bool:
        """Whether one took the place of a damaged one after `since`, `now()`: what was mounted before shows that."""
        return any(self._replaced.get(digest, -1.0) >= since for digest in digests)

    def find_replaced(self) -> frozenset[str]:
        """Digests of damaged copies that are still there, and that another process has replaced. Counts as now."""
        names = (name for name in os.listdir(self._directory) if name.startswith(TEMPORARY))
        parts = (name.split("-") for name in names)
        others = {part[2] for part in parts if len(part) > 3} - self._replaced.keys()
        self._replaced.update(dict.fromkeys(others, now()))
        return frozenset(others)

    def verify(self, digest: str) -> bool:
        """Whether a copy is there and whole. Blocks while the copy is read, where that has to be.

        Raises:
            OSError: the store cannot be looked into, or the copy not now.
        """
        if (known := self._known(digest)) is not None:
            return known
        # Many services may have the same image: one thread reads it.
        with self._turns.setdefault(digest, threading.Lock()):
            known = self._known(digest)
            return self._read(digest, hash_file) if known is None else known

    def scrub(self, digest: str, pace: Callable[[], object]) -> bool:
        """Read a copy from the disk, whatever is known of it. Blocks for long, and keeps no other thread waiting.

        Args:
            pace: see `hash_from_disk()`.

        Returns:
            False: it is damaged. (One that is gone is not.)

        Raises:
            OSError: the store cannot be looked into.
        """
        if self._read(digest, functools.partial(hash_from_disk, pace=pace)):
            self._rotten.discard(digest)
            return True
        if digest not in self._bad:
            return True
        self._rotten.add(digest)
        return False

    def place(self, made: str, digest: str) -> None:
        """Give what was written under the temporary name `made` the name of its digest.

        A whole copy of that name stays: it may be mounted. A damaged one changes places with the new one.

        Raises:
            OSError: the store cannot be changed; all names are what they were.
        """
        with self._placing:
            if not self.verify(digest):
                self._exchange(made, digest)
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(digest, dir_fd=self._directory, follow_symlinks=False)
                self._seen[digest] = stat_key(found)
                self._bad.pop(digest, None)
                self._rotten.discard(digest)

    def _exchange(self, made: str, digest: str) -> None:
        at = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
        try:
            found = os.stat(digest, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            try:
                os.rename(made, digest, **at)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # else another process was first with the same tree
            return
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        away = f"{TEMPORARY}{size}-{digest}-{secrets.token_hex(4)}"
        # Named before: if we are killed in between, the damaged one must have a name that stays while it is mounted.
        os.rename(made, away, **at)
        try:
            syscalls.rename_exchange(away, digest, self._directory)
        except OSError as error:
            os.rename(away, made, **at)
            if error.errno not in _NO_EXCHANGE:
                raise
            os.rename(digest, away, **at)
            os.rename(made, digest, **at)
        self._replaced[digest] = now()
        journal.log.info(f"the copy {digest} in the store was made anew, in the place of the damaged one")

    def _known(self, digest: str) -> bool | None:
        """Whether it is whole; None: it has to be read."""
        try:
            key = stat_key(os.stat(digest, dir_fd=self._directory, follow_symlinks=False))
        except FileNotFoundError:
            return False
        if self._seen.get(digest) == key:
            return True
        return False if self._bad.get(digest) == key else None

    def _read(self, digest: str, read: Read) -> bool:
        try:
            fd = os.open(digest, _OPEN, dir_fd=self._directory)
        except FileNotFoundError:
            return False
        try:
            found = os.fstat(fd)
            problem = self._problem(fd, found, digest, read)
        finally:
            os.close(fd)
        if not problem:
            self._bad.pop(digest, None)
            self._seen[digest] = stat_key(found)
        elif self._is_named(digest, found):
            self._condemn(digest, stat_key(found), problem)
        return not problem

    def _problem(self, fd: int, found: os.stat_result, digest: str, read: Read) -> str:
        """What is wrong with it, "" if nothing is. Raises OSError: that cannot be known now."""
        try:
            if stat.S_ISDIR(found.st_mode):
                same = tree.digest(fd, whole=True, read=read) == digest or not self._owners_are_kept
            else:
                hasher = hashlib.sha256()
                read(fd, found.st_size, hasher)
                same = hasher.hexdigest() == digest
        except OSError as error:
            if error.errno in LACKS:
                raise
            return f"it cannot be read: {error.strerror}"
        except (Refused, Busy) as error:
            return str(error)
        return "" if same else "its content has changed"

    def _is_named(self, digest: str, found: os.stat_result) -> bool:
        """Whether it still has its name. Else it was collected or replaced while it was read."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(digest, dir_fd=self._directory, follow_symlinks=False), found)
        return False

    def _condemn(self, digest: str, key: tuple[int, ...], problem: str) -> None:
        """It is not used any more. One line, however often it is read again."""
        self._damaged[digest] = time.monotonic()
        self._seen.pop(digest, None)
        if self._bad.get(digest) != key:
            self._bad[digest] = key
            journal.log.warning(f"the copy {digest} in the store is damaged and not used any more: {problem}")
