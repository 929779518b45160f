# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks that services share: a hundred instances of a template have one directory, and one look finds the same for all.

A look is as good for a round as one of its own if it began after the last change that the round is for: it has seen
that; of what changes later the watcher is told, and another round looks again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from watcher.managers.base import starts_by_systemd
from watcher.rounds.desired import Given

T = TypeVar("T")

_KEPT_MAX = 64


def now() -> float:
    """The time of looks, seconds."""
    return time.monotonic()


def common_key(root: str | None, given: Given, to_mend: frozenset[str] = frozenset()) -> Hashable | None:
    """All that what a service could have depends on, besides the disk; None: on what is kept out of that one alone.

    Args:
        to_mend: digests of damaged copies that it may go back to: a look has them made anew.
    """
    state, record = given.state, given.state.accepted
    if given.elsewhere or state.quarantine or state.pin is not None:
        return None
    accepted = (record.stack, record.entries, tuple(sorted(record.mounted.items())))
    by_systemd = starts_by_systemd(given.slots)
    return (
        root,
        given.declared,
        accepted,
        by_systemd,
        given.made_for and given.made_for.terms,
        given.policies,
        given.trust,
        given.limits,
        given.thorough,
        to_mend,
    )


class Looks:
    """What the last looks have found. Threads may share it: none waits for the look of another, which may hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By key: when the look began, and what it found. What was used last is last.
        self._found: dict[Hashable, tuple[float, Any]] = {}

    def kept(self, key: Hashable | None, since: float) -> tuple[Any] | None:
        """What a look has found that began after `since`; None: there is none."""
        with self._lock:
            one = self._found.get(key)
            if one is None or one[0] < since:
                return None
            self._found[key] = self._found.pop(key)
            return (one[1],)

    def shared(
        self,
        key: Hashable | None,
        since: float,
        look: Callable[[], T],
        is_common: Callable[[T], bool] = lambda found: True,
    ) -> T:
        """What a look finds: one that began after `since`, or else a new one. Blocks as `look` does.

        Args:
            key: all that the look depends on, besides the disk; None: on what concerns one service alone.
            since: `now()`.
            is_common: whether what was found is the same for all with that key.
        """
        kept = self.kept(key, since)
        if kept is not None:
            shared: T = kept[0]
            return shared
        begun = now()
        found = look()
        if key is not None and is_common(found):
            with self._lock:
                self._found.pop(key, None)
                self._found[key] = begun, found
                if len(self._found) > _KEPT_MAX:
                    del self._found[next(iter(self._found))]
        return found
