# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures, and how they are shown: each beside its floor, as a table or as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured values, all in the same unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """The value that 99 of 100 do not exceed: with fewer than 100 the largest one."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report.

    Attributes:
        what: what was measured.
        unit: of all values.
        ours: with confext-watcher.
        floor: the same work by bare system calls, in the same run; None where there is no such thing.
        aim: what the median (and the 99th percentile) should not exceed, in words.
    """

    what: str
    unit: str
    ours: Sample
    floor: Sample | None = None
    aim: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the floor."""
        return self.ours.median / self.floor.median if self.floor and self.floor.median else None


def figure(
    what: str, unit: str, ours: Iterable[float], floor: Iterable[float] | None = None, aim: str = ""
) -> Figure:
    return Figure(what, unit, Sample(tuple(ours)), None if floor is None else Sample(tuple(floor)), aim)


def machine() -> dict[str, object]:
    """What the figures were measured on, and how busy that was."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def as_json(figures: Sequence[Figure]) -> str:
    rows = []
    for one in figures:
        row: dict[str, object] = {
            "what": one.what,
            "unit": one.unit,
            "count": len(one.ours.values),
            "median": one.ours.median,
            "p99": one.ours.p99,
            "aim": one.aim,
        }
        if one.floor is not None:
            row |= {"floor_median": one.floor.median, "floor_p99": one.floor.p99, "ratio": one.ratio}
        rows.append(row)
    return json.dumps({"machine": machine(), "figures": rows}, indent=2)


def show(figures: Sequence[Figure]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("FIGURE", overflow="fold")
    for column in ("COUNT", "MEDIAN", "P99", "FLOOR", "P99", "RATIO"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("AIM", overflow="fold")
    for one in figures:
        single = len(one.ours.values) == 1
        table.add_row(
            one.what,
            str(len(one.ours.values)),
            _number(one.ours.median, one.unit),
            "" if single else _number(one.ours.p99, one.unit),
            _number(one.floor.median, one.unit) if one.floor else "",
            _number(one.floor.p99, one.unit) if one.floor and not single else "",
            f"{one.ratio:.2f}" if one.ratio is not None else "",
            one.aim,
        )
    terminal = sys.stdout.isatty()
    console = Console(highlight=False) if terminal else Console(highlight=False, width=200)
    console.print(", ".join(f"{key}: {value}" for key, value in machine().items()), style="dim")
    console.print(table)


def _number(value: float, unit: str) -> str:
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}".rstrip()
