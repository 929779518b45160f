# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a burst of changes is over.

Pure: the caller has the clock, and waits. Times are integers in microseconds of any monotonic clock. This makes one
round out of twenty events. It does not say whether a file is complete: a quiet time cannot, but a lease and the image's
own size can (images/admission.py).
"""

from __future__ import annotations


class Settle:
    """Debounces changes by key. A key may also be due at a certain time, if nothing happens before."""

    def __init__(self) -> None:
        self._due: dict[str, int] = {}
        self._at_latest: dict[str, int] = {}
        """When a burst ends in any case: a directory that changes all the time becomes due, too."""

    def touch(self, key: str, now: int, quiet: int, longest: int) -> None:
        """Something changed for `key`: it is due after `quiet`, but not later than `longest` after the first change.

        Args:
            now: microseconds.
            quiet: `SettleSec=` in microseconds; 0 makes the key due at once.
            longest: `SettleMaxSec=` in microseconds, counted from the first change since the key was last due.
        """
        self._due[key] = min(now + quiet, self._at_latest.setdefault(key, now + longest))

    def again(self, key: str, when: int) -> None:
        """Have `key` due at `when` (microseconds), unless a burst of it makes it due anyway."""
        if key not in self._at_latest:
            self._due[key] = when

    def due(self, now: int) -> frozenset[str]:
        """The keys whose burst is over at `now` (microseconds); each is returned once and then forgotten."""
        over = frozenset(key for key, when in self._due.items() if when <= now)
        for key in over:
            self.forget(key)
        return over

    def deadline(self) -> int | None:
        """When `due()` will next have something (microseconds); None while nothing is pending."""
        return min(self._due.values(), default=None)

    def forget(self, key: str) -> None:
        """Drop what is pending for `key`, if anything: it is gone, or was just looked at."""
        self._due.pop(key, None)
        self._at_latest.pop(key, None)
