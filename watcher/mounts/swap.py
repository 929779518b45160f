# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap: put a stack on `/etc` in one mount namespace, atomically, and keep what the sandbox mounted below it.

The steps, after each of which the service has a complete old or a complete new `/etc`, even if we are killed:

1. Enter; read the mount table; open `/etc`; clone it with all that is mounted on it, and clone the mount that has the
   base; make the clones private at once. (The mounts of a service are a peer group, which a clone joins: what is then
   mounted in the service would appear in the clone, and unmounting the clone would unmount it in the service.)
2. Come back: attach the clones in a scratch tmpfs, take the sandbox mounts out of one and the base out of the other.
   Make the overlay, mount the sandbox mounts on it, clone the finished tree.
3. Enter again; if `/etc` is what it was, mount the tree beneath the old stack and lift the old one off. Where the top
   must stay, or nothing is mounted, mounting the tree on top is the atomic step, and nothing is lifted.

In the service's tree every step goes by descriptor (`etc.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from watcher.model import Copy, Layer, Refused, Stack, stack_id
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Etc, Moved, clone, hold, lift, look_up, mount_on, open_etc, unmount
from watcher.mounts.mountinfo import mounts
from watcher.mounts.sandbox import Cover, Lower, Sandbox, attributes, gather, put_on, renew
from watcher.mounts.survey import Survey, read_own, survey
from watcher.mounts.table import (
    COVER,
    LAYERS,
    LAYERS_MAX,
    SOURCE,
    Mounted,
    Table,
    base_of,
    layer_path,
    layers_of,
)
from watcher.mounts.workers import MountWorkers

# In the scratch tmpfs: the clone that has the base, the clone of the service's `/etc`, and the new stack.
_ROOT, _OLD, _NEW = "root", "old", "new"

_FIRST = ("ro", "nosuid", "nodev")
"""Flags of a service's first stack, besides those of the `/etc` that it is put on."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a swap found and did.

    Attributes:
        before: what `/etc` showed.
        done: False if `/etc` was left as it was.
        usec: from the first look at the namespace to the new `/etc`, microseconds.
        remarks: for the administrator, about mounts below `/etc`, one line each.
    """

    before: Mounted
    done: bool
    usec: int
    remarks: tuple[str, ...] = ()


def swap(
    workers: MountWorkers,
    namespace: int,
    stack: Stack,
    copies: Mapping[str, Copy],
    begin: Callable[[], None] = lambda: None,
    keep: Callable[[Mounted], bool] = lambda _: False,
) -> Swapped:
    """Put a stack on `/etc`. Runs inside `MountWorkers.call()`.

    Args:
        namespace: descriptor of the service's mount namespace.
        stack: an empty one uncovers what `/etc` is without us.
        copies: the store's copy of each layer, by digest.
        begin: called when all is ready, before the service can see anything of it.
        keep: whether to leave what is found as it is. Called inside the service's namespace: nothing but computing.

    Raises:
        HostNamespace: the namespace is the host's, or ours.
        Moved: `/etc` kept changing meanwhile.
        Refused: an image cannot be mounted, there are too many, or `/etc` is no directory.
        OSError: the kernel refused; `/etc` is what it was, or (killed or failed between beneath and lift) complete.
    """
    with workers.attending(namespace):
        for _ in range(5):
            with contextlib.suppress(Moved):
                return _swap_once(_Goal(workers, namespace, stack, copies), begin, keep)
    raise Moved("/etc kept changing while its stack was put together")


@contextlib.contextmanager
def build(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> Iterator[int]:
    """A descriptor of the detached tree that a swap would put on `/etc`, for the block.

    Runs inside `MountWorkers.call()`. Raises whatever `swap()` does.
    """
    goal = _Goal(workers, namespace, stack, copies)
    with workers.attending(namespace), Descriptors() as fds:
        found = survey(fds, workers, namespace, lambda _: True)
        with _built(fds, goal, found) as (tree, _):
            yield tree


def shadow(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> int:
    """A descriptor of a shadow: a temporary copy of a mount namespace with another stack, for trying that stack.

    The copy is made private before anything is mounted in it, so that nothing reaches the service. The kernel removes
    it when its last descriptor is closed and the last process in it ends. Runs inside `MountWorkers.call()`.

    Raises:
        Whatever `swap()` does.
    """
    with build(workers, namespace, stack, copies) as tree, Descriptors() as fds, workers.entered(namespace):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        mount_on(tree, fds.add(look_up()))
        return workers.own_namespace()


@dataclass(frozen=True, slots=True)
class _Goal:
    workers: MountWorkers
    namespace: int
    stack: Stack
    copies: Mapping[str, Copy]

    def __post_init__(self) -> None:
        if len(self.stack.layers) > LAYERS_MAX:
            raise Refused(
                f"a stack of {len(self.stack.layers)} layers is more than overlayfs takes:"
                f" {LAYERS_MAX} are allowed, join or remove some"
            )


def _swap_once(goal: _Goal, begin: Callable[[], None], keep: Callable[[Mounted], bool]) -> Swapped:
    start = time.perf_counter_ns()
    before = Mounted()
    lifts = 0

    def needed(table: Table) -> bool:
        nonlocal before, lifts
        before = _identified(table)
        if keep(before):
            return False
        lifts = _only_lift(table, goal.stack)
        return not lifts and bool(goal.stack.layers or table.stacks)

    def swapped(*, done: bool, remarks: Sequence[str] = ()) -> Swapped:
        return Swapped(before, done, (time.perf_counter_ns() - start) // 1000, tuple(remarks))

    with Descriptors() as fds:
        found = survey(fds, goal.workers, goal.namespace, needed)
        if lifts:
            begin()
            with goal.workers.entered(goal.namespace):
                found.require()
                lift(found.table.uppermost(lifts))
            return swapped(done=True)
        if found.etc is None:
            return swapped(done=False)
        with _built(fds, goal, found) as (tree, remarks):
            begin()
            with goal.workers.entered(goal.namespace):
                found.require()
                _put(fds, tree, found.etc, found.table)
            return swapped(done=True, remarks=remarks)


def _identified(table: Table) -> Mounted:
    """In the service: what `/etc` shows, with `Mounted.mount`."""
    mounted = table.mounted()
    if mounted.made_on is not None:
        return mounted
    with Descriptors() as fds:
        return replace(mounted, mount=syscalls.unique_mount_id(hold(fds, table.top).fd))


def _only_lift(table: Table, stack: Stack) -> int:
    """How many overlays to lift, if nothing else is to be done; else 0."""
    for count in range(1, table.surplus + 1):
        hidden = table.stacks[-1 - count]
        hidden_id = stack_id(layer.digest for layer in layers_of(hidden) or ())
        if hidden_id == stack.id and base_of(hidden) in (table.base_path, None):
            return count
    everything = len(table.stacks)
    if not stack.layers and table.liftable == everything and table.carries(table.beneath, table.top):
        return everything
    return 0


def _put(fds: Descriptors, tree: int, etc: Etc, table: Table) -> None:
    """In the service: the atomic step, and the lift."""
    if not table.liftable:
        mount_on(tree, etc.fd)
        try:
            if hold(fds).mount != syscalls.mount_id("", tree):
                raise Moved
        except (Moved, Refused):
            unmount(tree)  # the directory is not `/etc` any more
            raise
        return
    *surplus, old = table.uppermost(table.surplus + 1)
    lift(surplus)
    if surplus:
        etc = hold(fds, old)
    mount_on(tree, etc.fd, syscalls.MOVE_MOUNT_BENEATH)
    lift([old])


@contextlib.contextmanager
def _built(fds: Descriptors, goal: _Goal, found: Survey) -> Iterator[tuple[int, list[str]]]:
    """The finished tree, as a descriptor of a detached mount, and remarks; in a scratch tmpfs."""
    copies = [goal.copies[digest] for digest in goal.stack.digests]
    with goal.workers.images.attached(copies) as roots, goal.workers.scratch():
        yield _build(fds, goal, found, roots)


def _build(fds: Descriptors, goal: _Goal, found: Survey, roots: Mapping[str, str]) -> tuple[int, list[str]]:
    for directory in (_ROOT, _OLD, _NEW, LAYERS):
        os.mkdir(directory)
    base = attach_base(fds, found)
    etcs = [open_layer(fds, layer, roots[layer.digest]) for layer in goal.stack.layers]
    lower = Lower([*reversed(etcs), base])
    cover = Cover(lower, privileged=goal.workers.privileged)
    sandbox: list[Sandbox] = []
    remarks: list[str] = []
    if found.old >= 0:
        _attach(found.old, _OLD)
        if not found.table.chain:
            _require_same_mounts(goal, found.table)
        sandbox, remarks = gather(fds, found.table, found.old, lower)
        cover.fill(sandbox)
    names = [layer_path(one.name, one.version, one.digest) for one in goal.stack.layers]
    for path, fd in zip((*names, found.table.base_path), (*etcs, base), strict=True):
        # Overlayfs follows the link, and repeats the path as it was given: no mount is needed for the name.
        os.symlink(f"/proc/self/fd/{fd}", path)
    paths = [COVER, *reversed(names), found.table.base_path]
    options = found.table.top.options
    flags = attributes(options if found.table.stacks else (*options, *_FIRST))
    overlay = fds.add(_overlay(paths, flags, privileged=goal.workers.privileged))
    if not sandbox:
        return overlay, remarks
    _attach(overlay, _NEW)
    renew(fds, sandbox, overlay)
    put_on(sandbox, overlay)
    tree, _ = clone(fds, overlay, whole=True)
    return tree, remarks


def attach_base(fds: Descriptors, found: Survey) -> int:
    """In the scratch tmpfs: a descriptor of the base."""
    _attach(found.root, _ROOT)
    if not found.table.stacks:
        return found.root
    try:
        if not found.peel:
            return open_etc(fds, found.root, syscalls.RESOLVE_NO_XDEV)
        scratch = fds.add(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        for mount in found.peel:
            top = open_etc(fds, found.root)
            if _device(top) != mount.device:
                raise Moved
            unmount(top)
        os.fchdir(scratch)
        return open_etc(fds, found.root)
    except NotADirectoryError:
        raise Moved from None


def _require_same_mounts(goal: _Goal, table: Table) -> None:
    """In the scratch tmpfs: the mounts on the `/etc` that was cloned are those of the mount table.

    While nothing is mounted on `/etc` itself, the service can have exchanged it for another directory in between.
    """
    place = f"{os.getcwd()}/{_OLD}/"
    rows = (line for line in read_own(goal.workers).split("\n") if place in line)
    attached = (mount.point for mount in mounts(rows))
    mounted = sorted(point.replace(place, "/etc/", 1) for point in attached if point.startswith(place))
    if mounted != table.points_on(table.top):
        raise Moved


def _device(directory: int) -> str:
    number = os.fstat(directory).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def open_layer(fds: Descriptors, layer: Layer, root: str) -> int:
    """A descriptor of the `etc` of a layer, which may be a link: whoever made the layer decides that."""
    directory = fds.add(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        return open_etc(fds, directory, syscalls.RESOLVE_NO_XDEV)
    except NotADirectoryError:
        raise Refused(f"{layer.label}: etc in it is no directory") from None


def _attach(tree: int, path: str) -> None:
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, path, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def _overlay(lower: Sequence[str], flags: int, *, privileged: bool) -> int:
    """A detached overlay mount of these relative paths, topmost first; mountinfo repeats them."""
    context = syscalls.fsopen("overlay")
    try:
        syscalls.fsconfig_set_string(context, "source", SOURCE)
        for path in lower:
            syscalls.fsconfig_set_string(context, "lowerdir+", path)
        # Marks in a layer could lead to other files of the base, also to those that the sandbox hides.
        syscalls.fsconfig_set_string(context, "redirect_dir", "nofollow")
        syscalls.fsconfig_set_string(context, "metacopy", "off")
        if not privileged:
            syscalls.fsconfig_set_flag(context, "userxattr")
        syscalls.fsconfig_cmd_create(context, "overlay")
        return syscalls.fsmount(context, flags)
    finally:
        os.close(context)
