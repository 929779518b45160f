# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks once at all that an image would bring to a service, before it is admitted: each file is read to its end.

No checksum tells damaged blocks in an image; the kernel finds them when it unpacks them. A service would be the first
to read them, and get EIO. So each file is read here, from the store's copy, which does not change any more.

That takes as long as the kernel takes to unpack the image. A few MiB are read at once, where the caller is. For more
than that other work goes first: a thread of its own begins anew, and lowers its priority for the processor, and so for
the disk, too (ioprio_set(2), "Selecting an I/O scheduling class"). It holds the interpreter for microseconds: the
kernel reads a file from end to end without it, and copies nothing (sendfile(2)).

Strangers made the image, perhaps one that unpacks without end: the walk keeps to the limits for trees (`walk.py`), and
reads no more bytes than `ImageMax=` allows for one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice

from watcher.images.attributes import names, require_unmarked
from watcher.images.walk import DIRECTORY, Path, Walk, where
from watcher.model import Refused
from watcher.mounts.descriptors import Descriptors

# Half of what nice(2) has: where the processor is busy this gets a tenth of it, and does not starve.
_NICE = 10
_AT_ONCE = 8 << 20
"""Bytes that are read in milliseconds: on a busy machine, waiting for a turn would take longer."""
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_AGAIN = re.compile(r"etc_[0-9]+")
_NAMES_MAX = 1000
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class _Long(Exception):
    """There is more than is read at once."""


def require_readable(root: int, size_max: int) -> None:
    """Read all of `etc` below the directory `root` of a mounted image (a descriptor).

    Args:
        size_max: bytes (`ImageMax=`).

    Raises:
        Refused: a file cannot be read; there is too much; or something has an attribute that means something to
            overlayfs.
        OSError: no memory, no descriptors, no threads.
    """
    try:
        _Reading(size_max, _leave).run(root)
    except _Long:
        _in_a_thread(lambda: _Reading(size_max, _lower_priority).run(root))


def _leave() -> None:
    raise _Long


def _in_a_thread(function: Callable[[], None]) -> None:
    """Run a function in a thread that ends after it. Raises what it raises, and OSError: no thread can be started."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 -- raised again where it is waited for
            done.set_exception(error)
        else:
            done.set_result(None)

    try:
        threading.Thread(target=run, name="confext-read", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread can be started") from error
    done.result()


def _lower_priority() -> None:
    """Of this thread alone. Only privilege could raise it again: it is for a thread that ends after this.

    A sandbox (`SystemCallFilter=`) may not let us. Then it reads as fast as others do: that says nothing of the image.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def _require_one_etc(root: int, fds: Descriptors) -> None:
    """Refuse what mksquashfs makes of an image that is there already: it adds the new `etc` as `etc_1`."""
    with os.scandir(fds.add(root)) as entries:
        again = sorted(entry.name for entry in islice(entries, _NAMES_MAX) if _AGAIN.fullmatch(entry.name))
    if again:
        raise Refused(
            f"it has {again[-1]}/ beside etc/: mksquashfs was run twice and added to the image that was there;"
            " build it with -noappend"
        )


class _Reading(Walk):
    """Reads an image.

    Args:
        size_max: bytes of all files.
        long: called before each file, once there are more than `_AT_ONCE`.
    """

    def __init__(self, size_max: int, long: Callable[[], None]) -> None:
        super().__init__()
        self._size_max = size_max
        self._long = long
        self._size = 0
        self._read: set[int] = set()
        """Inodes of files with several names."""

    def run(self, root: int) -> None:
        with Descriptors() as fds:
            self._null = fds.add(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
            _require_one_etc(os.open(".", DIRECTORY, dir_fd=root), fds)
            self._node(root, ("etc",))

    def _node(self, parent: int, path: Path) -> None:
        name = path[-1]
        try:
            # No descriptor gives a link's own attributes; no other link is on this way to them.
            require_unmarked(names(f"/proc/self/fd/{parent}/{name}"), where(path))
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            with Descriptors() as fds:
                if stat.S_ISDIR(found.st_mode):
                    directory = fds.add(os.open(name, DIRECTORY, dir_fd=parent))
                    for child in self.names(directory, path):
                        self._node(directory, (*path, child))
                elif stat.S_ISREG(found.st_mode):
                    self._file(fds.add(os.open(name, _FILE, dir_fd=parent)), found)
                elif stat.S_ISLNK(found.st_mode):
                    os.readlink(name, dir_fd=parent)
        except OSError as error:
            if error.errno in _SHORT:
                raise
            raise Refused(f"broken: {where(path)} cannot be read: {error.strerror}") from error

    def _file(self, fd: int, found: os.stat_result) -> None:
        if found.st_nlink > 1:
            if found.st_ino in self._read:
                return
            self._read.add(found.st_ino)
        self._size += found.st_size
        if self._size > self._size_max:
            raise Refused(
                f"too large: its files have more than {self._size_max} bytes, which are allowed (ImageMax=)"
            )
        if self._size > _AT_ONCE:
            self._long()
        offset = 0
        while offset < found.st_size:
            sent = os.sendfile(self._null, fd, offset, found.st_size - offset)
            if not sent:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset += sent
