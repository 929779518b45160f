# SPDX-License-Identifier: LGPL-2.1-or-later
"""One target under libFuzzer: `python -m fuzz.one TARGET LIBFUZZER-ARGUMENT...`, made by `__main__.py`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["watcher", "jeepney", "varlink"]):
    from fuzz.targets import TARGETS, Target, grown

from fuzz.steps import counted

_COUNT_EVERY = 512
"""One in so many runs has its steps counted, with a long input: counting takes time."""


def main(target: Target, arguments: list[str]) -> None:
    runs = 0

    def run(data: bytes) -> None:
        nonlocal runs
        runs += 1
        if runs % _COUNT_EVERY:
            target.run(data)
        else:
            counted(target.run, grown(data[:64]))

    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(TARGETS[sys.argv[1]], sys.argv[2:])
