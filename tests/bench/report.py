# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures, each beside its floor, and how they are shown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from .result import Figure, Result, Sample


class Failed(Exception):
    """A measurement did not come about: one line that says why."""


def figure(key: str, what: str, unit: str, sides: Sequence[Iterable[float]], aim: str = "") -> Figure:
    """A figure from what was measured; see `Figure`.

    Args:
        sides: with confext-watcher, and the floor if there is one, and what Python needs.
    """
    ours, floor, needed, *_ = (*(_sample(values) for values in sides), None, None)
    assert ours is not None
    return Figure(key, what, unit, ours, floor, aim, needed)


def _sample(values: Iterable[float]) -> Sample:
    ordered = sorted(values)
    # The value that 99 of 100 do not exceed: with fewer than 100 the largest one.
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return Sample(len(ordered), statistics.median(ordered), p99)


def show(result: Result) -> None:
    """Print a result as a table; in the column PYTHON is the least that Python with trio needs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("FIGURE", overflow="fold")
    for column in ("COUNT", "MEDIAN", "P99", "FLOOR", "P99", "RATIO", "PYTHON", "RATIO"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("AIM", overflow="fold")
    for one in result.figures.values():
        single = one.ours.count == 1
        table.add_row(
            one.what,
            str(one.ours.count),
            number(one.ours.median, one.unit),
            "" if single else number(one.ours.p99, one.unit),
            number(one.floor.median, one.unit) if one.floor else "",
            number(one.floor.p99, one.unit) if one.floor and not single else "",
            f"{one.ratio:.2f}" if one.ratio is not None else "",
            number(one.needed.median, one.unit) if one.needed else "",
            f"{one.of_needed:.2f}" if one.of_needed is not None else "",
            one.aim,
        )
    out = console()
    out.print(f"{result}, load: {' to '.join(f'{load:.1f}' for load in result.load)}", style="dim")
    out.print(", ".join(f"{key}: {value}" for key, value in result.machine.items()), style="dim")
    out.print(table)


def console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)


def number(value: float, unit: str) -> str:
    """For people, "3.14 ms"."""
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}".rstrip()
