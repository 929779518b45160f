# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we can mount, and systemd may not: a unit would run on it, and fail at its next start."""

from __future__ import annotations

from watcher.images.formats.image import Image
from watcher.model import Copy, Refused


def require_startable(copy: Copy) -> None:
    """Raise Refused for a copy on which systemd may not be able to start a unit.

    With verity data in an image it sets up dm-verity (from 258 on, and before where there is a signature). Without a
    device mapper, or where the data is wrong, that fails with 226/NAMESPACE, whatever ExtensionImagePolicy= says; so
    does each ExecReload=. We do not verify the data, and so do not know that before.
    """
    if isinstance(copy.format, Image) and copy.format.brought is not None:
        raise Refused(
            "it has verity data, which this version does not verify: systemd does at the start of a unit, and it may"
            " fail then; build it without"
        )
