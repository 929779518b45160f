# SPDX-License-Identifier: LGPL-2.1-or-later
"""A shadow: a temporary copy of a service's mount namespace with another stack on `/etc`, for trying that stack.

The copy is made private before anything is mounted in it, so that nothing reaches the service. The kernel removes it
when its last descriptor is closed and the last process in it ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from watcher.model import Copy, Stack
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import look_up, mount_on
from watcher.mounts.swap import build
from watcher.mounts.workers import MountWorkers


def shadow(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> int:
    """A descriptor of a shadow of a mount namespace (a descriptor). Runs on a mount worker.

    Raises:
        Whatever `swap()` does.
    """
    with build(workers, namespace, stack, copies) as tree, Descriptors() as fds, workers.entered(namespace):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        mount_on(tree, fds.add(look_up()))
        return workers.own_namespace()
