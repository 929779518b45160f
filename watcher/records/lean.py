# SPDX-License-Identifier: LGPL-2.1-or-later
"""structlog as we use it.

It loads rich wherever that is installed, to print tracebacks that we do not print: 4 MiB, and 80 ms of every start,
`exec`'s too. None in `sys.modules` is how Python is told that there is no such module; commands that print tables
load it later all the same.
"""

from __future__ import annotations

import sys
from types import ModuleType

_modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
_before = _modules.setdefault("rich", None)

import structlog  # noqa: E402

if _before is None:
    del _modules["rich"]

__all__ = ["structlog"]
