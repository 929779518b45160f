# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user without rights, who is what attackers are: as a number, as the beginning of a command line, and as us."""

from __future__ import annotations

import os

NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


def become_nobody() -> None:
    """There is no way back."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
