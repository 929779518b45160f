# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which stack a service should have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.model import Busy, Candidate, Copy, Entry, KeptOut, Kind, Layer, Look, Picks, Refused, Stack
from watcher.rounds.choose import choose, describe

ENTRY = Entry("web.raw", "/d/web.raw.v", Kind.IMAGE)
FATES = st.sampled_from(["good", "refused", "busy", "kept out"])


def candidate(version: int) -> Candidate:
    return Candidate(f"/d/web.raw.v/web_{version}.raw", f"web_{version}.raw", "web", str(version), Kind.IMAGE)


def layer(version: int) -> Layer:
    return Layer("web.raw", "web", str(version), f"{version:064}", Kind.IMAGE, candidate(version).path)


def chosen(fates: dict[int, str], accepted: int | None, *, unknown: bool = False) -> str | None:
    """The version that is picked, of files by version with what admission says to them.

    Args:
        unknown: another file cannot be looked at.
    """

    def admit(one: Candidate) -> Copy:
        fate = fates[int(one.version)]
        if fate == "good":
            return Copy(f"{int(one.version):064}", "/store/x", 1, Kind.IMAGE)
        raise {"refused": Refused, "busy": Busy, "kept out": KeptOut}[fate](fate)

    newest_first = tuple(candidate(version) for version in sorted(fates, reverse=True))
    before = Stack() if accepted is None else Stack((layer(accepted),))
    layers = choose(Look((Picks(ENTRY, newest_first, unknown),), ()), admit, before).stack.layers
    return layers[0].version if layers else None


@given(st.dictionaries(st.integers(0, 9), FATES, max_size=5), st.none() | st.integers(0, 9))
def test_the_newest_that_is_admitted_or_what_was_accepted(
    fates: dict[int, str], accepted: int | None
) -> None:
    good = [version for version, fate in fates.items() if fate == "good"]
    got = chosen(fates, accepted)
    if got is not None:
        assert int(got) == accepted or fates[int(got)] == "good"
    if accepted in fates:  # its file is there: nothing older ever takes its place
        assert got is not None and int(got) >= accepted
    if good and accepted is None:
        assert got == str(max(good))
    if not fates:
        assert got is None


def test_a_bad_image_that_came_instead_of_the_accepted_one_does_not_take_it_away() -> None:
    assert chosen({4: "kept out"}, accepted=3) == "3"
    assert chosen({4: "kept out", 2: "good"}, accepted=3) == "3"
    assert chosen({4: "refused", 2: "good"}, accepted=3) == "2"  # not for its sake: it was removed


@given(st.dictionaries(st.integers(0, 9), FATES, max_size=5), st.none() | st.integers(0, 9))
def test_one_that_cannot_be_looked_at_takes_nothing_away_and_holds_nothing_up(
    fates: dict[int, str], accepted: int | None
) -> None:
    got = chosen(fates, accepted, unknown=True)
    if accepted is None or accepted in fates:
        assert got == chosen(fates, accepted)
    else:  # it may be that one
        assert got == str(accepted)


def test_a_directory_that_cannot_be_read_changes_nothing() -> None:
    accepted = Stack((layer(3),))
    assert choose(Look((), (), unknown=True), lambda one: pytest.fail(one.path), accepted).stack == accepted


def test_the_change_in_words() -> None:
    one, two = Stack((layer(1),)), Stack((layer(2),))
    assert [describe(one, two), describe(Stack(), one), describe(one, Stack())] == [
        "web 1 -> 2",
        "web 1 added",
        "web 1 removed",
    ]
