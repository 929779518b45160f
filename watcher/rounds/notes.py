# SPDX-License-Identifier: LGPL-2.1-or-later
"""Short notes about services that outlive a kill: one link each, whose target is the text.

A link is made, replaced and read by one system call each, so that there is always the whole note, the one before it,
or none.
"""

from __future__ import annotations

import contextlib
import os

from watcher.records import durable


class Notes:
    """The notes in one directory.

    Args:
        directory: absolute path; made if it is not there.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        durable.make(directory, 0o700)
        self._tidy()

    def write(self, service: str, text: str) -> None:
        """Write a note, not empty, in place of the one that is there."""
        path = self._path(service)
        # A service's name never begins with a dot; `exec` is another process than the daemon.
        temporary = os.path.join(self._directory, f".{service}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(text, temporary)
        os.rename(temporary, path)

    def read(self, service: str) -> str | None:
        """The note about a service, None if there is none."""
        try:
            return os.readlink(self._path(service))
        except FileNotFoundError:
            return None

    def remove(self, service: str) -> None:
        """Remove the note about a service, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(service))

    def _tidy(self) -> None:
        """Remove what a writer left that was killed."""
        for name in os.listdir(self._directory):
            pid = name.rpartition(".")[2]
            if name.startswith(".") and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._directory, name))

    def _path(self, service: str) -> str:
        return os.path.join(self._directory, service)
