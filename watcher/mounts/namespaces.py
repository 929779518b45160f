# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount namespaces of one service: its main process's, and those of others that show the same `/etc`.

A process of the service that made itself a namespace of its own (a worker with `unshare`, a nested sandbox) keeps
showing the old stack unless its mounts follow by propagation. Namespaces that show something else on `/etc`
(containers, delegated subtrees) are not the service's in this sense, and are left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from watcher.mounts.descriptors import Descriptors
from watcher.mounts.survey import read_table
from watcher.mounts.table import Mount, Table
from watcher.mounts.workshop import HostNamespace, Workshop
from watcher.process import Gone, Process, namespace_id


@dataclass(frozen=True, slots=True)
class Namespace:
    """A mount namespace held by a descriptor."""

    fd: int
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Where the stack of a service has to be swapped, in this order.

    Attributes:
        apart: nested ones with mounts of their own below `/etc`. If they follow the main one they would keep the old
            stack because of these, without what was lifted off it there: they have to be done before.
        main: the main process's.
        following: the other nested ones; most have followed once the main one is done.
    """

    apart: list[Namespace]
    main: Namespace
    following: list[Namespace]


@contextlib.contextmanager
def of_service(shop: Workshop, main: Process, pids: Iterable[int]) -> Iterator[Namespaces]:
    """The namespaces of one service. Runs on a worker of the workshop.

    Descriptors are closed at the end of the block. Where there are no nested ones, which is nearly always, nothing is
    entered for this.

    Raises:
        HostNamespace: the main process shares the host's.
        Gone: the main process has ended.
    """
    with Descriptors() as fds:
        own = _hold(fds, main)
        shop.check_foreign(own.identity)
        others: dict[tuple[int, int], Namespace] = {}
        for pid in pids:
            # What has ended or is not ours to look at is not the service's any more, or never was.
            with contextlib.suppress(Gone, PermissionError), Process(pid) as process:
                if _identity(process) not in (own.identity, *others):
                    other = _hold(fds, process)
                    others[other.identity] = other
        found = Namespaces([], own, [])
        if others:
            _sort(shop, found, others.values())
        yield found


def _identity(process: Process) -> tuple[int, int]:
    try:
        return namespace_id(f"/proc/{process.pid}/ns/mnt")
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {process.pid} has ended") from None


def _hold(fds: Descriptors, process: Process) -> Namespace:
    fd = fds.add(process.namespace())
    return Namespace(fd, namespace_id(fd))


def _sort(shop: Workshop, found: Namespaces, others: Iterable[Namespace]) -> None:
    main = read_table(shop, found.main.fd)
    for other in others:
        with contextlib.suppress(HostNamespace):
            table = read_table(shop, other.fd)
            if _belongs(table, main):
                follows = main.carries(main.top, table.top, table)
                (found.following if follows else found.apart).append(other)


def _belongs(other: Table, main: Table) -> bool:
    """Whether a namespace was made from the main process's: the same root, and on `/etc` the same or a stack of ours.

    A stack of ours that is another one was left behind when the main process's was swapped.
    """
    if _shown(other.under) != _shown(main.under):
        return False
    mounted = other.mounted()
    return _shown(other.top) == _shown(main.top) or (mounted.overlay and mounted.layers is not None)


def _shown(mount: Mount) -> tuple[str, str]:
    return mount.device, mount.root
