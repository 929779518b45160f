# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counted tries, systemd.v(7): "NAME_VERSION+LEFT-DONE.raw", kept up by renaming the dropped file.

Before each attempt one is taken from what is left and added to what is done; after a success the counters are removed.
A file with nothing left is not picked while there is another (`vpick.py`). One that failed and has tries left is
tried again at the next start of the service or of the watcher, or after `rollback --forget`; one that failed its last
try is in quarantine like any other.

The count belongs to the file. Services that share a directory share it: every attempt of any of them counts, and the
first success of any of them removes the counters.

A rename never overwrites (RENAME_NOREPLACE) and is one step, so that a kill in between leaves one of the two names.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from watcher.mounts import syscalls

# As vpick.py reads them: at the end of the name, before the suffix of an image.
_COUNTERS = re.compile(
    r"(?P<stem>.+)\+(?P<left>[0-9]+)(?:-(?P<done>[0-9]+))?(?P<suffix>(?:\.raw)?)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Counted:
    """A file's name taken apart: how many tries are left, how many were made."""

    stem: str
    left: int
    done: int
    suffix: str

    def next(self) -> str:
        """Its name while the next try is made."""
        return f"{self.stem}+{max(self.left - 1, 0)}-{self.done + 1}{self.suffix}"

    def good(self) -> str:
        """Its name after a try that went well."""
        return self.stem + self.suffix


def counted(path: str) -> Counted | None:
    """The counters in the name of a file, None if it has none."""
    match = _COUNTERS.fullmatch(os.path.basename(path))
    if match is None:
        return None
    return Counted(match["stem"], int(match["left"]), int(match["done"] or 0), match["suffix"])


def begin(path: str) -> str:
    """Count one try; returns the file's path from now on.

    Raises:
        FileNotFoundError: somebody renamed or removed it meanwhile.
        FileExistsError: there is a file of the new name.
        OSError: it cannot be renamed.
    """
    counters = counted(path)
    return path if counters is None else _renamed(path, counters.next())


def succeed(path: str) -> str:
    """Remove the counters; returns the file's path from now on. Raises as `begin()`."""
    counters = counted(path)
    return path if counters is None else _renamed(path, counters.good())


def _renamed(path: str, name: str) -> str:
    new = os.path.join(os.path.dirname(path), name)
    syscalls.rename_noreplace(path, new)
    return new
