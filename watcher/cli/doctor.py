# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher doctor`: what is wrong with this host, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from watcher.cli.answers import answer
from watcher.cli.show import Command
from watcher.doctor import host, services
from watcher.doctor.findings import Finding, Level, examine
from watcher.model import printable, shown
from watcher.records import journal
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """Exit status 0: no error, though there may be warnings; 1: an error."""
    journal.configure(level="error")
    found = [*examine(settings, (*host.EXAMINATIONS, *services.EXAMINATIONS))]
    answer(options, {"findings": found}, _lines(found))
    return ExitStatus.FAILED if any(one.level is Level.ERROR for one in found) else ExitStatus.DONE


def _lines(found: Sequence[Finding]) -> Iterator[str]:
    for one in found:
        yield f"{one.level.value + ':':<8} {shown(one.about)}: {printable(one.text)}"
        if one.helps:
            helps = f"         {printable(one.helps)}"
            yield helps if "," in helps else Command(helps)
    counts = {level: sum(one.level is level for one in found) for level in Level}
    errors, warnings = counts[Level.ERROR], counts[Level.WARNING]
    if errors or warnings:
        yield f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    else:
        yield "all is well"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
