# SPDX-License-Identifier: LGPL-2.1-or-later
"""A finding of the doctor, and the examinations that come to some."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from watcher.model import problem
from watcher.settings.config import Settings


class Level(enum.Enum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor.

    Attributes:
        about: what was examined: "kernel", "nginx.service".
        text: what was found.
        helps: what to do about it, a command where one does; "" where it is well.
    """

    level: Level
    about: str
    text: str
    helps: str = ""


Examination = Callable[[Settings], Iterable[Finding]]


def ok(about: str, text: str) -> Finding:
    return Finding(Level.OK, about, text)


def warning(about: str, text: str, helps: str) -> Finding:
    return Finding(Level.WARNING, about, text, helps)


def error(about: str, text: str, helps: str) -> Finding:
    return Finding(Level.ERROR, about, text, helps)


def examine(settings: Settings, examinations: Iterable[tuple[str, Examination]]) -> Iterator[Finding]:
    """What all of them find. One that cannot be made is a finding itself, and holds up no other."""
    for about, examination in examinations:
        try:
            yield from examination(settings)
        except Exception as failed:  # noqa: BLE001 -- the doctor is asked when things are not as they should be
            if os.geteuid() != 0:  # what a user may not read says nothing of the host
                yield warning(about, f"not examined: {problem(failed)}", "sudo confext-watcher doctor")
            else:
                yield error(about, f"could not be examined: {problem(failed)}", "mend that, and ask again")
