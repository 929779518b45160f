# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first version as an image: copied from the host, packed, and looked at as the daemon will.

Unlike what `build` makes, its files have the owners that they have on this host: it is made here, for here, and the
service may read by its group what others may not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

from watcher.images import build_tools, made_for
from watcher.images.image_check import examine
from watcher.model import Busy, Refused
from watcher.records.schema import Failed
from watcher.setup import first_version

_EPOCH = 1
"""Time of all files in it: the same content is the same image, as of `build`."""


def build(
    sources: Sequence[str], excludes: Callable[[str], bool], name: str, path: str, image_max: int
) -> None:
    """Make an image of what the host has, with its owners and modes.

    Args:
        sources, excludes: see `first_version.take()`.
        name: of the image, for its release file.
        path: of the image; only root may read it if there is something in it that not everybody may.
        image_max: bytes (`ImageMax=`).

    Raises:
        Failed: it cannot be made, or would not be admitted: the reason.
        OSError: something cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="confext-watcher-") as scratch:
        tree = f"{scratch}/{name}"
        os.mkdir(tree, 0o755)
        os.chmod(tree, 0o755)
        taken = first_version.take(sources, excludes, image_max, tree)
        _write_release(tree, name)
        try:
            build_tools.squashfs(tree, path, _EPOCH, owners=True)
        except (Refused, Busy) as error:
            raise Failed(str(error)) from error
    os.chmod(path, 0o600 if taken.private else 0o644)
    try:
        examine(path, made_for.host(), image_max)
    except (Refused, Busy) as error:
        raise Failed(f"the first version would not be admitted: {error}") from error


def _write_release(tree: str, name: str) -> None:
    directory = f"{tree}/etc/extension-release.d"
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o755)
    release = f"{directory}/extension-release.{name}"
    with open(release, "w", encoding="ascii") as file:
        file.write("ID=_any\n")
    os.chmod(release, 0o644)
