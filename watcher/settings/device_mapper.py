# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is a device mapper, by which systemd sets up dm-verity when it starts a unit. Standard library only."""

from __future__ import annotations

import os

CONTROL = "/dev/mapper/control"


def is_there() -> bool:
    """Containers have none, nor have kernels without dm_mod. At boot its device may come later than the generator."""
    return os.path.exists(CONTROL)
