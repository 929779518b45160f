# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens what a candidate's path leads to, once: from then on everything goes by that descriptor."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from watcher.model import Busy, Candidate, Kind, Later, Refused
from watcher.resolve.strict_modes import Guard, StrictModes, Way

# O_NONBLOCK: if another process holds a write lease, open(2) fails. Else it would wait for 45 seconds.
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
_EXPECTED = {Kind.IMAGE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR}


@contextmanager
def opened(
    candidate: Candidate, modes: StrictModes | None = None, way: Way | None = None
) -> Iterator[tuple[int, Guard | None]]:
    """What a candidate's path leads to, open for reading, and the guard of all below it.

    Args:
        way: gets what was met on the way, where `modes` walk it.

    Raises: also for an OSError in the block:
        Refused: a link that leads nowhere or in a circle, not the type its kind asks for, or not readable.
        Unsafe: a user whom the service does not trust could change it.
        Busy: it has just vanished, or another process holds a write lease on it.
        Later: the machine could not look it up.
    """
    try:
        place, guard = _open(candidate, modes, way)
        try:
            fd = _reopen(place, candidate.kind)
        finally:
            os.close(place)
        try:
            yield fd, guard
        finally:
            os.close(fd)
    except OSError as error:
        raise Later(f"cannot be read: {error.strerror}") from error


def _open(candidate: Candidate, modes: StrictModes | None, way: Way | None) -> tuple[int, Guard | None]:
    """An O_PATH descriptor: links are followed, and nothing but a file or directory is opened for real."""
    guard: Guard | None = None
    refused: Refused | None = None
    try:
        if modes is None:
            fd = os.open(candidate.path, os.O_PATH | os.O_CLOEXEC)
        else:
            found = modes.open(candidate.path, way)
            fd, guard, refused = found.fd, found.guard, found.unsafe
    except OSError as error:
        raise _not_opened(candidate, error) from error
    type_, expected = stat.S_IFMT(os.fstat(fd).st_mode), _EXPECTED[candidate.kind]
    if refused is None and type_ != expected:
        refused = Refused(f"{_TYPES.get(type_, 'of an unknown type')}, not {_TYPES[expected]}")
    if refused is not None:
        os.close(fd)
        raise refused
    return fd, guard


def _not_opened(candidate: Candidate, error: OSError) -> Refused | Busy | OSError:
    match error.errno:
        case errno.ELOOP:
            return Refused("a link that leads in a circle")
        case errno.ENOENT | errno.ENOTDIR:
            return (
                Refused("a link that leads nowhere") if os.path.islink(candidate.path) else Busy("vanished")
            )
        case errno.EACCES | errno.EPERM:
            return Refused(f"cannot be read: {error.strerror}")
        case _:
            return error


def _reopen(place: int, kind: Kind) -> int:
    """The very file that `place` (O_PATH) is, for reading."""
    try:
        return os.open(f"/proc/self/fd/{place}", READ | (os.O_DIRECTORY if kind is Kind.DIRECTORY else 0))
    except PermissionError as error:
        raise Refused(f"cannot be read: {error.strerror}") from error
    except BlockingIOError as error:
        raise Busy("open for writing") from error
