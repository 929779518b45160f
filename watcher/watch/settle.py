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
    """Debounce by key: quiet for `quiet`, but never later than `longest` after the first change of the burst.

    A key may also be due again at a certain time, if nothing happens before.
    """

    def __init__(self) -> None:
        self._bursts: dict[str, _Burst] = {}
        self._again: dict[str, int] = {}

    def touch(self, key: str, now: int, quiet: int, longest: int) -> None:
        """Something changed for `key` at `now`.

        Args:
            key: any string, a service's name.
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
        """When `due()` will next have something (microseconds); None while nothing is pending: nobody need wake up."""
        return min((*(burst.ends for burst in self._bursts.values()), *self._again.values()), default=None)

    def forget(self, key: str) -> None:
        """`key` is gone or was just looked at: what is pending for it, if anything, is dropped."""
        self._bursts.pop(key, None)
        self._again.pop(key, None)
