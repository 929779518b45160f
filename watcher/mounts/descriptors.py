# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that are closed at the end of a block.

`contextlib.ExitStack` takes ten times as long for it, and a swap opens up to a hundred descriptors.
"""

from __future__ import annotations

import os
from types import TracebackType


class Descriptors:
    """Closes what was added, the last one first."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def keep(self, *fds: int) -> None:
        """Do not close these: they are the caller's from now on."""
        self._fds = [fd for fd in self._fds if fd not in fds]

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        failed = None
        while self._fds:
            try:
                os.close(self._fds.pop())
            except OSError as error:  # it is closed nevertheless (close(2)); close the others too
                failed = failed or error
        if failed is not None and value is None:
            raise failed
