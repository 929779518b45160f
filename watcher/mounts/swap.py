# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap: put a stack on `/etc` in one mount namespace, atomically, and keep what the sandbox mounted below it.

The steps, each of which leaves the service a complete old or a complete new `/etc` whatever kills us:

1. Enter; read the mount table; open `/etc`; clone it with all that is mounted on it, and what the base can be had
   from; make the clones private at once. (A service's mounts are a peer group and a clone joins it: what is then
   mounted in the service would appear in the clone, and taking the clone apart would take it from the service.)
2. In the workshop: attach the clones, take the sandbox mounts out of one and the base out of the other. Make the
   overlay, hang the sandbox mounts into it, clone the finished tree.
3. Enter again; if `/etc` is what it was, mount the tree beneath the old stack and lift the old one off. Where the top
   must stay, or nothing is mounted, mounting it on top is the atomic step, and nothing is lifted.

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
from watcher.mounts.etc import Etc, Moved, hold, lift, open_etc, unmount
from watcher.mounts.sandbox import (
    Lower,
    Sandbox,
    attributes,
    copy_attributes,
    gather,
    hang,
    make_cover,
    renew,
)
from watcher.mounts.survey import Survey, read_rows, survey
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

# In the working directory: clones of what the base is or lies in, and of the service's `/etc`; where the new stack is
# put together.
_ROOT, _OLD, _NEW = "root", "old", "new"

_FIRST = ("ro", "nosuid", "nodev")
"""What a stack has besides the flags of the `/etc` that it is put on."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a swap found and did.

    Attributes:
        before: what `/etc` showed.
        done: False if `/etc` was left as it was.
        usec: from the first look at the namespace to the new `/etc`, microseconds.
        remarks: what an administrator may want to know about the mounts below `/etc`, one line each.
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
    """Put a stack on `/etc`. Runs on a worker of the workshop.

    Args:
        namespace: descriptor of the service's mount namespace.
        stack: bottom to top; an empty one uncovers what `/etc` is without us.
        copies: the store's copy of each layer, by digest.
        begin: called once all is ready, before the service can see anything of it.
        keep: whether to leave what is found as it is. Called inside the service's namespace: nothing but computing.

    Raises:
        HostNamespace: it is not the service's own.
        Moved: it kept changing under our hands.
        Refused: an image cannot be mounted, there are too many, or `/etc` is no directory.
        OSError: the kernel refused; `/etc` is what it was, or (killed or failed between beneath and lift) complete.
    """
    with workers.attending(namespace):
        for _ in range(5):
            with contextlib.suppress(Moved):
                return _swap_once(_Job(workers, namespace, stack, copies), begin, keep)
    raise Moved("/etc kept changing while its stack was put together")


@contextlib.contextmanager
def build(workers: MountWorkers, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> Iterator[int]:
    """A descriptor of the detached tree that a swap would put on `/etc`, for use during the block. Runs on a worker.

    Raises:
        Whatever `swap()` does.
    """
    job = _Job(workers, namespace, stack, copies)
    with workers.attending(namespace), Descriptors() as fds:
        found = survey(fds, job.workers, job.namespace, lambda _: True)
        with workers.images.attached(copies[digest] for digest in stack.digests) as roots, workers.scratch():
            tree, _ = _build(fds, job, found, roots)
            yield tree


@dataclass(frozen=True, slots=True)
class _Job:
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


def _swap_once(job: _Job, begin: Callable[[], None], keep: Callable[[Mounted], bool]) -> Swapped:
    start = time.perf_counter_ns()
    before = Mounted()
    lifts = 0

    def needed(table: Table) -> bool:
        nonlocal before, lifts
        before = _identified(table)
        if keep(before):
            return False
        lifts = _only_lift(table, job.stack)
        return not lifts and bool(job.stack.layers or table.stacks)

    def swapped(*, done: bool, remarks: Sequence[str] = ()) -> Swapped:
        return Swapped(before, done, (time.perf_counter_ns() - start) // 1000, tuple(remarks))

    with Descriptors() as fds:
        found = survey(fds, job.workers, job.namespace, needed)
        if lifts:
            begin()
            with job.workers.entered(job.namespace):
                found.require()
                lift(found.table.uppermost(lifts))
            return swapped(done=True)
        if found.etc is None:
            return swapped(done=False)
        copies = [job.copies[digest] for digest in job.stack.digests]
        with job.workers.images.attached(copies) as roots, job.workers.scratch():
            tree, remarks = _build(fds, job, found, roots)
            begin()
            with job.workers.entered(job.namespace):
                found.require()
                _put(fds, tree, found.etc, found.table)
            return swapped(done=True, remarks=remarks)


def _identified(table: Table) -> Mounted:
    """In the service: what `/etc` shows, with `Mounted.mount`."""
    mounted = table.mounted()
    if mounted.made_on is not None:
        return mounted
    with Descriptors() as fds:
        etc = hold(fds)
        if etc.mount != table.top.id:
            raise Moved
        return replace(mounted, mount=syscalls.unique_mount_id(etc.fd))


def _only_lift(table: Table, stack: Stack) -> int:
    """How many overlays to lift where that is all there is to do, else 0."""
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
    """In the service: the atomic step."""
    flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
    if not table.liftable:
        syscalls.move_mount(tree, "", etc.fd, "", flags)
        try:
            if hold(fds).mount != syscalls.mount_id("", tree):
                raise Moved
        except (Moved, Refused):
            unmount(tree)  # the directory is not `/etc` any more
            raise
        return
    surplus = table.surplus
    *above, old = table.uppermost(surplus + 1)
    lift(above)
    if surplus:
        etc = hold(fds)
        if etc.mount != old.id:
            raise Moved
    syscalls.move_mount(tree, "", etc.fd, "", flags | syscalls.MOVE_MOUNT_BENEATH)
    lift([old])


def _build(fds: Descriptors, job: _Job, found: Survey, roots: Mapping[str, str]) -> tuple[int, list[str]]:
    """On the bench: the finished tree, as a descriptor of a detached mount; and remarks."""
    privileged = job.workers.privileged
    for directory in (_ROOT, COVER, LAYERS):
        os.mkdir(directory, 0o755)
    base = _attach_base(fds, found)
    etcs = [_open_layer(fds, layer, roots[layer.digest]) for layer in job.stack.layers]
    copy_attributes(base, COVER, privileged=privileged)
    mounts: list[Sandbox] = []
    remarks: list[str] = []
    if found.old >= 0:
        os.mkdir(_OLD)
        _attach(found.old, _OLD)
        if not found.table.chain:
            _require_same_mounts(job, found.table)
        lower = Lower([*reversed(etcs), base])
        mounts, remarks = gather(fds, found.table, found.old, lower)
        make_cover(mounts, lower, privileged=privileged)
    names = [layer_path(one.name, one.version, one.digest) for one in job.stack.layers]
    for path, fd in zip((*names, found.table.base_path), (*etcs, base), strict=True):
        # Overlayfs follows the link to the descriptor, and shows the path as it was given: a name at no mount's price.
        os.symlink(f"/proc/self/fd/{fd}", path)
    paths = [COVER, *reversed(names), found.table.base_path]
    overlay = fds.add(_overlay(paths, _flags(found.table), privileged=privileged))
    if not mounts:
        return overlay, remarks
    os.mkdir(_NEW)
    _attach(overlay, _NEW)
    renew(mounts, overlay, fds)
    hang(mounts, overlay)
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | syscalls.AT_EMPTY_PATH
    return fds.add(syscalls.open_tree(overlay, "", flags)), remarks


def _attach_base(fds: Descriptors, found: Survey) -> int:
    """On the bench: a descriptor of the base."""
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


def _require_same_mounts(job: _Job, table: Table) -> None:
    """On the bench: what is mounted below the `/etc` that was opened is what the mount table had there.

    As long as nothing is mounted on it, the service may have exchanged it for another directory in between.
    """
    mountinfo = job.workers.open_mountinfo()
    try:
        rows = read_rows(mountinfo).split("\n")
    finally:
        os.close(mountinfo)
    place = f"{os.getcwd()}/{_OLD}"
    points = (row.split(" ", 5)[4] for row in rows if row)
    mounted = sorted(point.replace(place, "/etc", 1) for point in points if point.startswith(f"{place}/"))
    if mounted != table.points_on(table.top):
        raise Moved


def _device(directory: int) -> str:
    number = os.fstat(directory).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def _open_layer(fds: Descriptors, layer: Layer, root: str) -> int:
    """A descriptor of what a layer brings for `/etc`; whoever made it may have made a link of that."""
    directory = fds.add(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        return open_etc(fds, directory, syscalls.RESOLVE_NO_XDEV)
    except NotADirectoryError:
        raise Refused(f"{layer.label}: etc in it is no directory") from None


def _attach(tree: int, path: str) -> None:
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, path, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def _flags(table: Table) -> int:
    options = table.top.options
    return attributes(options if table.stacks else (*options, *_FIRST))


def _overlay(lower: Sequence[str], flags: int, *, privileged: bool) -> int:
    """A detached overlay mount; `lower` topmost first, relative paths, which mountinfo then repeats."""
    context = syscalls.fsopen("overlay")
    try:
        syscalls.fsconfig_set_string(context, "source", SOURCE)
        for path in lower:
            syscalls.fsconfig_set_string(context, "lowerdir+", path)
        # Who made a layer may have left marks in it that lead to other files of the base, past what the sandbox hides.
        syscalls.fsconfig_set_string(context, "redirect_dir", "nofollow")
        syscalls.fsconfig_set_string(context, "metacopy", "off")
        if not privileged:
            syscalls.fsconfig_set_flag(context, "userxattr")
        syscalls.fsconfig_cmd_create(context, "overlay")
        return syscalls.fsmount(context, flags)
    finally:
        os.close(context)
