# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap alone: a stack of two layers, on services with 0, 1 and 10 sandbox mounts below `/etc`.

The floor is the same kernel work by the same calls in a straight line, with everything that has to be found out known
beforehand: which mounts there are, what they are, where the base is. Both run in turns, on the same worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.images import FORMATS, confext, image
from watcher.model import Copy, Kind, Layer, Stack
from watcher.mounts import syscalls
from watcher.mounts.swap import swap
from watcher.mounts.workers import PLACE, MountWorkers

from .report import figure
from .result import Figure
from .rig import rig

SANDBOXES = (0, 1, 10)
_AIMS = {1: "500 us, p99 2 ms; 2x floor"}

_CLONE = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE
_EMPTY = syscalls.AT_EMPTY_PATH
_ATTACH = syscalls.MOVE_MOUNT_F_EMPTY_PATH
_INSIDE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
_FLAGS = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
_DETACH = syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW


def run(count: int = 1000) -> list[Figure]:
    """One row for each number of sandbox mounts, `count` swaps each."""
    with rig() as place, MountWorkers() as workers:
        layers, copies = _layers(place.where)
        return [_measure(workers, layers, copies, sandboxes, count) for sandboxes in SANDBOXES]


def _layers(scratch: Path) -> tuple[tuple[Layer, Layer], dict[str, Copy]]:
    layers, copies = [], {}
    for version, fstype in (("1", "squashfs"), ("2", "squashfs")):
        tree = confext(scratch / f"tree-{version}", "web", {"etc/bench/version": version.encode()})
        path = image(tree, scratch / f"web_{version}.raw", fstype)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        copies[digest] = Copy(digest, str(path), path.stat().st_size, Kind.IMAGE, FORMATS[fstype])
        layers.append(Layer("web.raw", "web", version, digest, Kind.IMAGE, str(path)))
    return (layers[0], layers[1]), copies


def _measure(
    workers: MountWorkers, layers: tuple[Layer, Layer], copies: dict[str, Copy], sandboxes: int, count: int
) -> Figure:
    stacks = (Stack(layers), Stack(layers[::-1]))
    ours, floor = [], []
    with (
        _service(sandboxes) as (namespace, paths),
        contextlib.closing(_Bare(workers, namespace, paths)) as bare,
    ):
        for number in range(2 * count):
            stack = stacks[number // 2 % 2]
            if number % 2 == 0:
                ours.append(workers.submit(swap, workers, namespace, stack, copies).result().usec)
            else:
                floor.append(workers.submit(bare.swap, stack.digests).result() / 1000)
            # What was put off (taking the bench apart) is not measured; wait until it is done.
            workers.submit(bare.clear).result()
    # The first one of each mounts the images, and finds no stack on /etc.
    what = f"the swap, 2 layers, {sandboxes} sandbox mounts"
    return figure(f"swap.{sandboxes}", what, "us", (ours[1:], floor[1:]), _AIMS.get(sandboxes, ""))


@contextlib.contextmanager
def _service(sandboxes: int) -> Iterator[tuple[int, Sequence[str]]]:
    """A process in a mount namespace of its own, with a tmpfs on that many directories of `/etc`."""
    found = sorted(path.name for path in Path("/etc").iterdir() if path.is_dir() and not path.is_symlink())
    paths = found[:sandboxes]
    mounts = "".join(f"mount -t tmpfs none '/etc/{path}'; " for path in paths)
    script = f"mount --make-rshared /; {mounts} echo ready; exec cat"
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "no service to measure on"
        namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield namespace, paths
        finally:
            os.close(namespace)
            process.stdin.close()


class _Bare:
    """The calls of a swap of a service that has a stack already. They run on a worker of the workshop."""

    def __init__(self, workers: MountWorkers, namespace: int, paths: Sequence[str]) -> None:
        self._service = namespace
        self._paths = paths
        self._own = workers.submit(os.open, "/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC).result()
        self._number = 0
        self._used: list[str] = []

    def close(self) -> None:
        os.close(self._own)

    def swap(self, digests: Sequence[str]) -> int:
        """Nanoseconds from the first call until the old stack is gone."""
        self._number += 1
        bench = f"{PLACE}/bare-{self._number}"
        start = time.perf_counter_ns()
        syscalls.setns(self._service, syscalls.CLONE_NEWNS)
        table = os.open("/proc/thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        stacked = False
        while part := os.read(table, 1 << 16):
            stacked = stacked or b" /etc " in part
        etc = -1
        if self._paths:
            etc = syscalls.open_tree(syscalls.AT_FDCWD, "/etc", _CLONE)
            syscalls.mount_setattr(etc, "", _EMPTY | syscalls.AT_RECURSIVE, propagation=syscalls.MS_PRIVATE)
        root = syscalls.open_tree(syscalls.AT_FDCWD, "/", syscalls.OPEN_TREE_CLONE)
        syscalls.mount_setattr(root, "", _EMPTY, propagation=syscalls.MS_PRIVATE)
        syscalls.setns(self._own, syscalls.CLONE_NEWNS)
        fds = self._build(bench, root, etc, digests)
        syscalls.setns(self._service, syscalls.CLONE_NEWNS)
        where = syscalls.MOVE_MOUNT_BENEATH if stacked else 0
        syscalls.move_mount(fds[-1], "", syscalls.AT_FDCWD, "/etc", _ATTACH | where)
        if stacked:
            syscalls.umount2("/etc", _DETACH)
        syscalls.setns(self._own, syscalls.CLONE_NEWNS)
        took = time.perf_counter_ns() - start
        for fd in (table, *fds):
            os.close(fd)
        self._used.append(bench)
        return took

    def _build(self, bench: str, root: int, etc: int, digests: Sequence[str]) -> list[int]:
        """The descriptors that are open then; the last one is the tree."""
        os.mkdir(bench)
        syscalls.mount("none", bench, "tmpfs", 0)
        os.chdir(bench)
        for directory in ("root", "cover", "layers"):
            os.mkdir(directory)
        syscalls.move_mount(root, "", syscalls.AT_FDCWD, "root", _ATTACH)
        fds = [root]
        if etc >= 0:
            os.mkdir("old")
            syscalls.move_mount(etc, "", syscalls.AT_FDCWD, "old", _ATTACH)
            fds.append(etc)
        clones = [self._clone(path) for path in self._paths]
        overlay = self._overlay(digests)
        fds += [*clones, overlay]
        if etc >= 0:
            os.mkdir("new")
            syscalls.move_mount(overlay, "", syscalls.AT_FDCWD, "new", _ATTACH)
            for path, clone in zip(self._paths, clones, strict=True):
                syscalls.move_mount(clone, "", overlay, path, _ATTACH)
            fds.append(syscalls.open_tree(overlay, "", _CLONE | _EMPTY))
        return fds

    def _clone(self, path: str) -> int:
        clone = syscalls.open_tree(syscalls.AT_FDCWD, f"old/{path}", _CLONE)
        os.mkdir(f"cover/{path}", 0)
        os.setxattr(f"cover/{path}", "trusted.overlay.opaque", b"y")
        return clone

    def _overlay(self, digests: Sequence[str]) -> int:
        context = syscalls.fsopen("overlay")
        syscalls.fsconfig_set_string(context, "source", "systemd-extensions")
        syscalls.fsconfig_set_string(context, "lowerdir+", "cover")
        for digest in digests:
            path = f"layers/@{digest}"
            os.symlink(f"{PLACE}/images/{digest}/etc", path)
            syscalls.fsconfig_set_string(context, "lowerdir+", path)
        syscalls.fsconfig_set_string(context, "lowerdir+", "root/etc")
        syscalls.fsconfig_cmd_create(context, "overlay")
        overlay = syscalls.fsmount(context, _FLAGS)
        os.close(context)
        return overlay

    def clear(self) -> None:
        os.chdir("/")
        for bench in self._used:
            syscalls.umount2(bench, _DETACH)
            os.rmdir(bench)
        self._used.clear()
