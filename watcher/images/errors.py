# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the store, in a line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from watcher.model import Later, Refused

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG})


class StoreFull(Later):
    """No room for a copy: in the file system, in memory, or below StoreMax=. `collect()` may make room."""


def require_size(size: int, limit: int, setting: str) -> None:
    """Raise Refused for more bytes than a setting allows."""
    if size > limit:
        raise Refused(f"too large: {size} bytes, {limit} are allowed ({setting})")


def require_room(used: int, size: int, store_max: int) -> None:
    """Raise StoreFull where a store has no room for `size` more bytes."""
    if used + size > store_max:
        room = f"{used} of {store_max} bytes (StoreMax=) are in use"
        raise StoreFull(f"the store is full: {room}, {size} more are needed")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """An error of the machine, in a line: StoreFull where there is no room, Later for anything else."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StoreFull(f"{what}: no room: {error.strerror}") from error
        raise Later(f"{what}: {error.strerror}") from error
    except MemoryError as error:
        raise StoreFull(f"{what}: no memory") from error
