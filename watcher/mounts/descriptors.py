# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that are open for the duration of a block: `contextlib.ExitStack` for nothing but them, at a tenth of
the price. A swap opens up to a hundred."""

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

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        failed = None
        while self._fds:
            try:
                os.close(self._fds.pop())
            except OSError as error:  # close(2): it is closed nevertheless; and so shall be the others
                failed = failed or error
        if failed is not None and value is None:
            raise failed
