# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: the figures, each beside its floor from the same run. `make bench-compare`: since an earlier run.

Needs root, mksquashfs, mkfs.erofs and mkfs.ext4.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from beds.bed import BootFailed
from beds.roots import BuildFailed
from support.needs import which

from . import base, compare, drops, filesystem, generator, idle, report, result, swap, systemd, trace
from .report import Failed
from .result import Figure, NoResult, Result
from .rig import stand_apart

RESULTS = Path(__file__).with_name("results")
TOOLS = ("mksquashfs", "mkfs.erofs", "mkfs.ext4", "findmnt", "setpriv")

# Of one part: the others have taken minutes, and are shown.
_FAULTS = (AssertionError, OSError, RuntimeError, subprocess.SubprocessError, BootFailed, BuildFailed)

Part = Callable[[], list[Figure]]


def parts(quick: bool) -> dict[str, Part]:
    """All measurements, by name."""
    few = functools.partial
    return {
        "drops": few(drops.run, 50 if quick else 500),
        "swap": few(swap.run, 50 if quick else 1000),
        "many": few(drops.run_many, count=5 if quick else 20),
        "versions": few(drops.run_versions, 5 if quick else 20),
        "rate": few(drops.run_rate, 3, 100 if quick else 1000),
        "events": idle.run_events,
        "start": few(idle.run_start, 1 if quick else 3),
        "idle": idle.run,
        "base": few(base.run, *((2, 10) if quick else ())),
        "generator": few(generator.run, 3 if quick else 10),
        "trace": few(trace.run, *((3,) if quick else ())),
        "systemd": few(systemd.run, *((10, 3) if quick else ())),
        "systemd-rate": few(systemd.run_rate, 3, 100 if quick else 1000),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure confext-watcher.")
    parser.add_argument("--quick", action="store_true", help="a rough impression: few drops")
    parser.add_argument("--output", type=Path, help="where to put the JSON")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="with this result; its parts are measured"
    )
    parser.add_argument("--new", type=Path, help="compare this result instead of measuring")
    parser.add_argument("part", nargs="*", choices=[[], *parts(quick=True)], help="only these")
    options = parser.parse_args()
    # The way out is the same as for an interrupt: whoever has made something removes it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        old = result.read(options.compare) if options.compare else None
        if options.new:
            new, complete = result.read(options.new), True
        else:
            names = options.part or (old.parts if old else parts(quick=True))
            quick = old.quick if old else options.quick
            new, complete = measure(names, quick)
            report.show(new)
            keep(new, options.output)
            if old and (again := compare.suspects(old, new)):
                print(f"bench: seems slower, so once more: {', '.join(again)}", file=sys.stderr)
                new = compare.confirmed(old, new, measure(again, quick)[0])
        slower = old is not None and compare.show(old, new)
    except (Failed, NoResult) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 1 if slower or not complete else 0


def measure(names: Iterable[str], quick: bool) -> tuple[Result, bool]:
    """Run these parts; what they found, and whether all of them came about.

    Raises:
        Failed: nothing can be measured here.
    """
    if os.geteuid():
        raise Failed("it needs root, to mount images")
    if missing := [tool for tool in TOOLS if not which(tool)]:
        raise Failed(f"it needs {' and '.join(missing)}")
    stand_apart()
    machine = result.machine(filesystem.describe())
    print(f"bench: each part on a new {machine['file system']}", file=sys.stderr)
    date, (commit, dirty), load = result.now(), result.commit(), os.getloadavg()[0]
    figures: dict[str, Figure] = {}
    measured: dict[str, tuple[str, ...]] = {}
    complete = True
    chosen = [(name, part) for name, part in parts(quick).items() if name in set(names)]
    for name, part in chosen:
        start = time.monotonic()
        try:
            found = part()
        except (Failed, *_FAULTS) as error:
            print(f"bench: {name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            complete = False
            continue
        assert not figures.keys() & {one.key for one in found}
        figures |= {one.key: one for one in found}
        measured[name] = tuple(one.key for one in found)
        print(f"bench: {name} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    loads = (load, os.getloadavg()[0])
    return Result(date, commit, dirty, quick, measured, machine, loads, figures), complete


def keep(found: Result, path: Path | None) -> None:
    """Write the JSON, and say where."""
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / found.file_name()
    try:
        path.write_text(found.to_json())
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    print(f"bench: written to {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
