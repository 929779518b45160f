# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we could mount, and systemd could not: a unit would run on it, and fail at its next start."""

from __future__ import annotations

from watcher.model import Copy, Refused
from watcher.mounts.process import has_device_mapper


def require_startable(copy: Copy) -> None:
    """Raise Refused for a copy on which systemd could start no unit here.

    With verity data in an image it sets up dm-verity (from 258 on, and before where there is a signature). Without a
    device mapper that fails with 226/NAMESPACE, whatever ExtensionImagePolicy= says; so does each ExecReload=.
    """
    if copy.format is not None and copy.format.protection and not has_device_mapper():
        raise Refused(
            "it has verity data, and this machine no device mapper (dm_mod): systemd could not start the service on it;"
            " build it without"
        )
