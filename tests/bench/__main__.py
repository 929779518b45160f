# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: the figures, each beside its floor from the same run. Needs root, mksquashfs and mkfs.erofs."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable

from support.needs import which

from . import drops, generator, idle, swap, systemd
from .report import Figure, as_json, show
from .rig import Failed, leave_the_hosts_mounts

Part = Callable[[], list[Figure]]


def parts(quick: bool) -> dict[str, Part]:
    """All measurements, by name."""
    count = 50 if quick else 1000
    found: dict[str, Part] = {
        "drops": functools.partial(drops.run, count),
        "swap": functools.partial(swap.run, count),
        "many": functools.partial(drops.run_many, count=5 if quick else 20),
        "events": idle.run_events,
        "idle": idle.run,
        "generator": functools.partial(generator.run, 3 if quick else 10),
        "systemd": functools.partial(systemd.run, *((10, 3, 50) if quick else ())),
    }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure confext-watcher.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a rough impression: few drops")
    parser.add_argument("part", nargs="*", choices=[[], *parts(quick=True)], help="only these")
    options = parser.parse_args()
    if os.geteuid():
        return _fail("it needs root, to mount images")
    if missing := [tool for tool in ("mksquashfs", "mkfs.erofs") if not which(tool)]:
        return _fail(f"it needs {' and '.join(missing)}")
    leave_the_hosts_mounts()
    figures: list[Figure] = []
    chosen = {name: part for name, part in parts(options.quick).items() if name in (options.part or [name])}
    try:
        for name, part in chosen.items():
            start = time.monotonic()
            figures += part()
            print(f"bench: {name} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    except Failed as error:
        return _fail(str(error))
    if options.json:
        print(as_json(figures))
    else:
        show(figures)
    return 0


def _fail(text: str) -> int:
    print(f"bench: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
