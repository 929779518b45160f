# SPDX-License-Identifier: LGPL-2.1-or-later
"""A shadow: a throw-away copy of a service's mount namespace with another stack on `/etc`, to try that in.

The copy is made private before anything is mounted in it, so that nothing of it reaches the service. It lives as long
as its descriptor, or a process in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping

from watcher.model import Copy, Stack
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import look_up
from watcher.mounts.swap import build
from watcher.mounts.workshop import Workshop
from watcher.process import Gone, Process, namespace_id

_DYING_SEC = 5.0


def shadow(shop: Workshop, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> int:
    """A shadow of the mount namespace behind a descriptor; a descriptor of its own. Runs on a worker.

    Raises:
        Whatever `swap()` does.
    """
    with build(shop, namespace, stack, copies) as tree, Descriptors() as fds, shop.entered(namespace):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        etc = fds.add(look_up())
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
        syscalls.move_mount(tree, "", etc, "", flags)
        return shop.own_namespace()


def kill_all(namespace: int) -> None:
    """Kill every process that is in a mount namespace, however it got away from who started it.

    One that the kernel does not let go of (a dead file system) is left to it after a moment.
    """
    wanted = namespace_id(namespace)
    deadline = time.monotonic() + _DYING_SEC
    while time.monotonic() < deadline and (
        pids := [pid for pid in os.listdir("/proc") if pid.isdecimal() and _is_in(pid, wanted)]
    ):
        for pid in pids:
            with contextlib.suppress(Gone), Process(int(pid)) as process:
                if _is_in(pid, wanted):
                    process.signal(signal.SIGKILL)


def _is_in(pid: str, wanted: tuple[int, int]) -> bool:
    try:
        return namespace_id(f"/proc/{pid}/ns/mnt") == wanted
    except OSError:  # ended, or not ours to look at
        return False
