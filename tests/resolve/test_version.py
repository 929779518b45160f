# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions are ordered as UAPI.10 says; `test_oracle.py` holds the same function against systemd itself.

Here the keys are held against the specification's steps, written as they stand there.
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.resolve import version


def test_the_specifications_order() -> None:
    ascending = ["~1", "", "ab", "abb", "abc", "0001", "002", "12", "122", "122.9", "123~rc1", "123", "123-a"]
    ascending += ["123-a.1", "123-3", "123-3.1", "123^patched", "123.a.1", "123.1", "123a", "124"]
    shuffled = ascending.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=version.key) == ascending


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.9", "1.10"),
        ("1.3", "1.4"),
        ("1.4~rc1", "1.4"),
        ("1.4", "1.4-1"),
        ("1.4A", "1.4a"),
        ("a", "1"),
        ("1", "1" * 5000),
    ],
)
def test_older_before_newer(older: str, newer: str) -> None:
    assert version.compare(older, newer) == -1
    assert version.compare(newer, older) == 1


@pytest.mark.parametrize(
    ("a", "b"), [("1", "01"), ("1_.0", "1.0"), ("1", "1+"), ("é1", "1"), ("\udcff1", "1")]
)
def test_equal_though_written_differently(a: str, b: str) -> None:
    assert version.compare(a, b) == 0


@given(st.text("~-^.aB019_é"), st.text("~-^.aB019_é"))
def test_exchanging_the_sides_exchanges_the_answer(a: str, b: str) -> None:
    assert version.compare(a, b) == -version.compare(b, a)
    assert version.compare(a, a) == 0


@given(st.text("~-^.aB019_é"), st.text("~-^.aB019_é"), st.text("~-^.aB019_é"))
def test_keys_are_ordered_as_the_specifications_steps_say(begin: str, a: str, b: str) -> None:
    for one, other in ((a, b), (begin + a, begin + b)):
        assert version.compare(one, other) == by_the_steps(one, other)


def test_keys_of_all_short_versions_are_ordered_as_the_steps_say() -> None:
    texts = ["".join(chars) for length in range(4) for chars in itertools.product("~-^.a0_", repeat=length)]
    wrong = [
        (one, other)
        for one, other in itertools.combinations(texts, 2)
        if version.compare(one, other) != by_the_steps(one, other)
    ]
    assert wrong == []


def by_the_steps(a: str, b: str) -> int:
    """`compare()` as the specification tells it, character by character."""
    while True:
        a, b = a.lstrip("_é"), b.lstrip("_é")
        if "~" in (a[:1], b[:1]):
            if a[:1] != b[:1]:
                return -1 if a[:1] == "~" else 1
            a, b = a[1:], b[1:]
        if not a or not b:
            return bool(a) - bool(b)
        for separator in "-^.":
            if separator in (a[:1], b[:1]):
                if a[:1] != b[:1]:
                    return -1 if a[:1] == separator else 1
                a, b = a[1:], b[1:]
        digits = (a[:1] + b[:1]).strip("aB_é~-^.") != ""
        charset = "0123456789" if digits else "aB"
        part, other = (text[: len(text) - len(text.lstrip(charset))] for text in (a, b))
        a, b = a[len(part) :], b[len(other) :]
        if digits and part and other:
            part, other = (text.lstrip("0").rjust(100, "0") for text in (part, other))
        if part != other:
            return 1 if part > other else -1
