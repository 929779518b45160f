# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a burst of changes is over.

Pure: the caller has the clock, and waits. Times are integers in microseconds of any monotonic clock. This makes one
round out of twenty events. It does not say whether a file is complete: a quiet time cannot, but a lease and the image's
own size can (images/admit.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class _Burst:
    ends: int
    """When it counts as over, if nothing more comes."""
    at_latest: int
    """When it counts as over whatever comes: else a directory in which something always happens would never be due."""


class Settle:
    """Debounces changes by key. A key may also be due at a certain time, if nothing happens before."""

    def __init__(self) -> None:
        self._bursts: dict[str, _Burst] = {}
        self._again: dict[str, int] = {}

    def touch(self, key: str, now: int, quiet: int, longest: int) -> None:
        """Something changed for `key`: it is due after `quiet`, but not later than `longest` after the first change.

        Args:
            now: microseconds.
            quiet: `SettleSec=` in microseconds; 0 makes the key due at once.
            longest: `SettleMaxSec=` in microseconds, counted from the first change since the key was last due.
        """
        self._again.pop(key, None)
        burst = self._bursts.get(key)
        if burst is None:
            burst = _Burst(ends=now, at_latest=now + longest)
        self._bursts[key] = replace(burst, ends=min(now + quiet, burst.at_latest))

    def again(self, key: str, when: int) -> None:
        """Have `key` due at `when` (microseconds), unless a burst of it makes it due anyway."""
        if key not in self._bursts:
            self._again[key] = when

    def due(self, now: int) -> frozenset[str]:
        """The keys whose burst is over at `now` (microseconds); each is returned once and then forgotten."""
        over = {key for key, burst in self._bursts.items() if burst.ends <= now}
        over |= {key for key, when in self._again.items() if when <= now}
        for key in over:
            self.forget(key)
        return frozenset(over)

    def deadline(self) -> int | None:
        """When `due()` will next have something (microseconds); None while nothing is pending."""
        return min((*(burst.ends for burst in self._bursts.values()), *self._again.values()), default=None)

    def forget(self, key: str) -> None:
        """Drop what is pending for `key`, if anything: it is gone, or was just looked at."""
        self._bursts.pop(key, None)
        self._again.pop(key, None)
