# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two results beside each other: a figure is compared by its ratio to its floor, which was measured in the same run.

So a machine that was busier, or is another one, changes both sides of a ratio. A figure without a floor, and a count
(wake-ups, lost drops), is compared by itself.

Both sides do not change evenly, though. So what seems slower is measured once more, as `make test` runs again what
failed: it is slower if it is so twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from .report import Failed, console, number
from .result import Figure, Result

MORE = 0.1
"""By how much a figure must have changed to be marked: a tenth."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in both results.

    Attributes:
        before, after: times the floor, or in the figure's unit where there is none.
        of_floor: which of these.
    """

    figure: Figure
    before: float
    after: float
    of_floor: bool

    @property
    def slower(self) -> bool:
        return self.after > self.before * (1 + MORE)

    @property
    def faster(self) -> bool:
        return self.before > self.after * (1 + MORE)

    def cells(self) -> tuple[str, str, str, str]:
        """For the table."""
        unit = "x" if self.of_floor else self.figure.unit
        change = f"{self.after / self.before - 1:+.0%}" if self.before else ""
        mark = "SLOWER" if self.slower else "faster" if self.faster else ""
        return f"{number(self.before, unit)}", f"{number(self.after, unit)}", change, mark


def changes(old: Result, new: Result) -> list[Change]:
    """The figures that both have, in the order of the new one."""
    found = []
    for key, after in new.figures.items():
        before = old.figures.get(key)
        if before is None:
            continue
        if before.ratio is not None and after.ratio is not None:
            found.append(Change(after, before.ratio, after.ratio, of_floor=True))
        else:
            found.append(Change(after, before.ours.median, after.ours.median, of_floor=False))
    return found


def suspects(old: Result, new: Result) -> list[str]:
    """The parts of the new run with figures that seem slower."""
    slower = {change.figure.key for change in changes(old, new) if change.slower}
    return [part for part, keys in new.parts.items() if slower.intersection(keys)]


def confirmed(old: Result, first: Result, again: Result) -> Result:
    """The first run, with what was slower in it as it was in the better one of both runs."""
    second = {change.figure.key: change for change in changes(old, again)}
    better = {
        change.figure.key: second[change.figure.key].figure
        for change in changes(old, first)
        if change.slower
        and change.figure.key in second
        and second[change.figure.key].of_floor == change.of_floor
        and second[change.figure.key].after < change.after
    }
    return dataclasses.replace(first, figures=first.figures | better)


def remarks(old: Result, new: Result) -> Iterator[str]:
    """What a reader has to know besides the figures, one line each."""
    for key in sorted({*old.machine, *new.machine}):
        before, after = old.machine.get(key, "unknown"), new.machine.get(key, "unknown")
        if before != after:
            yield f"The machine differs: {key} was {before}, is {after}."
    if old.quick != new.quick:
        yield f"Only the {'old' if old.quick else 'new'} run was a quick one."
    for one, other, when in ((old, new, "before"), (new, old, "after")):
        if only := [key for key in one.figures if key not in other.figures]:
            yield f"Measured only {when}: {', '.join(only)}."


def show(old: Result, new: Result) -> bool:
    """Print the comparison; whether anything became slower.

    Raises:
        Failed: there is nothing to compare.
    """
    found = changes(old, new)
    if not found:
        raise Failed("these two results have no figure in common")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("FIGURE", overflow="fold")
    for column in ("BEFORE", "AFTER", "CHANGE"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for change in found:
        table.add_row(change.figure.what, *change.cells())
    out = console()
    out.print(f"before: {old}\nafter:  {new}", style="dim")
    for remark in remarks(old, new):
        out.print(remark)
    out.print(table)
    return any(change.slower for change in found)
