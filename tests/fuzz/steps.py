# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much work a parser does, in lines of this package that are executed: a number that no busy machine changes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import watcher

STEPS, STEPS_PER_BYTE = 5_000, 200
"""What a linear parser may take. One that is quadratic takes more than this for a few thousand bytes."""

_PACKAGE = os.path.dirname(watcher.__file__) + os.sep


class TooManySteps(AssertionError):
    """The work grows faster than the input."""


def counted(function: Callable[[bytes], None], data: bytes) -> int:
    """Call `function(data)`; how many lines it executed.

    Raises:
        TooManySteps: as soon as there are too many for this length.
    """
    budget = STEPS + STEPS_PER_BYTE * len(data)
    steps = 0

    def step(frame: FrameType) -> None:
        nonlocal steps
        steps += 1
        if steps > budget:
            raise TooManySteps(
                f"more than {budget} steps for {len(data)} bytes, in {frame.f_code.co_qualname}"
            )

    _follow(function, data, step)
    return steps


def lines_of(function: Callable[[bytes], None], data: bytes) -> set[tuple[str, int]]:
    """The lines that `function(data)` executes, by file and number."""
    lines: set[tuple[str, int]] = set()
    _follow(function, data, lambda frame: lines.add((frame.f_code.co_filename, frame.f_lineno)))
    return lines


def _follow(function: Callable[[bytes], None], data: bytes, step: Callable[[FrameType], None]) -> None:
    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            step(frame)
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function(data)
    finally:
        sys.settrace(before)
