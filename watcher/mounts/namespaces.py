# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount namespaces of one service: its main process's, and those of others that show the same stack.

A process of the service that made itself a namespace of its own (a worker with `unshare`, a nested sandbox) keeps
showing the old stack unless its mounts follow by propagation. Namespaces that show something else on `/etc`
(containers, delegated subtrees) are not the service's in this sense, and are left alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from watcher.mounts.table import Mounted, Table
from watcher.mounts.workshop import HostNamespace, Workshop
from watcher.process import Gone, Process, namespace_id


@dataclass(frozen=True, slots=True)
class Namespace:
    """A mount namespace held by a descriptor, and what its `/etc` shows."""

    fd: int
    identity: tuple[int, int]
    mounted: Mounted


@contextlib.contextmanager
def of_service(shop: Workshop, main: Process, pids: Iterable[int]) -> Iterator[list[Namespace]]:
    """The namespaces in which the service's stack has to be swapped: nested ones first, the main process's last.

    Runs on a worker of the workshop. Descriptors are closed at the end of the block.

    Raises:
        HostNamespace: the main process shares the host's.
        Gone: the main process has ended.
    """
    with contextlib.ExitStack() as fds:
        shop.check_foreign(_identity(main))
        own = _look(shop, fds, main)
        found = {own.identity: own}
        for pid in pids:
            with contextlib.suppress(Gone, PermissionError, HostNamespace), Process(pid) as process:
                if _identity(process) in found:
                    continue
                other = _look(shop, fds, process)
                if _same(other.mounted, own.mounted):
                    found[other.identity] = other
        yield [*(other for other in found.values() if other is not own), own]


def _identity(process: Process) -> tuple[int, int]:
    try:
        return namespace_id(f"/proc/{process.pid}/ns/mnt")
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {process.pid} has ended") from None


def _look(shop: Workshop, fds: contextlib.ExitStack, process: Process) -> Namespace:
    fd = process.namespace()
    fds.callback(os.close, fd)
    # From inside: /proc/PID/mountinfo of a process that has changed its root shows nothing.
    with shop.entered(fd):
        text = shop.mountinfo()
    return Namespace(fd, namespace_id(fd), Table(text).mounted())


def _same(one: Mounted, other: Mounted) -> bool:
    return one.overlay and other.overlay and one.stack == other.stack
