# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image files, mounted in the mount namespace of the workers: each once, for all stacks that use it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from watcher.model import Copy, Later, problem
from watcher.mounts import syscalls
from watcher.records import journal


def plain(copy: Copy, backing: int) -> int:
    """A detached mount of an image, whose file is open; see `Format.fsmount()`."""
    assert copy.format is not None
    return copy.format.fsmount(backing, copy.digest)


# Seconds: see workers.py.
_HANGS_SEC = 27.0


@dataclass(slots=True)
class _Image:
    """One digest.

    Attributes:
        turn: held while it is mounted. That may take for ever; then only those wait who want the same image.
        begun: since when that goes on, `time.monotonic()`; 0 if it does not.
        users: how many have it, or wait for it.
        inode: of the copy that is mounted, 0 if none is.
        mounts: how many lie on one another at its mount point. The topmost is of that copy.
    """

    turn: threading.Lock = field(default_factory=threading.Lock)
    begun: float = 0.0
    users: int = 0
    inode: int = 0
    mounts: int = 0

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Have its turn. Raises Later: who has it gets no answer from the kernel; then one thread is enough."""
        left = _HANGS_SEC if not self.begun else max(0.0, self.begun + _HANGS_SEC - time.monotonic())
        if not self.turn.acquire(timeout=left):
            raise Later("the kernel gives no answer about it: a mount of it does not end")
        try:
            yield
        finally:
            self.turn.release()


class Images:
    """The mounted images. Threads may share it.

    Args:
        place: directory of their mount points, which only the workers see.
        fsmount: makes the mount, as `plain()`.
    """

    def __init__(self, place: str, fsmount: Callable[[Copy, int], int] = plain) -> None:
        self._place = place
        self._fsmount = fsmount
        self._lock = threading.Lock()
        self._images: dict[str, _Image] = {}

    @contextlib.contextmanager
    def attached(self, copies: Iterable[Copy]) -> Iterator[dict[str, str]]:
        """Have the copies mounted while the block runs: absolute paths of their roots, by digest.

        Raises:
            Refused: the kernel will not mount it.
            OSError: no loop device, no memory.
        """
        roots: dict[str, str] = {}
        held: list[_Image] = []
        try:
            for copy in copies:
                if copy.digest not in roots:
                    roots[copy.digest] = copy.path
                    if copy.format is not None:
                        with self._lock:
                            held.append(self._images.setdefault(copy.digest, _Image()))
                            held[-1].users += 1
                        roots[copy.digest] = self._mounted(copy, held[-1])
            yield roots
        finally:
            with self._lock:
                for image in held:
                    image.users -= 1

    def missing(self, copies: Iterable[Copy]) -> list[Copy]:
        """The images that are not mounted. Raises OSError: a copy is gone."""
        return [copy for copy in copies if copy.format is not None and not self.has(copy)]

    def mount(self, copies: Iterable[Copy]) -> None:
        """Mount images that are not mounted. Raises as `attached()`."""
        with self.attached(copies):
            pass

    def has(self, copy: Copy) -> bool:
        """Whether a copy is mounted, and so to have it costs nothing. Raises OSError: it is gone."""
        with self._lock:
            image = self._images.get(copy.digest)
        return image is not None and image.inode == os.stat(copy.path, follow_symlinks=False).st_ino

    def retain(self, digests: Iterable[str]) -> None:
        """Unmount every image that is not in use, and neither among these nor of a copy that is replaced."""
        kept = set(digests)
        with self._lock:
            for digest, image in list(self._images.items()):
                if image.users or (digest in kept and image.mounts < 2):
                    continue
                mounted, image.inode = image.mounts > 0, 0
                try:
                    while image.mounts:
                        _unmount(self._path(digest))
                        image.mounts -= 1
                    del self._images[digest]
                    if mounted:
                        os.rmdir(self._path(digest))
                except OSError as error:
                    # The next call tries again, and the next mount uses the directory again.
                    journal.log.warning(f"mount workers: an image stays mounted for now: {problem(error)}")

    def _mounted(self, copy: Copy, image: _Image) -> str:
        path = self._path(copy.digest)
        with image.waited_for():
            inode = os.stat(copy.path, follow_symlinks=False).st_ino
            if image.inode != inode:
                # Where the store has made the copy anew, the new one is mounted over the old one. Other threads use
                # the path meanwhile. Without a mount they would take an empty directory for the image.
                image.begun = time.monotonic()
                try:
                    self._mount(copy, path)
                finally:
                    image.begun = 0.0
                image.inode = inode
                image.mounts += 1
        return path

    def _mount(self, copy: Copy, target: str) -> None:
        backing = os.open(copy.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mounted = self._fsmount(copy, backing)
        finally:
            os.close(backing)
        try:
            os.makedirs(target, 0o700, exist_ok=True)
            syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(mounted)

    def _path(self, digest: str) -> str:
        return f"{self._place}/{digest}"


def _unmount(path: str) -> None:
    syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
