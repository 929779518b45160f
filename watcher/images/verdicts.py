# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verdicts on contents, so that nothing is read twice that has not changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from watcher.model import Copy, Refused

Key = tuple[object, ...]

_MAX = 10_000


class Verdicts:
    """Verdicts by what `stat` says of a file or tree. Threads may share it: one reads, the others learn.

    A key to remember is one that no later content of the file can have: the caller sees to that.
    """

    def __init__(self) -> None:
        self._verdicts: dict[Key, Copy | Refused] = {}
        self._turns: dict[Key, tuple[threading.Lock, int]] = {}
        self._lock = threading.Lock()

    def recall(self, key: Key) -> Copy | None:
        """The copy that was made; it may have been collected since. Raises the `Refused` that was the verdict."""
        verdict = self._verdicts.get(key)
        if isinstance(verdict, Refused):
            raise type(verdict)(*verdict.args)
        return verdict

    def remember(self, key: Key, verdict: Copy | Refused) -> None:
        """Replace the verdict. Of more than _MAX the oldest is forgotten."""
        with self._lock:
            self._verdicts.pop(key, None)
            if len(self._verdicts) >= _MAX:
                self._verdicts.pop(next(iter(self._verdicts)))
            self._verdicts[key] = verdict

    def clear(self) -> None:
        """Forget everything: with other limits the next look may decide otherwise."""
        with self._lock:
            self._verdicts.clear()

    @contextmanager
    def turn(self, key: Key) -> Iterator[None]:
        """One thread at a time for each key."""
        with self._lock:
            lock, users = self._turns.get(key, (threading.Lock(), 0))
            self._turns[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._turns.pop(key)
                if users > 1:
                    self._turns[key] = lock, users - 1
