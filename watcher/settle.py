# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a burst of changes is over.

Pure: the clock is handed in, so that this says *when* and somebody else waits. Times are integers in microseconds of
any monotonic clock. Whether a file is complete is not decided here: a lease and the image's own size say that
(`admit`), a quiet time never could. It only makes one round out of twenty events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class _Burst:
    ends: int
    """When it counts as over, if nothing more comes."""
    at_latest: int
    """When it counts as over whatever comes: a directory in which something always happens must not starve."""


class Settle:
    """Debounce by key: quiet for `quiet`, but never later than `longest` after the first change of the burst."""

    def __init__(self) -> None:
        self._bursts: dict[str, _Burst] = {}

    def touch(self, key: str, now: int, quiet: int, longest: int) -> None:
        """Something changed for `key` at `now`.

        Args:
            key: any string, a service's name.
            now: microseconds.
            quiet: `SettleSec=` in microseconds; 0 makes the key due at once.
            longest: `SettleMaxSec=` in microseconds, counted from the first change since the key was last due.
        """
        burst = self._bursts.get(key)
        if burst is None:
            burst = _Burst(ends=now, at_latest=now + longest)
        self._bursts[key] = replace(burst, ends=min(now + quiet, burst.at_latest))

    def due(self, now: int) -> frozenset[str]:
        """The keys whose burst is over at `now` (microseconds); each is returned once and then forgotten."""
        over = frozenset(key for key, burst in self._bursts.items() if burst.ends <= now)
        for key in over:
            del self._bursts[key]
        return over

    def deadline(self) -> int | None:
        """When `due()` will next have something (microseconds); None while nothing is pending: nobody need wake up."""
        return min((burst.ends for burst in self._bursts.values()), default=None)

    def forget(self, key: str) -> None:
        """`key` is gone or was just looked at: what is pending for it, if anything, is dropped."""
        self._bursts.pop(key, None)
