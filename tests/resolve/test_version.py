# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions are ordered as UAPI.10 says; `test_oracle.py` holds the same function against systemd itself."""

from __future__ import annotations

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
