# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a directory tree is complete. An image says itself how long it is, and a tree has no end of its own.

It is complete when no node of it has changed for a while, and no file in it is open for writing: the leases find that
out while it is copied (tree.py). Its release file says nothing, since it may have come first. Three things make the end
exact, each of them if nothing has changed since:

- The tree was renamed to where it is.
- A link that leads to it was made or replaced.
- The marker was written. If the tree before had one, nothing else will do: whoever uploads it uses markers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from watcher.images.tree import Signature
from watcher.model import Incomplete, Settling
from watcher.resolve.content import MARKER
from watcher.watch.lease import coarse_now_ns

_USEC = 1_000_000
_KEPT_MAX = 10_000
_TICK_NS = 20_000_000
"""Timestamps are as coarse as the timer's tick: no tick is longer."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one service.

    Attributes:
        quiet_usec: `SettleTreeSec=`; 0: what is there is complete.
        longest_usec: `SettleTreeMaxSec=`, after which a tree that changes all the time is taken as it is.
        marked: whether the tree before, of the entry of a path, had the marker.
    """

    quiet_usec: int = 0
    longest_usec: int = 0
    marked: Callable[[str], bool] = lambda path: False


@dataclass(frozen=True, slots=True)
class Seen:
    """A tree.

    Attributes:
        path: as the look found it.
        root: `fstat` of its root.
        real_path: of its root, without links.
        linked_ns: ctime of the youngest link on the way to it; 0: there is none.
    """

    path: str
    root: os.stat_result
    real_path: str
    linked_ns: int
    signature: Signature


class Complete:
    """Judges trees, and remembers since when each has been changing. Threads may share it.

    Args:
        moved_in_ns: when a directory was renamed to that path, nanoseconds since the epoch; 0: not known.
    """

    def __init__(self, moved_in_ns: Callable[[str], int] = lambda path: 0) -> None:
        self._moved_in_ns = moved_in_ns
        self._changing: dict[tuple[int, int], float] = {}

    def require(self, tree: Seen, rule: Rule) -> None:
        """Return if a tree is complete.

        Raises:
            Settling: it may still change, and when to look again.
            Incomplete: its marker is missing.
        """
        key = tree.root.st_dev, tree.root.st_ino
        if not tree.signature.marked_ns and rule.marked(tree.path):
            self._changing.pop(key, None)
            raise Incomplete(f"incomplete: the tree before it has a {MARKER}, and this one has none yet")
        left = seconds_left(tree, rule, self._moved_in_ns(tree.real_path), coarse_now_ns())
        if left > 0:
            since = self._changing.setdefault(key, time.monotonic())
            left = min(left, since + rule.longest_usec / _USEC - time.monotonic())
        if left > 0:
            while len(self._changing) > _KEPT_MAX:
                self._changing.pop(next(iter(self._changing)))
            raise Settling(
                f"changed a moment ago, and a directory is complete when nothing in it has changed for"
                f" {rule.quiet_usec / _USEC:g} s (SettleTreeSec=)",
                left,
            )
        self._changing.pop(key, None)


def seconds_left(tree: Seen, rule: Rule, moved_in_ns: int, now_ns: int) -> float:
    """How long nothing may change until a tree counts as complete; 0 or less: it does. Pure."""
    changed_ns, quiet_ns = tree.signature.changed_ns, rule.quiet_usec * 1000
    # Strictly: what changed in the same tick of the clock may have come later.
    if tree.signature.marked_ns > changed_ns or tree.linked_ns > changed_ns:
        return 0.0
    # Of a rename both the kernel and the file system tell, where they do.
    if moved_in_ns >= changed_ns and tree.root.st_ctime_ns >= changed_ns:
        # Scripts copy and rename within one tick. So it is enough that nothing follows in the next ones.
        same_tick = tree.root.st_ctime_ns == changed_ns
        quiet_ns = min(quiet_ns, _TICK_NS) if same_tick else 0
    return (changed_ns + quiet_ns - now_ns) / 1e9 if quiet_ns else 0.0
