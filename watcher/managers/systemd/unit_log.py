# SPDX-License-Identifier: LGPL-2.1-or-later
"""What units have logged as errors: read from the journal, by one journalctl(1) for all who ask at the same time.

A reload can say "done" although the service kept its old configuration (nginx that cannot bind a port). Then only its
own log tells.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from watcher.model import printable
from watcher.records import journal

KEPT_MAX: Final = 4096
"""Bytes of a unit's lines that are kept."""

_SEC: Final = 5.0
_READ: Final = ("--quiet", "--no-pager", "--all", "--output=json", "--output-fields=MESSAGE,_SYSTEMD_UNIT")


@dataclass(eq=False, slots=True)
class _Question:
    """What a unit has logged since then, microseconds since the epoch."""

    unit: str
    since: int
    answer: str | None = None


class UnitLog:
    """The log of all units."""

    def __init__(self) -> None:
        self._questions: list[_Question] = []
        self._reading = trio.Lock()

    async def errors(self, unit: str, since: int) -> str:
        """Lines of priority err and worse that a unit has logged, at most 4 KiB; "" if there are none.

        Args:
            since: microseconds since the epoch.
        """
        question = _Question(unit, since)
        self._questions.append(question)
        async with self._reading:
            if question.answer is None:
                await self._answer()
        return question.answer or ""

    async def _answer(self) -> None:
        questions, self._questions = self._questions, []
        try:
            entries = await _read({one.unit for one in questions}, min(one.since for one in questions))
        except BaseException:
            self._questions += questions
            raise
        for one in questions:
            lines = [text for unit, when, text in entries if unit == one.unit and when >= one.since]
            one.answer = cut("\n".join(lines))


def cut(text: str) -> str:
    """As much of a text as is kept, in whole characters."""
    return text.encode("utf-8", "replace")[:KEPT_MAX].decode("utf-8", "ignore")


def entries_of(output: bytes) -> Iterator[tuple[str, int, str]]:
    """Unit, time in microseconds since the epoch, and message of each entry that journalctl has printed as JSON."""
    for line in output.splitlines():
        entry = json.loads(line)
        yield (
            _text(entry.get("_SYSTEMD_UNIT")),
            int(entry["__REALTIME_TIMESTAMP"]),
            _text(entry.get("MESSAGE")),
        )


def _text(value: Any) -> str:
    """A field: text, bytes (what is not UTF-8 text is a list of numbers), or a list of these."""
    if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    return value if isinstance(value, str) else ""


async def _read(units: set[str], since: int) -> Sequence[tuple[str, int, str]]:
    problem = f"took longer than {_SEC:g} s"
    with trio.move_on_after(_SEC):
        try:
            await _journalctl("--sync")
            matches = (f"_SYSTEMD_UNIT={unit}" for unit in sorted(units))
            output = await _journalctl(*_READ, "--priority=err", f"--since=@{since / 1e6:.6f}", *matches)
            return list(entries_of(output))
        except FileNotFoundError:
            return ()  # there is no journal to ask
        except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            problem = printable(str(error))
    journal.log.warning(f"what {', '.join(sorted(units))} logged could not be read: journalctl {problem}")
    return ()


async def _journalctl(*options: str) -> bytes:
    argv = ["journalctl", *options]
    done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL)
    return bytes(done.stdout)
