# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount namespaces of one service: its main process's, and those of others that show the same `/etc`.

A process of the service that made itself a namespace of its own (a worker with `unshare`, a nested sandbox) keeps
showing the old stack unless its mounts follow by propagation. Namespaces that show something else on `/etc`
(containers, delegated subtrees, another service that this one has started) are not the service's in this sense, and
are left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

from watcher.model import Stack
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
def of_service(
    shop: Workshop,
    main: Process,
    pids: Iterable[int],
    kept: Callable[[], Iterable[Stack]],
    elsewhere: Iterable[int] = (),
) -> Iterator[Namespaces]:
    """The namespaces of one service. Runs on a worker of the workshop.

    Descriptors are closed at the end of the block. Where there are no nested ones, which is nearly always, nothing is
    entered for this.

    Args:
        pids: of all processes of the service.
        kept: gives the stacks that the service has or had, as far as they are known.
        elsewhere: main processes of other services, whose namespaces are never this one's.

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
                if _identity(process.pid) not in (own.identity, *others):
                    other = _hold(fds, process)
                    others[other.identity] = other
        found = Namespaces([], own, [])
        if others:
            for pid in elsewhere:
                with contextlib.suppress(Gone, PermissionError):
                    others.pop(_identity(pid), None)
            _sort(shop, found, others.values(), {digest for stack in kept() for digest in stack.digests})
        yield found


def _identity(pid: int) -> tuple[int, int]:
    try:
        return namespace_id(f"/proc/{pid}/ns/mnt")
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {pid} has ended") from None


def _hold(fds: Descriptors, process: Process) -> Namespace:
    fd = fds.add(process.namespace())
    return Namespace(fd, namespace_id(fd))


def _sort(shop: Workshop, found: Namespaces, others: Iterable[Namespace], digests: Set[str]) -> None:
    main = read_table(shop, found.main.fd)
    own = digests | _digests(main)
    for other in others:
        with contextlib.suppress(HostNamespace):
            table = read_table(shop, other.fd)
            if _belongs(table, main, own):
                follows = main.carries(main.top, table.top, table)
                (found.following if follows else found.apart).append(other)


def _belongs(other: Table, main: Table, own: Set[str]) -> bool:
    """Whether a namespace was made from the main process's: the same root, and the same or an own stack on `/etc`.

    An own stack that is another one was left behind when the main process's was swapped.
    """
    if _shown(other.under) != _shown(main.under):
        return False
    if _shown(other.top) == _shown(main.top):
        return True
    mounted = other.mounted()
    return mounted.overlay and mounted.layers is not None and own >= _digests(other)


def _digests(table: Table) -> set[str]:
    return {layer.digest for layer in table.mounted().layers or ()}


def _shown(mount: Mount) -> tuple[str, str]:
    return mount.device, mount.root
