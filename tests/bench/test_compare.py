# SPDX-License-Identifier: LGPL-2.1-or-later
"""Before and after, by the floor of each run: what became slower by more than a tenth is marked."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare
from bench.report import figure
from bench.result import Figure, Result
from support import CHECKOUT


def run(*figures: Figure, kernel: str = "6.12", quick: bool = False) -> Result:
    return Result(
        date="2026-11-29T11:41:00+00:00",
        commit="0" * 40,
        dirty=False,
        quick=quick,
        parts={"drops": tuple(one.key for one in figures)},
        machine={"kernel": kernel, "python": "3.11.7"},
        load=(0.0, 0.0),
        figures={one.key: one for one in figures},
    )


def drop(ours: float, floor: float | None = 1.0) -> Figure:
    return figure("drop", "a drop", "ms", ([ours],) if floor is None else ([ours], [floor]))


@pytest.mark.parametrize(
    ("before", "after", "mark"),
    [
        (drop(10), drop(10.9), ""),
        (drop(10), drop(11.1), "SLOWER"),
        (drop(10), drop(9.2), ""),
        (drop(10), drop(9), "faster"),
        # A machine half as fast: nothing has changed.
        (drop(10, 1), drop(20, 2), ""),
        (drop(10, 2), drop(10, 1), "SLOWER"),
        (drop(10, None), drop(12, None), "SLOWER"),
        # Lost drops and wake-ups, where the floor is nothing.
        (drop(0, 0), drop(0, 0), ""),
        (drop(0, 0), drop(1, 0), "SLOWER"),
        (drop(1, 0), drop(0, 0), "faster"),
        # By itself where one of them has no ratio.
        (drop(0, 0), drop(0, 5), ""),
    ],
)
def test_more_than_a_tenth_is_marked(before: Figure, after: Figure, mark: str) -> None:
    (change,) = compare.changes(run(before), run(after))
    assert change.cells()[-1] == mark
    assert change.slower == (mark == "SLOWER")


def test_a_count_is_compared_by_itself() -> None:
    """Twice as many drops lost are no better where the bare loop lost three times as many."""
    before, after = (figure("lost", "lost", "", ([ours], [bare])) for ours, bare in ((10, 1), (20, 3)))
    (change,) = compare.changes(run(before), run(after))
    assert change.cells() == ("10", "20", "+100%", "SLOWER")


def test_ratios_are_shown_and_by_how_much_they_changed() -> None:
    (change,) = compare.changes(run(drop(4, 2)), run(drop(5, 2)))
    assert change.cells() == ("2 x", "2.50 x", "+25%", "SLOWER")
    (change,) = compare.changes(run(drop(4, None)), run(drop(5, None)))
    assert change.cells() == ("4 ms", "5 ms", "+25%", "SLOWER")
    (change,) = compare.changes(run(drop(0, 0)), run(drop(5, 0)))
    assert change.cells() == ("0 ms", "5 ms", "", "SLOWER")


def test_what_is_slower_at_first_is_measured_again_and_only_what_stays_so_is_marked() -> None:
    def others(*ours: float) -> list[Figure]:
        return [figure(f"{n}", f"{n}", "ms", ([value], [1])) for n, value in enumerate(ours)]

    old, first, again = run(*others(10, 10, 10)), run(*others(12, 13, 10)), run(*others(10.5, 12, 20))
    found = compare.changes(old, compare.confirmed(old, first, again))
    # What was not slower is not made so by the second run.
    assert [(change.after, change.slower) for change in found] == [(10.5, False), (12, True), (10, False)]


def test_only_the_parts_with_something_slower_are_measured_again() -> None:
    other = figure("other", "another", "ms", ([1],))
    parts: dict[str, tuple[str, ...]] = {"drops": ("drop",), "idle": ("other",)}
    first = dataclasses.replace(run(drop(12), other), parts=parts)
    assert compare.suspects(run(drop(10), other), first) == ["drops"]
    assert compare.suspects(first, first) == []


def test_what_differs_besides_is_said() -> None:
    other = figure("other", "another", "ms", ([1],))
    old = run(drop(1), other)
    new = run(drop(1), kernel="6.18", quick=True)
    assert list(compare.remarks(old, new)) == [
        "The machine differs: kernel was 6.12, is 6.18.",
        "Only the new run was a quick one.",
        "Measured only before: other.",
    ]
    assert list(compare.remarks(old, old)) == []


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT / "tests", check=False, capture_output=True, text=True)


def test_two_results_are_compared_and_the_exit_status_says_whether_something_is_slower(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(run(drop(4, 2)).to_json())
    new.write_text(run(drop(5, 2), kernel="6.18").to_json())
    compared = bench("--compare", old, "--new", new)
    assert compared.returncode == 1, compared.stderr
    assert "The machine differs: kernel was 6.12, is 6.18." in compared.stdout
    assert "a drop" in compared.stdout and "+25%" in compared.stdout and "SLOWER" in compared.stdout
    assert bench("--compare", new, "--new", old).returncode == 0


def test_a_file_that_is_no_result_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    refused = bench("--compare", tmp_path / "old.json")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"bench: {tmp_path}/old.json: no result of `make bench`: ")
    assert refused.stderr.count("\n") == 1 and refused.stdout == ""


def test_results_that_share_no_figure_are_not_compared(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(run(drop(1)).to_json())
    new.write_text(run().to_json())
    refused = bench("--compare", old, "--new", new)
    assert refused.returncode == 2
    assert refused.stderr == "bench: these two results have no figure in common\n"
