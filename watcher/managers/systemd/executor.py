# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that is to become a service, before it has: systemd's executor (systemd >= 255).

It sets up the service's namespaces itself. Until it has, they are the host's, or half made.
"""

from __future__ import annotations

import os
from typing import Final

_EXECUTOR: Final = "systemd-executor"


def is_executor(pid: int) -> bool:
    """Whether a process is still systemd's executor, on its way to becoming the service."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith(_EXECUTOR)
    except OSError:
        return False  # it has ended, which the next use of it shows


def has_become(pid: int) -> bool:
    """Whether a process is there, and is no executor any more."""
    try:
        return not os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith(_EXECUTOR)
    except OSError:
        return False
