# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that writes to a file step by step, as it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A letter a step: o opens, t truncates, w writes the next half, c closes what was opened last. Each line is answered.
_PROGRAM = """
import os, sys
target, source = sys.argv[1:]
content = open(source, "rb").read()
half = len(content) // 8192 * 4096
fds, at = [], 0
for line in sys.stdin:
    for letter in line.strip():
        if letter == "o":
            fds.append(os.open(target, os.O_WRONLY | os.O_CREAT, 0o644))
        elif letter == "t":
            os.ftruncate(fds[-1], 0)
        elif letter == "w":
            part = content[at:] if at else content[:half]
            os.pwrite(fds[-1], part, at)
            at += len(part)
        elif letter == "c":
            os.close(fds.pop())
    print("done", flush=True)
"""


class Writer:
    """A context manager; at its end the process ends, and whatever it has open is closed.

    Args:
        source: what it writes.
    """

    def __init__(self, target: Path, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _PROGRAM, target, source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __call__(self, steps: str) -> None:
        """Do these steps, a letter each."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()
