# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount namespaces of one service: that of its main process, and nested ones that show the same `/etc`.

A process of the service that makes a mount namespace of its own (a worker with `unshare`, a nested sandbox) keeps
showing the old stack unless its mounts follow by propagation. A namespace that shows something else on `/etc` (a
container, a delegated subtree, another service that this one has started) is left alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

from watcher.model import Stack
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.mountinfo import Mount
from watcher.mounts.process import Gone, Process, namespace_id
from watcher.mounts.survey import TooLong, read_namespace
from watcher.mounts.table import Table
from watcher.mounts.workers import HostNamespace, MountWorkers

NESTED_MAX = 256
"""Nested namespaces of one service that are swapped: each takes a descriptor, and any user can make thousands."""

TABLES_MAX = 16 * 1024 * 1024
"""Bytes of the mount tables of all nested namespaces of one service together; one row has about 100."""


@dataclass(slots=True)
class Namespaces:
    """Where the stack of a service has to be swapped, in this order; descriptors.

    Attributes:
        apart: nested ones with mounts of their own below `/etc`. The main namespace must not be swapped before them:
            because of these mounts they would keep the old stack, without what was lifted off it in the main one.
        main: that of the main process.
        following: the other nested ones; most have followed once the main one is done.
        too_many: there are more, which keep what they have.
    """

    apart: list[int]
    main: int
    following: list[int]
    too_many: bool = False


@contextlib.contextmanager
def of_service(
    workers: MountWorkers,
    main: Process,
    pids: Iterable[int],
    kept: Callable[[], Iterable[Stack]],
    other_mains: Callable[[], Iterable[int]] = tuple,
) -> Iterator[Namespaces]:
    """The namespaces of one service, open during the block. Runs inside `MountWorkers.call()`.

    Where there are no nested ones, which is nearly always, none is entered.

    Args:
        pids: of all processes of the service.
        kept: gives the stacks that the service has or had, as far as they are known.
        other_mains: gives the main processes of other services, whose namespaces are never this one's.

    Raises:
        HostNamespace: the main process shares the host's.
        Gone: the main process has ended.
    """
    with Descriptors() as fds:
        found = Namespaces([], fds.add(main.namespace()), [])
        own = namespace_id(found.main)
        workers.check_foreign(own)
        nested: _Nested | None = None
        for pid in pids:
            # A process that has ended or that we may not look at is no longer the service's, or never was.
            with contextlib.suppress(Gone, PermissionError), Process(pid) as process:
                if _identity(process.pid) == own:
                    continue
                nested = nested or _Nested(workers, fds, found, kept, other_mains)
                nested.add(process)
                if found.too_many:
                    break
        yield found


def _identity(pid: int) -> tuple[int, int]:
    try:
        return namespace_id(f"/proc/{pid}/ns/mnt")
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {pid} has ended") from None


class _Nested:
    """Sorts the namespaces of a service's other processes, and holds those that are the service's."""

    def __init__(
        self,
        workers: MountWorkers,
        fds: Descriptors,
        found: Namespaces,
        kept: Callable[[], Iterable[Stack]],
        other_mains: Callable[[], Iterable[int]],
    ) -> None:
        self._workers, self._fds, self._found = workers, fds, found
        self._room = TABLES_MAX
        self._main = Table(read_namespace(workers, found.main))
        self._digests = {digest for stack in kept() for digest in stack.digests} | _digests(self._main)
        self._seen: set[tuple[int, int]] = set()
        for pid in other_mains():
            with contextlib.suppress(Gone, PermissionError):
                self._seen.add(_identity(pid))

    def add(self, process: Process) -> None:
        fd = process.namespace()
        try:
            where = self._where(fd)
            if where is None:
                return
            if len(self._found.apart) + len(self._found.following) == NESTED_MAX:
                raise TooLong
            where.append(self._fds.add(os.dup(fd)))
        except TooLong:
            self._found.too_many = True
        finally:
            os.close(fd)

    def _where(self, fd: int) -> list[int] | None:
        """The list of `Namespaces` that it goes into; None: it was seen before, or is not the service's.

        Raises TooLong: there is no room for its mount table.
        """
        identity = namespace_id(fd)
        if identity in self._seen:
            return None
        self._seen.add(identity)
        try:
            rows = read_namespace(self._workers, fd, self._room)
        except HostNamespace:
            return None
        self._room -= len(rows)
        table = Table(rows)
        if not _belongs(table, self._main, self._digests):
            return None
        follows = self._main.carries(self._main.top, table.top, table)
        return self._found.following if follows else self._found.apart


def _belongs(other: Table, main: Table, own: Set[str]) -> bool:
    """Whether a namespace was made from the main one: the same root, and the same or an own stack on `/etc`.

    It may show an earlier stack of the service: it has kept that one when the main namespace was swapped.
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
