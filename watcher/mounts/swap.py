# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap: put a stack on `/etc` in one mount namespace, atomically, and keep what the sandbox mounted below it.

The steps, each of which leaves the service a complete old or a complete new `/etc` whatever kills us:

1. Enter; read the mount table; clone `/etc` with all that is mounted on it, and what the base can be had from; make the
   clones private at once. (A service's mounts are a peer group and a clone joins it: what is then mounted in the
   service would appear in the clone, and taking the clone apart would take it from the service.)
2. In the workshop: attach the clones, take the sandbox mounts out of one and the base out of the other. Make the
   overlay, hang the sandbox mounts into it, clone the finished tree.
3. Enter again; if `/etc` is what it was, mount the tree beneath the old stack and lift the old one off. Where the top
   must stay, or nothing is mounted, mounting it on top is the atomic step, and nothing is lifted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from watcher.model import Copy, Refused, Stack, stack_id
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
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
from watcher.mounts.table import (
    COVER,
    LAYERS,
    LAYERS_MAX,
    SOURCE,
    Mount,
    Mounted,
    Table,
    base_of,
    layer_path,
    layers_of,
)
from watcher.mounts.workshop import Workshop

# In the working directory: clones of the service's `/`, whose `etc` is the base, and of its `/etc`; where the new stack
# is put together.
_ROOT, _OLD, _NEW = "root", "old", "new"
_BASE = f"{_ROOT}/etc"

_FIRST = ("ro", "nosuid", "nodev")
"""What a stack has besides the flags of the `/etc` that it is put on."""


class Moved(Exception):
    """`/etc` of the service kept changing while a stack was put together for it: look again."""


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
    shop: Workshop,
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
    with shop.attending(namespace):
        for _ in range(5):
            with contextlib.suppress(Moved):
                return _swap_once(_Job(shop, namespace, stack, copies), begin, keep)
    raise Moved("/etc kept changing while its stack was put together")


def read_table(shop: Workshop, namespace: int) -> Table:
    """The mount table of a namespace, from inside: /proc/PID/mountinfo of a process that has changed its root shows
    nothing. Runs on a worker."""
    with shop.entered(namespace):
        mountinfo = shop.open_mountinfo()
        try:
            return Table(_read(mountinfo))
        finally:
            os.close(mountinfo)


@contextlib.contextmanager
def build(shop: Workshop, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> Iterator[int]:
    """A descriptor of the detached tree that a swap would put on `/etc`, for use during the block. Runs on a worker.

    Raises:
        Whatever `swap()` does.
    """
    job = _Job(shop, namespace, stack, copies)
    with shop.attending(namespace), Descriptors() as fds:
        survey = _survey(fds, job, lambda _: True)
        with shop.images.attached(copies[digest] for digest in stack.digests) as roots, shop.bench():
            tree, _ = _build(fds, job, survey, roots)
            yield tree


@dataclass(frozen=True, slots=True)
class _Job:
    shop: Workshop
    namespace: int
    stack: Stack
    copies: Mapping[str, Copy]

    def __post_init__(self) -> None:
        if len(self.stack.layers) > LAYERS_MAX:
            raise Refused(
                f"a stack of {len(self.stack.layers)} layers is more than overlayfs takes:"
                f" {LAYERS_MAX} are allowed, join or remove some"
            )


@dataclass(slots=True)
class _Survey:
    """What was found at the first look.

    Attributes:
        table: the mount table.
        mountinfo: descriptor of it, which tells when it has changed.
        etc: descriptor of a clone of `/etc` with all on it, -1 if nothing lies below it.
        root: descriptor of a clone of `/`.
        peel: how many overlays hide the base in that.
    """

    table: Table
    mountinfo: int
    etc: int = -1
    root: int = -1
    peel: int = 0
    poll: select.poll = field(default_factory=select.poll)

    def __post_init__(self) -> None:
        self.poll.register(self.mountinfo, select.POLLPRI)

    def still_holds(self) -> bool:
        """Whether nothing below `/etc` has changed since."""
        return not self.poll.poll(0) or self.table.same_etc(Table(_read(self.mountinfo)))


def _swap_once(job: _Job, begin: Callable[[], None], keep: Callable[[Mounted], bool]) -> Swapped:
    start = time.perf_counter_ns()
    before = Mounted()
    lifts = 0

    def needed(table: Table) -> bool:
        nonlocal before, lifts
        before = table.mounted()
        if keep(before):
            return False
        lifts = _only_lift(table, job.stack)
        return not lifts and bool(job.stack.layers or table.stacks)

    def swapped(*, done: bool, remarks: Sequence[str] = ()) -> Swapped:
        return Swapped(before, done, (time.perf_counter_ns() - start) // 1000, tuple(remarks))

    with Descriptors() as fds:
        survey = _survey(fds, job, needed)
        if lifts:
            begin()
            with job.shop.entered(job.namespace):
                _require(survey)
                _lift(lifts)
            return swapped(done=True)
        if survey.root < 0:
            return swapped(done=False)
        copies = [job.copies[digest] for digest in job.stack.digests]
        with job.shop.images.attached(copies) as roots, job.shop.bench():
            tree, remarks = _build(fds, job, survey, roots)
            begin()
            with job.shop.entered(job.namespace):
                _require(survey)
                _put(tree, survey.table)
            return swapped(done=True, remarks=remarks)


def _survey(fds: Descriptors, job: _Job, needed: Callable[[Table], bool]) -> _Survey:
    """The first look at a namespace; with the clones if `needed()` by its mount table."""
    with job.shop.entered(job.namespace):
        mountinfo = fds.add(job.shop.open_mountinfo())
        survey = _Survey(Table(_read(mountinfo)), mountinfo)
        table = survey.table
        if needed(table):
            if not table.chain:
                _require_directory()
            if table.on(table.top):
                survey.etc = _clone(fds, "/etc", syscalls.AT_RECURSIVE)
            if table.base_on_root:
                with contextlib.suppress(_Locked):
                    survey.root = _clone(fds, "/", 0)
            if survey.root < 0:
                survey.root = _clone(fds, "/", syscalls.AT_RECURSIVE)
                survey.peel = len(table.stacks)
    return survey


class _Locked(Exception):
    """What is mounted on it came with it from a more privileged namespace, and cannot be left out of a clone."""


def _clone(fds: Descriptors, path: str, recursive: int) -> int:
    """In the service: a private clone of the mount at a path."""
    try:
        tree = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | recursive)
    except OSError as error:
        if not recursive and error.errno == errno.EINVAL:  # mount_namespaces(7)
            raise _Locked from error
        raise
    fds.add(tree)
    syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH | recursive, propagation=syscalls.MS_PRIVATE)
    return tree


def _read(mountinfo: int) -> str:
    os.lseek(mountinfo, 0, os.SEEK_SET)
    parts = []
    while part := os.read(mountinfo, 1 << 16):
        parts.append(part)
    return os.fsdecode(b"".join(parts))


def _require_directory() -> None:
    """In the service: mounting on a link would mount on what it leads to, wherever that is."""
    try:
        mode = os.lstat("/etc").st_mode
    except FileNotFoundError:
        raise Refused("the service's root has no /etc: make it a directory") from None
    if not stat.S_ISDIR(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
        raise Refused(f"/etc in the service's root is {what}: only a directory can carry a stack")


def _only_lift(table: Table, stack: Stack) -> int:
    """How many overlays to lift where that is all there is to do, else 0."""
    for count in range(1, table.surplus + 1):
        hidden = table.stacks[-1 - count]
        if _identity(hidden) == stack.id and base_of(hidden) in (table.base_path, None):
            return count
    everything = len(table.stacks)
    if not stack.layers and table.liftable == everything and table.carries(table.beneath, table.top):
        return everything
    return 0


def _identity(mount: Mount) -> str | None:
    layers = layers_of(mount)
    return None if layers is None else stack_id(layer.digest for layer in layers)


def _require(survey: _Survey) -> None:
    """In the service: `/etc` must still be what the stack was made for."""
    if not survey.still_holds():
        raise Moved


def _put(tree: int, table: Table) -> None:
    """In the service: the atomic step."""
    flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH
    if not table.liftable:
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags)
        return
    _lift(table.surplus)
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags | syscalls.MOVE_MOUNT_BENEATH)
    _lift(1)


def _lift(count: int) -> None:
    for _ in range(count):
        syscalls.umount2("/etc", syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


def _build(fds: Descriptors, job: _Job, survey: _Survey, roots: Mapping[str, str]) -> tuple[int, list[str]]:
    """On the bench: the finished tree, as a descriptor of a detached mount; and remarks."""
    privileged = job.shop.privileged
    for directory in (_ROOT, COVER, LAYERS):
        os.mkdir(directory, 0o755)
    _attach(survey.root, _ROOT)
    for _ in range(survey.peel):
        syscalls.umount2(_BASE, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    copy_attributes(_BASE, COVER, privileged=privileged)
    mounts: list[Sandbox] = []
    remarks: list[str] = []
    if survey.etc >= 0:
        os.mkdir(_OLD)
        _attach(survey.etc, _OLD)
        etcs = [f"{roots[layer.digest]}/etc" for layer in reversed(job.stack.layers)]
        lower = Lower(fds, [*etcs, _BASE])
        mounts, remarks = gather(fds, survey.table, _OLD, lower)
        make_cover(mounts, lower, privileged=privileged)
    base = _link(survey.table.base_path, _BASE)
    paths = [
        _link(layer_path(one.name, one.version, one.digest), f"{roots[one.digest]}/etc")
        for one in job.stack.layers
    ]
    overlay = fds.add(_overlay([COVER, *reversed(paths), base], _flags(survey.table), privileged=privileged))
    if not mounts:
        return overlay, remarks
    os.mkdir(_NEW)
    _attach(overlay, _NEW)
    renew(mounts, overlay, fds)
    hang(mounts, overlay)
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | syscalls.AT_EMPTY_PATH
    return fds.add(syscalls.open_tree(overlay, "", flags)), remarks


def _attach(tree: int, path: str) -> None:
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, path, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def _link(path: str, target: str) -> str:
    # Overlayfs follows the link and shows the path as it was given: a name at the price of a link, not of a mount.
    os.symlink(target, path)
    return path


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
        if not privileged:
            syscalls.fsconfig_set_flag(context, "userxattr")
        syscalls.fsconfig_cmd_create(context, "overlay")
        return syscalls.fsmount(context, flags)
    finally:
        os.close(context)
