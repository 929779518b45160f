# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run of the bench found, and on what: kept as JSON, to be compared with later runs."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import CHECKOUT

FORMAT = "confext-watcher bench, version 1"


class NoResult(Exception):
    """A file is no result of the bench: one line that says which and why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured values.

    Attributes:
        count: how many.
        median, p99: all in the figure's unit.
    """

    count: int
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured. Less is better.

    Attributes:
        key: its name in all results, "drop.erofs.handler": what is measured in another way gets another one.
        what: the same for people.
        unit: of all values; "" if they are counts.
        ours: with confext-watcher.
        floor: the same work by bare system calls, in the same run; None where there is no such thing.
        needed: with the least that Python with trio needs for what we promise (`needed.py`), likewise.
        aim: what the median (and the 99th percentile) should not exceed, in words.
    """

    key: str
    what: str
    unit: str
    ours: Sample
    floor: Sample | None = None
    aim: str = ""
    needed: Sample | None = None

    @property
    def ratio(self) -> float | None:
        """How many times the floor; None for a count, as of lost drops: a machine is not half as fast by losing two."""
        return (
            self.ours.median / self.floor.median if self.unit and self.floor and self.floor.median else None
        )

    @property
    def of_needed(self) -> float | None:
        """How many times what Python needs."""
        return self.ours.median / self.needed.median if self.needed and self.needed.median else None


@dataclass(frozen=True, slots=True)
class Result:
    """A run.

    Attributes:
        date: when it began, ISO 8601.
        commit: what the checkout is at; "" where it is no clone.
        dirty: whether that is all that it is.
        quick: a rough impression: few drops.
        parts: the parts that were run, and the keys of what each found.
        machine: what it was measured on; what makes results differ if it differs.
        load: the machine's load average over a minute, before and after.
        figures: by key, in the order of the run.
    """

    date: str
    commit: str
    dirty: bool
    quick: bool
    parts: dict[str, tuple[str, ...]]
    machine: dict[str, str]
    load: tuple[float, float]
    figures: dict[str, Figure]

    def __str__(self) -> str:
        commit = f"commit {self.commit[:12] or 'unknown'}{' and changes' if self.dirty else ''}"
        return f"{self.date}, {commit}{', quick' if self.quick else ''}"

    def to_json(self) -> str:
        figures = {}
        for key, one in self.figures.items():
            fields = dataclasses.asdict(one)
            del fields["key"]
            figures[key] = fields | {"ratio": one.ratio, "of needed": one.of_needed}
        head = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"format": FORMAT} | head | {"figures": figures}, indent=2) + "\n"

    def file_name(self) -> str:
        """Of its own, sorts by time: "20261129T114100-474653c0a1b2.json"."""
        time = self.date.partition("+")[0].replace("-", "").replace(":", "")
        return f"{time}-{self.commit[:12] or 'unknown'}{'-dirty' if self.dirty else ''}.json"


def read(path: Path) -> Result:
    """A result from a file.

    Raises:
        NoResult: it cannot be read, or is something else.
    """
    try:
        return parse(path.read_text())
    except OSError as error:
        raise NoResult(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise NoResult(f"{path}: no result of `make bench`: {error}") from None


def parse(text: str) -> Result:
    """A result from its JSON.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'it does not say "format": "{FORMAT}"')
    try:
        return Result(
            date=str(found["date"]),
            commit=str(found["commit"]),
            dirty=bool(found["dirty"]),
            quick=bool(found["quick"]),
            parts={part: tuple(map(str, keys)) for part, keys in found["parts"].items()},
            machine={str(key): str(value) for key, value in found["machine"].items()},
            load=(float(found["load"][0]), float(found["load"][1])),
            figures={key: _figure(key, fields) for key, fields in found["figures"].items()},
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _figure(key: str, fields: Any) -> Figure:
    floor, needed = (
        None if fields.get(side) is None else _sample(fields[side]) for side in ("floor", "needed")
    )
    what, unit, aim = (str(fields[name]) for name in ("what", "unit", "aim"))
    return Figure(key, what, unit, _sample(fields["ours"]), floor, aim, needed)


def _sample(fields: Any) -> Sample:
    return Sample(int(fields["count"]), float(fields["median"]), float(fields["p99"]))


def machine(file_system: str) -> dict[str, str]:
    """What is measured on."""
    rows = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    models = [value.strip() for name, _, value in rows if name.strip() == "model name"]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file system": file_system,
    }


def commit() -> tuple[str, bool]:
    """What the checkout is at, and whether it has changes besides; ("", True) where git cannot tell."""
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "", True


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
