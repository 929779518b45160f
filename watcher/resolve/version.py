# SPDX-License-Identifier: LGPL-2.1-or-later
"""Version comparison by UAPI.10, the Version Format Specification.

systemd picks, boots and updates by this order, so ours must be the same down to its corners. The tests compare it with
`systemd-analyze compare-versions`. A tuple of tokens per version would be the obvious key. But the steps of the
specification are not quite a token order ("~~" is newer than "~"), so we follow them as they are written.
"""

from __future__ import annotations

import functools
from string import ascii_letters, digits

_VALID = frozenset(ascii_letters + digits + "~-^.")
_DIGITS = frozenset(digits)
_LETTERS = frozenset(ascii_letters)


def compare(a: str, b: str) -> int:
    """-1, 0 or 1 as `a` is older than, as old as, or newer than `b` (UAPI.10, "Version Comparison")."""
    i = j = 0
    while True:
        i, j = _skip_invalid(a, i), _skip_invalid(b, j)
        if "~" in (at_a := a[i : i + 1], at_b := b[j : j + 1]):
            if at_a != at_b:
                return -1 if at_a == "~" else 1
            i, j = i + 1, j + 1
        # A pre-release ("~") is older than nothing at all; anything else that still follows makes a version newer.
        if i == len(a) or j == len(b):
            return (i < len(a)) - (j < len(b))
        for separator in "-^.":
            if separator in (at_a := a[i : i + 1], at_b := b[j : j + 1]):
                if at_a != at_b:
                    return -1 if at_a == separator else 1
                i, j = i + 1, j + 1
        numeric = not _DIGITS.isdisjoint(a[i : i + 1] + b[j : j + 1])
        charset = _DIGITS if numeric else _LETTERS
        end_a, end_b = _span(a, i, charset), _span(b, j, charset)
        order = (_numbers if numeric else _order)(a[i:end_a], b[j:end_b])
        if order:
            return order
        i, j = end_a, end_b


key = functools.cmp_to_key(compare)
"""For `sorted(versions, key=key)`: oldest first."""


def _skip_invalid(text: str, start: int) -> int:
    while start < len(text) and text[start] not in _VALID:
        start += 1
    return start


def _span(text: str, start: int, charset: frozenset[str]) -> int:
    while start < len(text) and text[start] in charset:
        start += 1
    return start


def _numbers(a: str, b: str) -> int:
    """Digits against digits, of any length; none at all is older than "0"."""
    if not a or not b:
        return bool(a) - bool(b)
    a, b = a.lstrip("0"), b.lstrip("0")
    return _order(len(a), len(b)) or _order(a, b)


def _order(a: str | int, b: str | int) -> int:
    """Letters go by ASCII: capitals are older, and a prefix is older than what it begins."""
    return (a > b) - (a < b)  # type: ignore[operator]
