# SPDX-License-Identifier: LGPL-2.1-or-later
"""One daemon for a runtime directory: the lock that it holds for as long as it lives."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from watcher.model import shown
from watcher.records import durable


class AlreadyRunning(Exception):
    """Another daemon has this runtime directory."""


@contextmanager
def alone(runtime_directory: str) -> Iterator[None]:
    """Hold the lock for the block.

    Raises:
        AlreadyRunning: another process has it.
        OSError: the directory cannot be had.
    """
    durable.make(runtime_directory)
    path = os.path.join(runtime_directory, "lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"another daemon uses {shown(runtime_directory)} already") from error
        yield
    finally:
        os.close(fd)
