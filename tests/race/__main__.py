# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make race`: one race, for a minute by default; exit status 1 if anything was seen that must not be."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from race.harness import race
from scenarios.place import SCRATCH
from support import needs


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make race", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args(arguments)
    lacks = [
        lack
        for mark in (needs.root, needs.loop, needs.tool("mksquashfs"))
        if (lack := needs.lacking(mark.mark))
    ]
    if lacks:
        print(f"make race: {lacks[0]}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="confext-watcher-race-") as scratch:
        os.environ[SCRATCH] = scratch
        os.chmod(scratch, 0o755)
        print(f"== {options.seconds:g} s, --seed {options.seed}", flush=True)
        result = race(Path(scratch), options.seconds, seed=options.seed)
    print(result)
    for kind, count in sorted(result.tried.items()):
        print(f"  {kind:<24}{count:>8}")
    return int(bool(result.violations))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
