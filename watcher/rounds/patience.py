# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a look waits: for a tree to be complete, and before a service goes back to less.

`rsync --delete` removes the old version before the new one is there. Between the two the service would go back to an
older version, or to nothing. So what disappears while an upload into the same directory is in progress is not gone yet,
and the last version of an entry stays for a moment in any case.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from watcher.model import Busy, Layer
from watcher.resolve.content import MARKER
from watcher.resolve.sources import ENTRY_NAME
from watcher.settings.config import ServiceSettings, Settings
from watcher.watch.lease import Lease
from watcher.watch.uploads import Uploads

_USEC = 1_000_000
_NAMES_MAX = 10_000
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one service, microseconds. The defaults wait for nothing.

    Attributes:
        tree_usec: `SettleTreeSec=`.
        tree_max_usec: `SettleTreeMaxSec=`.
        remove_usec: `RemoveSec=`.
        upload_usec: `SettleMaxSec=`: an upload is in progress for so long after its last sign of life.
    """

    tree_usec: int = 0
    tree_max_usec: int = 0
    remove_usec: int = 0
    upload_usec: int = 0


def limits(settings: Settings, own: ServiceSettings) -> Limits:
    """Those of a service, by the watcher's settings and its own."""
    return Limits(
        settings.settle_tree_usec if own.settle_tree_usec is None else own.settle_tree_usec,
        settings.settle_tree_max_usec,
        settings.remove_usec if own.remove_usec is None else own.remove_usec,
        settings.settle_max_usec,
    )


class Removals:
    """Since when what is accepted is not there any more. Threads may share it, one for each service."""

    def __init__(self, uploads: Uploads | None = None) -> None:
        self._uploads = uploads or Uploads()
        self._gone: dict[str, dict[str, float]] = {}

    def seen(self, slots: str, gone: Iterable[str]) -> None:
        """A look has found that these files of a service's accepted layers are gone, by path, and no others."""
        before, now = self._gone.get(slots, {}), time.monotonic()
        self._gone[slots] = {path: before.get(path, now) for path in gone}

    def left(self, slots: str, layer: Layer, limits: Limits, *, last: bool) -> float:
        """Seconds for which a layer whose file is gone stays, and then look again; 0 or less: it goes.

        Blocks on the directory of the file.

        Args:
            last: nothing else is there for its entry.
        """
        now = time.monotonic()
        stays = 0.0
        if last:
            since = self._gone.get(slots, {}).get(layer.source, now)
            stays = since + limits.remove_usec / _USEC - now
        return max(stays, self._upload(os.path.dirname(layer.source), limits.upload_usec / _USEC, now))

    def forget(self, slots: str) -> None:
        """The service takes no part any more."""
        self._gone.pop(slots, None)

    def _upload(self, directory: str, seconds: float, now: float) -> float:
        """Seconds for which an upload into a directory counts as going on; 0 or less: there is none."""
        directory = os.path.realpath(directory)
        at = self._uploads.temporary_at(directory)
        stays = 0.0 if at is None else at + seconds - now
        try:
            for written_at, is_open in _temporary(directory):
                stays = max(stays, seconds if is_open else written_at + seconds - time.time())
        except OSError:
            pass  # the directory is gone: nobody uploads into it
        return min(stays, seconds)  # a time in the future is a clock that was set back


def _temporary(directory: str) -> Iterator[tuple[float, bool]]:
    """When each temporary name in a directory changed, seconds since the epoch, and whether it is open for writing."""
    with os.scandir(directory) as entries:
        names = [
            entry.name for entry in islice(entries, _NAMES_MAX) if not re.fullmatch(ENTRY_NAME, entry.name)
        ]
    for name in names:
        path = f"{directory}/{name}"
        try:
            found = os.lstat(path)
            yield found.st_ctime, stat.S_ISREG(found.st_mode) and _is_open(path)
        except OSError:
            continue  # it has just been renamed, or is nothing to be opened


def _is_open(path: str) -> bool:
    """Whether a process is writing to a file, where its file system can tell."""
    fd = os.open(path, _READ)
    try:
        with Lease(fd):
            return False
    except Busy:
        return True
    finally:
        os.close(fd)


def marked(layers: Iterable[Layer], slots: dict[str, str], store: str) -> Callable[[str], bool]:
    """Whether the tree before had the marker, for `complete.Rule`.

    Args:
        layers: the accepted ones.
        slots: of each candidate, by path.
        store: directory of the copies.
    """
    digests = {layer.slot: layer.digest for layer in layers}

    def asked(path: str) -> bool:
        digest = digests.get(slots.get(path, ""))
        return digest is not None and os.path.lexists(f"{store}/{digest}/{MARKER}")

    return asked
