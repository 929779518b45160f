# SPDX-License-Identifier: LGPL-2.1-or-later
"""Outcomes reach the history, all of them, in few commits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from watcher.model import Event, Later, Outcome, Refused
from watcher.records.ledger import Ledger, Reader
from watcher.records.together import alone
from watcher.rounds.outcomes import Outcomes


class Counting(Ledger):
    """Counts its commits."""

    commits = 0

    def append(self, *events: Event) -> None:
        self.commits += 1
        super().append(*events)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Counting]:
    ledger = Counting(str(tmp_path))
    yield ledger
    ledger.close()


def event(number: int) -> Event:
    return Event(f"web{number}.service", Outcome.APPLIED, f"outcome {number}", when=number + 1)


async def test_outcomes_of_many_services_at_once_share_a_commit(ledger: Counting, tmp_path: Path) -> None:
    told: list[Event] = []
    record = Outcomes(ledger, lambda: None, told.append)
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(record.outcome, event(number))
    history = Reader(str(tmp_path)).history(limit=100)
    assert {one.message for one in history} == {f"outcome {number}" for number in range(50)}
    assert len(told) == 50
    assert ledger.commits <= 2  # the first one may have been alone


async def test_an_outcome_is_written_also_when_we_are_told_to_end(ledger: Counting, tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await Outcomes(ledger, lambda: None).outcome(event(1))
    assert [one.message for one in Reader(str(tmp_path)).history()] == ["outcome 1"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(12, "Cannot allocate memory", "overlay"),
            ", it is tried again: overlay: Cannot allocate memory",
        ),
        (
            FileNotFoundError(2, "no os-release in it", "/srv/a\nb"),
            r", it is tried again: /srv/a\nb: no os-release in it",
        ),
        (
            Refused("/etc in the service's root is a symbolic link"),
            ": /etc in the service's root is a symbolic link",
        ),
    ],
)
async def test_what_is_in_the_way_of_a_stack_is_said_in_words(
    ledger: Counting, error: Exception, sentence: str
) -> None:
    told: list[Event] = []
    record = Outcomes(ledger, lambda: None, told.append)
    for _ in range(2):
        await record.not_placed("web.service", error)
    assert [one.message for one in told] == [f"web.service: its stack could not be put in place{sentence}"]


async def test_what_is_told_outlasts_a_power_cut(ledger: Counting) -> None:
    done: list[str] = []
    append = ledger.append
    ledger.append = lambda *events: (done.append("recorded"), append(*events))[1]  # type: ignore[method-assign]
    record = Outcomes(ledger, lambda: done.append("settled"), lambda event: done.append("told"))
    await record.outcome(event(1))
    assert done == ["settled", "recorded", "told"]
    done.clear()
    alone(record.recording(event(2)))
    await record.record_found(event(2).service)
    assert done == ["settled", "recorded", "told"]


async def test_a_disk_that_fails_is_said_and_the_outcome_is_told_all_the_same(
    ledger: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    def settle() -> None:
        raise Later("what was accepted may not be on the disk yet: Input/output error")

    told: list[Event] = []
    await Outcomes(ledger, settle, told.append).outcome(event(1))
    assert told == [event(1)] and ledger.commits == 1
    said = "a power cut may undo what is said to be done: what was accepted may not be on the disk yet: Input/output"
    assert said in "".join(capsys.readouterr())
