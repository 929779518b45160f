# SPDX-License-Identifier: LGPL-2.1-or-later
"""Version comparison by UAPI.10, the Version Format Specification.

systemd picks, boots and updates by this order, so ours must be the same down to its corners. The tests compare it with
`systemd-analyze compare-versions`, and with the steps of the specification as they are written.

The specification compares two versions step by step. Up to the first difference both are at the same step, so what one
version has there can be told without the other: each version has a key, a directory of a thousand is sorted by tuples.
A key for each part would not do ("~~" is newer than "~"): which step it is counts, too.
"""

from __future__ import annotations

import re

_STEP = re.compile(r"[^A-Za-z0-9~^.-]*(~?)(-?)(\^?)(\.?)([0-9]+|[A-Za-z]*)")
"""One turn of the specification's loop; it takes at least one character, if there is any."""

# What a step begins with, from the oldest to the newest: a pre-release is older than nothing at all, and anything else
# that still follows makes a version newer. Behind a "~" too, the end is older than what follows.
_PRE_RELEASE_END, _PRE_RELEASE, _END, _MORE = range(4)


def key(version: str) -> tuple[object, ...]:
    """For `sorted(versions, key=key)`, oldest first; versions that are as old as one another have the same key."""
    found: list[object] = []
    for step in _STEP.finditer(version):
        tilde, dash, caret, dot, part = step.groups()
        if step.end(1) == len(version):
            found.append(_PRE_RELEASE_END if tilde else _END)
            break
        # A part with a separator before it is older than one without, and "-" is the first to be asked for. Digits are
        # newer than letters, or than none of both; they may be too many for an int.
        digits = part.isdecimal()
        found += (_PRE_RELEASE if tilde else _MORE, not dash, not caret, not dot, digits)
        found += (len(part := part.lstrip("0")), part) if digits else (part,)
    return tuple(found)


def compare(a: str, b: str) -> int:
    """-1, 0 or 1 as `a` is older than, as old as, or newer than `b` (UAPI.10, "Version Comparison")."""
    key_a, key_b = key(a), key(b)
    return (key_a > key_b) - (key_a < key_b)
