# SPDX-License-Identifier: LGPL-2.1-or-later
"""A shadow: a throw-away copy of a service's mount namespace with another stack on `/etc`, to try that in.

The copy is made private before anything is mounted in it, so that nothing of it reaches the service. It lives as long
as its descriptor, or a process in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from watcher.model import Copy, Stack
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import look_up
from watcher.mounts.swap import build
from watcher.mounts.workers import MountWorkers


def shadow(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> int:
    """A shadow of the mount namespace behind a descriptor; a descriptor of its own. Runs on a worker.

    Raises:
        Whatever `swap()` does.
    """
    with build(workers, namespace, stack, copies) as tree, Descriptors() as fds, workers.entered(namespace):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        etc = fds.add(look_up())
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
        syscalls.move_mount(tree, "", etc, "", flags)
        return workers.own_namespace()
