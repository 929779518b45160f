# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the `/etc` of one service is made of, opened for `origin` and `diff`. No daemon is needed.

The kernel's mount table says which stack a running service is on. Its layers are opened in the store, its base out of
its mount namespace (mounts/parts.py), all of it in a mount namespace of this process's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from watcher.control import status
from watcher.images.access import User, may_search
from watcher.images.changes import changes
from watcher.images.layers import Layers, Node, Type
from watcher.images.store_names import Names
from watcher.images.stored import stored
from watcher.images.walk import Path
from watcher.managers.base import slots_of
from watcher.model import Copy, Layer, Refused, Stack, shown
from watcher.mounts import parts
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Moved, open_inside
from watcher.mounts.mountinfo import Mount
from watcher.mounts.parts import Parts
from watcher.mounts.process import Elsewhere, Gone, Process, may_mount, shares_host
from watcher.mounts.table import Table
from watcher.mounts.whereabouts import WorkerLost
from watcher.mounts.workers import MountWorkers
from watcher.records.ledger import Reader
from watcher.records.schema import Drift, Failed, ServiceNotFound
from watcher.records.state import Accepted
from watcher.records.traces import TracedLayer
from watcher.settings.config import Settings

ETC = "/etc"

_COMPARED_MAX = 1000
"""Paths by which a stack is known that systemd has mounted."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One service, looked at.

    Attributes:
        state: "running": `stack` is what it shows; else its next start gets `stack`.
        kept: the accepted stacks that are kept, newest first.
        drifted: files of the host that have changed below the newest of these.
        user: who is to be told; None: root.
    """

    name: str
    state: str
    stack: Stack
    kept: tuple[Accepted, ...]
    drifted: tuple[Drift, ...]
    parts: Parts
    user: User | None
    _settings: Settings
    _workers: MountWorkers
    _fds: Descriptors

    def opened(self, *stacks: Stack, copies: Sequence[Copy] = ()) -> tuple[Layers, list[list[int]]]:
        """The layers of some stacks, and of each stack the numbers of these, topmost first, with the base.

        Args:
            copies: of layers that are not in the store.

        Raises:
            Failed: one cannot be had.
        """
        layers = {layer.digest: layer for stack in stacks for layer in reversed(stack.layers)}
        given = {copy.digest: copy for copy in copies}
        needed = [given.get(digest) or self._copy(layer) for digest, layer in layers.items()]
        try:
            job = self._workers.submit(
                parts.open_layers, self._fds, self._workers, needed, lambda digest: layers[digest]
            )
            roots = job.result()
        except Refused as error:
            raise Failed(str(error))
        numbers = {digest: number for number, digest in enumerate(layers)}
        user = self.user
        found = Layers(
            [*(roots[digest] for digest in layers), self.parts.base],
            privileged=may_mount(),
            may_search=lambda fd: user is None or may_search(user, fd),
        )
        orders = [[*(numbers[digest] for digest in reversed(stack.digests)), len(layers)] for stack in stacks]
        return found, orders

    def _copy(self, layer: Layer) -> Copy:
        try:
            return stored(self._settings.state_directory, layer.digest)
        except FileNotFoundError:
            raise Failed(f"the copy of {layer.label} ({layer.digest[:12]}) is gone from the store")
        except Refused as error:
            raise Failed(f"the copy of {layer.label} ({layer.digest[:12]}) in the store is damaged: {error}")

    def layers(self, stack: Stack) -> tuple[TracedLayer, ...]:
        """What is known of the layers of a stack that the service has, bottom to top. Raises LedgerError."""
        placed = Reader(self._settings.state_directory).placed
        when = {one.stack.id: placed(self.name, one.stack.id) or one.when for one in self.kept}
        stacks = [one.stack for one in self.kept]
        at = next((count for count, one in enumerate(stacks) if one.id == stack.id), len(stacks))
        return tuple(_traced(layer, _since(layer.digest, stacks[at:], when)) for layer in stack.layers)


def _since(digest: str, stacks: Sequence[Stack], when: dict[str, int]) -> int | None:
    """Since when the service has a layer without a break, as far as stacks are kept, newest first."""
    since = None
    for stack in stacks:
        if digest not in stack.digests:
            break
        since = when[stack.id]
    return since


def _traced(layer: Layer, since: int | None) -> TracedLayer:
    kind = layer.kind.value
    return TracedLayer(
        layer.name, layer.version, layer.digest, kind, layer.slot, layer.source, layer.trust, since
    )


@contextlib.contextmanager
def subject(settings: Settings, service: str, user: User | None = None) -> Iterator[Subject]:
    """Look at a service, for a user or for root. What was opened is closed after the block.

    Raises:
        ServiceNotFound: it was never started here.
        Failed: this user may not, or its `/etc` cannot be taken apart.
        OSError: the kernel refuses.
    """
    if os.geteuid() != 0:
        raise Failed(
            "only root may: it reads the store of images, and enters the service's mount namespace. Use sudo"
        )
    with contextlib.ExitStack() as held:
        name, manager, main = _service(settings, service, held)
        kept = status.kept_stacks(settings.state_directory, slots_of(name, manager))
        drifted = status.drift(status.state_of(settings.state_directory, name, manager))
        if os.path.isdir(f"{settings.state_directory}/store"):
            # What is looked at is not collected meanwhile.
            names = held.enter_context(contextlib.closing(Names(f"{settings.state_directory}/store")))
            held.enter_context(names.hold(wait=True))
        workers = held.enter_context(MountWorkers(privileged=may_mount()))
        fds = held.enter_context(Descriptors())
        try:
            state, found = workers.submit(_look, fds, workers, main).result()
        except (Moved, Refused, Elsewhere, WorkerLost) as error:
            raise Failed(f"{shown(name)}: {error}")
        one = Subject(name, state, Stack(), kept, drifted, found, user, settings, workers, fds)
        yield replace(one, stack=_shown(one))


def _shown(one: Subject) -> Stack:
    """The stack that a service is on, or the one that its next start gets."""
    stacks = [accepted.stack for accepted in one.kept]
    if one.parts.table is None:
        return stacks[0] if stacks else Stack()
    mounted = one.parts.table.mounted()
    if mounted.layers is None and len(stacks) > 1:
        # systemd's overlay does not say. It is the newest as a rule, but what was accepted since may wait for a swap.
        return max(stacks, key=lambda stack: _agreement(one, stack))
    return Stack(status.shown_layers(mounted, stacks))


def _agreement(one: Subject, stack: Stack) -> int:
    """How much of what a stack does to the base a service shows; -1 if there is something that it does not."""
    mounts = Mounts(one.parts.table)
    count = 0
    try:
        layers, (order,) = one.opened(stack)
        for change in islice(changes(layers, order[-1:], order), _COMPARED_MAX):
            if change.path and not mounts.over("/".join((ETC, *change.path))):
                if not same(seen(one.parts, change.path), change.after and change.after.node):
                    return -1
                count += 1
    except (Failed, OSError):  # its copy is gone: it cannot be looked at
        return -1
    return count


def seen(found: Parts, path: Path) -> os.stat_result | None:
    """What a service has at a path below its `/etc`; None: nothing. Raises OSError."""
    if not path:
        return os.fstat(found.etc)
    fd = open_inside(found.etc, "/".join(path), os.O_PATH | os.O_NOFOLLOW)
    if fd is None:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def same(status: os.stat_result | None, node: Node | None) -> bool:
    """Whether what a service has is what a layer has."""
    if status is None or node is None:
        return status is None and node is None
    if node.type is Type.DIRECTORY:
        return status.st_mode == node.status.st_mode
    one, other = ((each.st_mode, each.st_size, each.st_mtime_ns) for each in (status, node.status))
    return one == other


def _service(settings: Settings, service: str, held: contextlib.ExitStack) -> tuple[str, str, Process | None]:
    names = []
    for name, manager, main, *_ in status.known_services(settings, held):
        if service in (name, name.removesuffix(".service")):
            return name, manager, main
        names.append(name)
    raise ServiceNotFound.among(service, names)


def _look(fds: Descriptors, workers: MountWorkers, main: Process | None) -> tuple[str, Parts]:
    """Runs inside `MountWorkers.call()`."""
    try:
        alive = main is not None and main.alive()
        home = alive and main is not None and not shares_host(main.pid) and main.at_home()
    except FileNotFoundError:
        alive = home = False
    if not home or main is None:
        return "needs-restart" if alive else "stopped", parts.of_host(fds)
    try:
        return "running", parts.of_service(fds, workers, fds.add(main.namespace()))
    except Gone:
        return "stopped", parts.of_host(fds)


class Mounts:
    """What is mounted below the `/etc` of a service, and is not its stack."""

    def __init__(self, table: Table | None) -> None:
        self._foreign: dict[str, str] = {}
        if table is not None:
            own = table.top.device
            for mount in table.above(table.top):
                if (mount.device, mount.root) != (own, mount.point.removeprefix(ETC)):
                    self._foreign[mount.point] = _named(mount)

    def over(self, path: str) -> str:
        """What is mounted at a path or above it, "" if nothing is."""
        at = path
        while self._foreign and at != "/":
            if at in self._foreign:
                return f"{self._foreign[at]} on {at}"
            at = os.path.dirname(at)
        return ""


def _named(mount: Mount) -> str:
    root = "" if mount.root == "/" else f" ({mount.root})"
    return f"{mount.fstype}{root}"
