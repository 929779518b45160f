# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a burst of changes is over: the rule alone, with a clock made of numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from watcher.watch.settle import Settle

QUIET = 100
LONGEST = 1000


def test_a_burst_is_over_after_the_quiet_time() -> None:
    settle = Settle()
    settle.touch("web", 5, QUIET, LONGEST)
    assert settle.deadline() == 105
    assert settle.due(104) == frozenset()
    assert settle.due(105) == {"web"}


def test_each_change_starts_the_quiet_time_anew() -> None:
    settle = Settle()
    for now in (0, 60, 120):
        settle.touch("web", now, QUIET, LONGEST)
    assert settle.due(219) == frozenset()
    assert settle.due(220) == {"web"}


def test_a_key_is_due_once() -> None:
    settle = Settle()
    settle.touch("web", 0, QUIET, LONGEST)
    settle.due(QUIET)
    assert settle.due(10 * LONGEST) == frozenset()


def test_a_directory_in_which_something_always_happens_does_not_starve() -> None:
    settle = Settle()
    rounds = 0
    for now in range(0, 5001, 50):
        settle.touch("web", now, QUIET, LONGEST)
        rounds += len(settle.due(now))
    assert rounds == 4


def test_the_longest_time_counts_from_the_first_change_of_each_burst() -> None:
    settle = Settle()
    settle.touch("web", 0, QUIET, LONGEST)
    settle.due(QUIET)
    settle.touch("web", 990, QUIET, LONGEST)
    assert settle.deadline() == 1090


def test_without_a_quiet_time_a_change_is_due_at_once() -> None:
    settle = Settle()
    settle.touch("web", 7, 0, LONGEST)
    assert settle.deadline() == 7
    assert settle.due(7) == {"web"}


def test_a_quiet_time_above_the_longest_is_cut() -> None:
    settle = Settle()
    settle.touch("web", 0, 5 * LONGEST, LONGEST)
    assert settle.deadline() == LONGEST


def test_nobody_need_wake_up_while_nothing_is_pending() -> None:
    settle = Settle()
    assert settle.deadline() is None
    settle.touch("web", 0, QUIET, LONGEST)
    settle.forget("web")
    assert settle.deadline() is None
    assert settle.due(LONGEST) == frozenset()


def test_services_settle_each_for_itself() -> None:
    settle = Settle()
    settle.touch("fast", 0, 0, LONGEST)
    settle.touch("slow", 0, 500, LONGEST)
    assert settle.due(0) == {"fast"}
    assert settle.deadline() == 500


def test_what_was_never_touched_may_be_forgotten() -> None:
    Settle().forget("web")


@given(
    gaps=st.lists(st.integers(0, 300), min_size=1, max_size=50),
    quiet=st.integers(0, 200),
    longest=st.integers(0, 1000),
)
def test_every_change_is_followed_by_a_round_within_the_longest_time(
    gaps: list[int], quiet: int, longest: int
) -> None:
    settle = Settle()
    now, unseen = 0, []
    for gap in gaps:
        while (deadline := settle.deadline()) is not None and deadline <= now + gap:
            assert settle.due(deadline) == {"web"}
            assert deadline - unseen[0] <= longest
            assert deadline - unseen[-1] <= quiet
            unseen = []
        now += gap
        settle.touch("web", now, quiet, longest)
        unseen.append(now)
    assert settle.deadline() is not None


def test_a_key_is_due_again_when_it_said_so() -> None:
    settle = Settle()
    settle.again("web", 30 * LONGEST)
    assert settle.deadline() == 30 * LONGEST
    assert settle.due(30 * LONGEST - 1) == frozenset()
    assert settle.due(30 * LONGEST) == {"web"}
    assert settle.deadline() is None


def test_what_has_to_wait_does_not_keep_a_change_waiting() -> None:
    settle = Settle()
    settle.touch("web", 0, QUIET, LONGEST)
    settle.again("web", 30 * LONGEST)
    assert settle.due(QUIET) == {"web"}
    settle.again("web", 30 * LONGEST)
    for now in range(2 * LONGEST, 4 * LONGEST, 50):
        settle.touch("web", now, QUIET, LONGEST)
        if settle.due(now):
            break
    assert now == 3 * LONGEST
