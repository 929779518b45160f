# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap: put a stack on `/etc` in one mount namespace, atomically, and keep what the sandbox mounted below it.

The steps, each of which leaves the service a complete old or a complete new `/etc` whatever kills us:

1. Enter; read the mount table, clone `/` recursively, make the clone private at once. (A service's mounts are a peer
   group and a clone joins it: what is then mounted in the service would appear in the clone, and taking the clone
   apart would take it from the service.)
2. In the workshop: attach the clone, clone the sandbox mounts out of it, peel our stack off; `etc` of what is left is
   the base. Make the overlay, hang the clones into it, clone the finished tree.
3. Enter again; mount the tree beneath the old stack and lift the old one off. Where the top is not ours, or nothing is
   mounted, mounting it on top is the atomic step, and nothing is lifted.

**The cover.** Lifting an overlay off also disconnects what is mounted on it, and whoever still holds a directory of
it (its working directory, a descriptor) then sees the file that a sandbox mount had hidden. So a topmost layer
carries, at the place of each sandbox mount, an empty file of mode 000 or an empty opaque directory. It also gives
every mount a place to stand on in a stack that no longer has that path: one that vanished once would be lost for good.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from watcher.model import Copy, Stack, stack_id
from watcher.mounts import syscalls
from watcher.mounts.table import BASE, COVER, LAYERS, SOURCE, Mount, Mounted, Table, layer_path, layers_of
from watcher.mounts.workshop import Workshop

_CLONE = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE
_EMPTY = syscalls.AT_EMPTY_PATH
# Nothing on the way may be a link: the service may write to parts of what is walked here.
_INSIDE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS

# What systemd gives a stack of confexts (systemd-sysext(8), --noexec=), where there is no mount to take flags from.
_FIRST = ("ro", "nosuid", "nodev", "noexec", "relatime")

_FLAGS = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "nodiratime": syscalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}
# What a clone carries over and is then set anew; how access times are kept is one field of several bits.
_CLEARED = sum(_FLAGS.values()) | syscalls.MOUNT_ATTR_ATIME & ~syscalls.MOUNT_ATTR_NOATIME


class Moved(Exception):
    """`/etc` of the service kept changing while a stack was put together for it: look again."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a swap found and did.

    Attributes:
        before: what `/etc` showed.
        usec: from the first look at the namespace to the new `/etc`, microseconds.
        remarks: what an administrator may want to know about the mounts below `/etc`, one line each.
    """

    before: Mounted
    usec: int
    remarks: tuple[str, ...] = ()


def swap(shop: Workshop, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> Swapped:
    """Put a stack on `/etc`. Runs on a worker of the workshop.

    Args:
        namespace: descriptor of the service's mount namespace.
        stack: bottom to top; an empty one uncovers what `/etc` is without us.
        copies: the store's copy of each layer, by digest.

    Raises:
        HostNamespace: it is not the service's own.
        Moved: it kept changing under our hands.
        Refused: an image cannot be mounted.
        OSError: the kernel refused; `/etc` is what it was, or (killed or failed between beneath and lift) complete.
    """
    with shop.images.attached(copies[digest] for digest in stack.digests) as roots:
        for _ in range(5):
            with contextlib.suppress(Moved):
                return _swap_once(shop, namespace, stack, roots)
    raise Moved("/etc kept changing while its stack was put together")


@contextlib.contextmanager
def build(shop: Workshop, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> Iterator[int]:
    """A descriptor of the detached tree that a swap would put on `/etc`, for use during the block. Runs on a worker.

    Raises:
        Whatever `swap()` does, but Moved.
    """
    with shop.images.attached(copies[digest] for digest in stack.digests) as roots:
        text, root = _survey(shop, namespace)
        with shop.bench():
            tree, _ = _build(root, Table(text), stack, roots, privileged=shop.privileged)
            try:
                yield tree
            finally:
                os.close(tree)


def _survey(shop: Workshop, namespace: int) -> tuple[str, int]:
    """The mount table of a namespace, and a private recursive clone of its root."""
    with shop.entered(namespace):
        text = shop.mountinfo()
        root = syscalls.open_tree(syscalls.AT_FDCWD, "/", _CLONE)
        try:
            syscalls.mount_setattr(root, "", _EMPTY | syscalls.AT_RECURSIVE, propagation=syscalls.MS_PRIVATE)
        except BaseException:
            os.close(root)
            raise
    return text, root


def _swap_once(shop: Workshop, namespace: int, stack: Stack, roots: Mapping[str, str]) -> Swapped:
    start = time.perf_counter_ns()
    text, root = _survey(shop, namespace)
    table = Table(text)
    remarks: tuple[str, ...] = ()
    if lifts := _only_lift(table, stack):
        os.close(root)
        with shop.entered(namespace):
            _expect(table)
            _lift(lifts)
    elif stack.layers or table.stacks:
        with shop.bench():
            tree, remarks = _build(root, table, stack, roots, privileged=shop.privileged)
            try:
                with shop.entered(namespace):
                    _expect(table)
                    _put(tree, len(table.stacks))
            finally:
                os.close(tree)
    else:
        os.close(root)
    return Swapped(table.mounted(), (time.perf_counter_ns() - start) // 1000, remarks)


def _only_lift(table: Table, stack: Stack) -> int:
    """How many overlays to lift where that is all there is to do, else 0."""
    stacks = table.stacks
    if len(stacks) > 1 and _identity(stacks[-2]) == stack.id:
        return 1  # killed between beneath and lift: what is wanted already lies beneath
    if stacks and not stack.layers:
        beneath = {row.point for row in table.below_etc(table.beneath)}
        if all(row.point in beneath for row in table.below_etc(table.top)):
            return len(stacks)
    return 0


def _identity(mount: Mount) -> str | None:
    layers = layers_of(mount)
    return None if layers is None else stack_id(layer.digest for layer in layers)


def _expect(table: Table) -> None:
    """In the service: `/etc` must still be what the stack was made for."""
    if syscalls.mount_id("/etc") != table.top.id:
        raise Moved


def _put(tree: int, stacks: int) -> None:
    """In the service: the atomic step."""
    flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH
    if not stacks:
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags)
        return
    # More than one: somebody was killed between beneath and lift. All of them are complete.
    _lift(stacks - 1)
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags | syscalls.MOVE_MOUNT_BENEATH)
    _lift(1)


def _lift(count: int) -> None:
    for _ in range(count):
        syscalls.umount2("/etc", syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


@dataclass(frozen=True, slots=True)
class _Sandbox:
    """A mount below `/etc` that has to be there after the swap too.

    Attributes:
        path: relative to `/etc`.
        clone: descriptor of its clone; None: it is a bind mount of the stack itself and is made anew from the new one.
        source: for one that is made anew, what it shows, relative to `/etc`.
        status: of its root.
    """

    path: str
    clone: int | None
    source: str
    options: tuple[str, ...]
    status: os.stat_result


def _build(
    root: int, table: Table, stack: Stack, roots: Mapping[str, str], *, privileged: bool
) -> tuple[int, tuple[str, ...]]:
    """On the bench: the finished tree, as a descriptor of a detached mount."""
    with contextlib.ExitStack() as fds:
        fds.callback(os.close, root)
        for directory in ("root", COVER, LAYERS, "new"):
            os.mkdir(directory, 0o755)
        syscalls.move_mount(root, "", syscalls.AT_FDCWD, "root", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        layers = [_open(fds, os.path.join(roots[layer.digest], "etc")) for layer in reversed(stack.layers)]
        kept, remarks = _kept(fds, table, layers)
        for _ in table.stacks:
            syscalls.umount2(BASE, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        base = _openat(fds, syscalls.AT_FDCWD, BASE, os.O_DIRECTORY)
        _make_cover(kept, [*layers, base], privileged=privileged)
        paths = [
            _link_layer(layer_path(one.name, one.version, one.digest), roots[one.digest])
            for one in stack.layers
        ]
        options = table.top.options if table.stacks else _FIRST
        overlay = _overlay([COVER, *reversed(paths), BASE], options, privileged=privileged)
        fds.callback(os.close, overlay)
        syscalls.move_mount(overlay, "", syscalls.AT_FDCWD, "new", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        for mount in kept:
            _hang(mount)
        return syscalls.open_tree(syscalls.AT_FDCWD, "new", _CLONE), remarks


def _open(fds: contextlib.ExitStack, path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fds.callback(os.close, fd)
    return fd


def _openat(fds: contextlib.ExitStack, dirfd: int, path: str, flags: int = 0) -> int:
    fd = syscalls.openat2(dirfd, path, os.O_PATH | flags, _INSIDE)
    fds.callback(os.close, fd)
    return fd


def _kept(
    fds: contextlib.ExitStack, table: Table, layers: Sequence[int]
) -> tuple[list[_Sandbox], tuple[str, ...]]:
    """The sandbox mounts of the service, out of the clone of its root while its stack is still on that."""
    kept = []
    remarks = []
    etc = _openat(fds, syscalls.AT_FDCWD, BASE, os.O_DIRECTORY)
    for row in _visible(table.below_etc(table.top)):
        path = row.point.removeprefix("/etc/")
        source = _own_source(row, table)
        if source is None and _shows_base(row, table.beneath) and any(_has(layer, path) for layer in layers):
            source = path
            remarks.append(
                f"{row.point}: the unit's mount there would hide what the stack brings: it shows the stack from now"
                " on, read-only, as it will after a restart"
            )
        fd = _openat(fds, etc, path)
        clone = None
        if source is None:
            clone = syscalls.open_tree(fd, "", _CLONE | _EMPTY)
            fds.callback(os.close, clone)
        kept.append(_Sandbox(path, clone, source or "", row.options, os.fstat(fd)))
    return kept, tuple(remarks)


def _visible(rows: Sequence[Mount]) -> Iterator[Mount]:
    """Without those that another one, mounted later at a path above, covers."""
    points = {row.point for row in rows}
    for row in rows:
        parents = row.point.split("/")
        if not any("/".join(parents[:depth]) in points for depth in range(3, len(parents))):
            yield row


def _own_source(row: Mount, table: Table) -> str | None:
    """For a bind mount of the old stack itself (`ReadWritePaths=`, `ReadOnlyPaths=`): what it shows, below `/etc`.

    Its clone would go on showing the old stack's files.
    """
    return row.root.lstrip("/") if table.stacks and row.device == table.top.device else None


def _shows_base(row: Mount, base: Mount) -> bool:
    """Whether it is a bind mount of the base's own directory on itself, made for the sake of its flags alone."""
    below = os.path.relpath(row.point, base.point)
    return row.device == base.device and row.root == os.path.normpath(os.path.join(base.root, below))


def _has(dirfd: int, path: str) -> bool:
    try:
        os.close(syscalls.openat2(dirfd, path, os.O_PATH, _INSIDE))
    except OSError:
        return False
    return True


def _make_cover(kept: Sequence[_Sandbox], below: Sequence[int], *, privileged: bool) -> None:
    """The topmost layer: an empty place for every sandbox mount; `below` are the other layers, topmost first."""
    for mount in kept:
        _make_parents(os.path.dirname(mount.path), below)
        place = f"{COVER}/{mount.path}"
        directory = stat.S_ISDIR(mount.status.st_mode)
        if mount.clone is None and any(_has(layer, mount.source) for layer in below):
            continue
        if not directory:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0))
            continue
        os.mkdir(place, 0)
        if mount.clone is None:
            os.chmod(place, stat.S_IMODE(mount.status.st_mode))
        else:
            os.setxattr(place, f"{'trusted' if privileged else 'user'}.overlay.opaque", b"y")


def _make_parents(path: str, below: Sequence[int]) -> None:
    """Directories of the cover that must look just like the ones they lie upon."""
    if not path or os.path.isdir(f"{COVER}/{path}"):
        return
    _make_parents(os.path.dirname(path), below)
    place = f"{COVER}/{path}"
    os.mkdir(place, 0o755)
    for layer in below:
        try:
            fd = syscalls.openat2(layer, path, os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        except OSError:  # not a directory there: the next layer shows through
            continue
        try:
            _copy_attributes(fd, place)
        finally:
            os.close(fd)
        return


def _copy_attributes(fd: int, place: str) -> None:
    status = os.fstat(fd)
    os.chown(place, status.st_uid, status.st_gid)
    os.chmod(place, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(fd):
        if ".overlay." not in name:
            os.setxattr(place, name, os.getxattr(fd, name))


def _link_layer(path: str, root: str) -> str:
    # Overlayfs follows the link and shows the path as it was given: a name at the price of a link, not of a mount.
    os.symlink(os.path.join(root, "etc"), path)
    return path


def _overlay(lower: Sequence[str], options: Sequence[str], *, privileged: bool) -> int:
    """A detached overlay mount; `lower` topmost first, relative paths, which mountinfo then repeats."""
    context = syscalls.fsopen("overlay")
    try:
        syscalls.fsconfig_set_string(context, "source", SOURCE)
        for path in lower:
            syscalls.fsconfig_set_string(context, "lowerdir+", path)
        if not privileged:
            syscalls.fsconfig_set_flag(context, "userxattr")
        syscalls.fsconfig_cmd_create(context, "overlay")
        return syscalls.fsmount(context, _attributes(options))
    finally:
        os.close(context)


def _attributes(options: Sequence[str]) -> int:
    attributes = 0
    for option in options:
        attributes |= _FLAGS.get(option, 0)
    if "noatime" not in options and "relatime" not in options:
        attributes |= syscalls.MOUNT_ATTR_STRICTATIME
    return attributes


def _hang(mount: _Sandbox) -> None:
    """Put one sandbox mount into the new overlay at `new`."""
    with contextlib.ExitStack() as fds:
        new = _openat(fds, syscalls.AT_FDCWD, "new", os.O_DIRECTORY)
        clone = mount.clone
        if clone is None:
            source = _openat(fds, new, mount.source if _has(new, mount.source) else mount.path)
            clone = syscalls.open_tree(source, "", syscalls.OPEN_TREE_CLONE | _EMPTY)
            fds.callback(os.close, clone)
            attributes = _attributes(mount.options)
            syscalls.mount_setattr(clone, "", _EMPTY, attr_set=attributes, attr_clr=_CLEARED)
        place = _openat(fds, new, mount.path)
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
        syscalls.move_mount(clone, "", place, "", flags)
