# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tells that the files of a unit have changed: where to watch, and what to compare.

What stands in the files counts, whether systemd has loaded it or not. So an administrator who writes `Check=` into a
drop-in, and drops an image in the very next line, has it checked: each round compares first. Watching alone would be
too late for that; it is for what the change itself brings about.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from watcher.managers.systemd.unit_files import DROPIN, SUFFIX, Unit, with_template
from watcher.model import Interest
from watcher.settings import unit_names

State = tuple[tuple[int, int, int] | None, ...]
"""Of each file and directory: inode, time of its last change (nsec), size; None: it is not there."""

# What systemd and its generators write: with a daemon-reload, or for a unit that takes no part.
_MADE = frozenset({"generator", "generator.early", "generator.late", "transient"})
_CONFEXT_DIR = rf"(?s:.*)\.service{re.escape(SUFFIX)}"
_DROPINS = r"(?s:[^.].*)\.conf"


def state(search_path: Sequence[str], unit: Unit) -> State:
    """What the files of a unit are now. Quick: some twenty stat(2) on the host's own file systems."""
    paths = [*_written(search_path), unit.fragment]
    for directory in unit.places:
        if os.path.basename(os.path.dirname(directory)) not in _MADE:
            paths += [directory, *_dropins(directory)]
    return tuple(map(_state_of, paths))


def interests(search_path: Sequence[str], units: Iterable[Unit]) -> tuple[Interest, ...]:
    """Where a change may concern one of these units, or make another one take part by its `.confext.d/`."""
    units = tuple(units)
    names = {"service.d"}
    for name in (name for unit in units for name in unit.names):
        names.update(with_template(name), (f"{each}.d" for each in unit_names.drop_in_names(name)))
    written = list(_written(search_path))
    pattern = "|".join((_CONFEXT_DIR, *map(re.escape, sorted(names))))
    found = [Interest(path, pattern=pattern if path in written else _CONFEXT_DIR) for path in search_path]
    found += [
        Interest(place, pattern=_DROPINS)
        for place in sorted({place for unit in units for place in unit.places})
        if os.path.dirname(place) in written
    ]
    # A unit file or a drop-in may be a link that leads out of these directories.
    files = {path for unit in units for path in (unit.fragment, *unit.dropins)}
    for path in sorted({os.path.realpath(path) for path in files if os.path.islink(path)}):
        found.append(Interest(os.path.dirname(path), pattern=re.escape(os.path.basename(path))))
    return tuple(found)


def _written(search_path: Iterable[str]) -> Iterable[str]:
    return (path for path in search_path if os.path.basename(path) not in _MADE)


def _dropins(directory: str) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [f"{directory}/{name}" for name in names if name.endswith(".conf") and name != DROPIN]


def _state_of(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns, status.st_size
