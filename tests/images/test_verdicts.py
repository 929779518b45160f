# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verdicts are remembered, both kinds, and given to everybody who waits for them."""

from __future__ import annotations

import threading

import pytest

from support.images import FORMATS
from watcher.images import verdicts
from watcher.images.verdicts import Verdicts
from watcher.model import Copy, Incomplete, Kind

COPY = Copy("0" * 64, "/store/0", 1, Kind.IMAGE, FORMATS["squashfs"])


def test_what_was_remembered_is_recalled() -> None:
    verdicts = Verdicts()
    assert verdicts.recall((1,)) is None
    verdicts.remember((1,), COPY)
    assert verdicts.recall((1,)) is COPY
    verdicts.clear()
    assert verdicts.recall((1,)) is None


def test_a_refusal_is_raised_anew_with_its_words() -> None:
    verdicts = Verdicts()
    first = Incomplete("5 of 10 bytes")
    verdicts.remember((1,), first)
    with pytest.raises(Incomplete, match="5 of 10 bytes") as again:
        verdicts.recall((1,))
    assert again.value is not first  # each has a traceback of its own


def test_the_oldest_is_forgotten_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_MAX", 3)
    known = Verdicts()
    for key in (1, 2, 3, 2):  # 2 is the newest now, and nothing had to go
        known.remember((key,), COPY)
    assert [key for key in (1, 2, 3) if known.recall((key,))] == [1, 2, 3]
    known.remember((4,), COPY)
    assert [key for key in (1, 2, 3, 4) if known.recall((key,))] == [2, 3, 4]


def test_one_turn_at_a_time_for_a_key_and_none_for_others() -> None:
    verdicts = Verdicts()
    done: list[str] = []
    waiting = threading.Event()

    def wait_for_turn() -> None:
        waiting.set()
        with verdicts.turn((1,)):
            done.append("second")

    thread = threading.Thread(target=wait_for_turn)
    with verdicts.turn((1,)):
        thread.start()
        waiting.wait()
        with verdicts.turn((2,)):
            done.append("other")
        done.append("first")
    thread.join()
    assert done == ["other", "first", "second"]
    assert not verdicts._turns
