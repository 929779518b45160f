# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the `/etc` of a service is made of: the layers of its stack and the base, as descriptors. Nothing is changed.

The overlay in the service does not lead back to its layers. So these are taken as a swap takes them: the layers from
the store, the base out of a clone of what the service has mounted (survey.py). All of it is attached in the workers'
own mount namespace, which goes with the process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from watcher.model import Copy, Layer
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Moved, clone, look_up
from watcher.mounts.survey import survey
from watcher.mounts.swap import attach_base, open_layer
from watcher.mounts.table import Table
from watcher.mounts.workers import MountWorkers


@dataclass(frozen=True, slots=True)
class Parts:
    """Descriptors of directories; none has anything mounted below it, as overlayfs sees a layer.

    Attributes:
        base: what the service's `/etc` is without its stack.
        table: the service's mount table, None where it has none of its own.
        etc: the `/etc` that the service sees, -1 where there is no service.
    """

    base: int
    table: Table | None = None
    etc: int = -1


def of_service(fds: Descriptors, workers: MountWorkers, namespace: int) -> Parts:
    """The base of a service, and what tells of its stack. Runs inside `MountWorkers.call()`.

    Args:
        fds: closes the descriptors.
        namespace: descriptor of the service's mount namespace.

    Raises:
        HostNamespace, Moved, Refused, OSError: as `swap()`.
    """
    for _ in range(5):
        with contextlib.suppress(Moved), workers.attending(namespace), workers.scratch():
            place = os.getcwd()
            found = survey(fds, workers, namespace, lambda _: True)
            assert found.etc is not None
            os.chdir(place)
            os.mkdir("root")
            base, _ = clone(fds, attach_base(fds, found), whole=False)
            return Parts(base, found.table, found.etc.fd)
    raise Moved("/etc kept changing while it was looked at")


def of_host(fds: Descriptors) -> Parts:
    """The base of a service that is yet to be started. Runs inside `MountWorkers.call()`."""
    base, _ = clone(fds, fds.add(look_up()), whole=False)
    return Parts(base)


def open_layers(
    fds: Descriptors, workers: MountWorkers, copies: Sequence[Copy], layer: Callable[[str], Layer]
) -> dict[str, int]:
    """The `etc` of each copy, by digest. Runs inside `MountWorkers.call()`.

    Args:
        layer: gives the layer of a digest, for its name.

    Raises:
        Refused: the kernel will not mount it, or its `etc` is no directory.
        OSError: no loop device, no memory.
    """
    with workers.images.attached(copies) as roots:
        return {digest: open_layer(fds, layer(digest), root) for digest, root in roots.items()}
