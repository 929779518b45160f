# SPDX-License-Identifier: LGPL-2.1-or-later
"""The floor: what the machine needs for the same work if nothing is checked, remembered or written down.

One loop of bare system calls, in a process of its own, for the very calls that a drop needs: read inotify, copy and
hash the image and have it on the disk, mount it, read its files, swap it, send the signal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inotify_simple import INotify, flags

from watcher.mounts import syscalls

from .report import Failed
from .rig import dying

_PLACE = "/sys"
_READ_ONLY = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A service: its process and its mount namespace."""

    pid: int
    namespace: int

    @classmethod
    def of(cls, pid: int) -> Target:
        return cls(pid, os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))


class Bare:
    """The calls. Stands in a mount namespace of its own: use it in a process, or a thread, that does nothing else."""

    def __init__(self, store: Path) -> None:
        self._store = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._path = store
        self._number = 0
        self._stacked: set[int] = set()
        self._null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(_CHUNK))
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
        syscalls.mount("confext-bench", _PLACE, "tmpfs", 0, "mode=0700")
        self._own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        os.chdir(_PLACE)
        os.mkdir("images")

    def copy(self, source: str) -> Path:
        """Into the store, under its digest."""
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        made = os.open("new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o400, dir_fd=self._store)
        hasher = hashlib.sha256()
        while count := os.readv(fd, [self._buffer]):
            os.write(made, self._buffer[:count])
            hasher.update(self._buffer[:count])
        os.fdatasync(made)
        os.close(made)
        os.close(fd)
        digest = hasher.hexdigest()
        os.rename("new", digest, src_dir_fd=self._store, dst_dir_fd=self._store)
        return self._path / digest

    def attach(self, copy: Path, fstype: str) -> str:
        """Mount a copy; where its root is."""
        target = f"{_PLACE}/images/{copy.name}"
        os.mkdir(target)
        if fstype == "erofs":
            with contextlib.suppress(OSError):  # not from every file system
                return self._mount(fstype, str(copy), target)
        backing = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        device, name = syscalls.loop_attach(backing, copy.name)
        os.close(backing)
        self._mount(fstype, name, target)
        os.close(device)
        return target

    def _mount(self, fstype: str, source: str, target: str) -> str:
        context = syscalls.fsopen(fstype)
        try:
            syscalls.fsconfig_set_string(context, "source", source)
            syscalls.fsconfig_set_flag(context, "ro")
            syscalls.fsconfig_cmd_create(context, source)
            mounted = syscalls.fsmount(context, _READ_ONLY)
        finally:
            os.close(context)
        syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        os.close(mounted)
        return target

    def read(self, root: str) -> None:
        """Each file of an image to its end: damage shows only then."""
        for directory, _, names in os.walk(f"{root}/etc"):
            for name in names:
                fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                while os.sendfile(self._null, fd, None, 1 << 30):
                    pass
                os.close(fd)

    def swap(self, target: Target, layers: Sequence[str]) -> str:
        """Put layers on the service's `/etc`; the directory to be taken apart with `clear()`."""
        syscalls.setns(target.namespace, syscalls.CLONE_NEWNS)
        table = os.open("/proc/thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        while os.read(table, 65536):
            pass
        os.close(table)
        root = syscalls.open_tree(syscalls.AT_FDCWD, "/", syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
        syscalls.mount_setattr(
            root, "", syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE, propagation=syscalls.MS_PRIVATE
        )
        self._come_back()
        stacked = target.pid in self._stacked
        bench, tree = self._build(root, layers, stacked)
        syscalls.setns(target.namespace, syscalls.CLONE_NEWNS)
        syscalls.mount_id("/etc")
        beneath = syscalls.MOVE_MOUNT_BENEATH if stacked else 0
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", syscalls.MOVE_MOUNT_F_EMPTY_PATH | beneath)
        if stacked:
            syscalls.umount2("/etc", syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        self._come_back()
        os.close(tree)
        self._stacked.add(target.pid)
        return bench

    def _build(self, root: int, layers: Sequence[str], stacked: bool) -> tuple[str, int]:
        self._number += 1
        bench = f"{_PLACE}/{self._number}"
        os.mkdir(bench)
        syscalls.mount("confext-bench", bench, "tmpfs", 0)
        os.chdir(bench)
        os.mkdir("root")
        os.mkdir("new")
        syscalls.move_mount(root, "", syscalls.AT_FDCWD, "root", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        os.close(root)
        if stacked:
            syscalls.umount2("root/etc", syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        context = syscalls.fsopen("overlay")
        syscalls.fsconfig_set_string(context, "source", "confext-bench")
        for layer in layers:
            syscalls.fsconfig_set_string(context, "lowerdir+", f"{layer}/etc")
        syscalls.fsconfig_set_string(context, "lowerdir+", "root/etc")
        syscalls.fsconfig_cmd_create(context, "overlay")
        overlay = syscalls.fsmount(context, _READ_ONLY)
        os.close(context)
        syscalls.move_mount(overlay, "", syscalls.AT_FDCWD, "new", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        os.close(overlay)
        tree = syscalls.open_tree(syscalls.AT_FDCWD, "new", syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
        os.chdir(_PLACE)
        return bench, tree

    def _come_back(self) -> None:
        syscalls.setns(self._own, syscalls.CLONE_NEWNS)
        os.chdir(_PLACE)

    def clear(self, bench: str) -> None:
        syscalls.umount2(bench, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        os.rmdir(bench)

    def detach(self, copy: Path) -> None:
        """Unmount an image and remove its copy."""
        target = f"{_PLACE}/images/{copy.name}"
        syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        os.rmdir(target)
        os.unlink(copy.name, dir_fd=self._store)


def follow(directory: Path, store: Path, fstype: str, pids: Sequence[int], ready: int) -> None:
    """The loop: for each file renamed into `directory`, give it to all the services. Does not end."""
    inotify = INotify()
    inotify.add_watch(directory, flags.MOVED_TO)
    bare = Bare(store)
    targets = [Target.of(pid) for pid in pids]
    before: Path | None = None
    os.write(ready, b"r")
    while True:
        for event in inotify.read():
            if event.name.startswith("."):
                continue
            copy = bare.copy(os.path.join(directory, event.name))
            if copy == before:
                continue  # it was late, and has seen this one at the event before
            root = bare.attach(copy, fstype)
            bare.read(root)
            benches = []
            for target in targets:
                benches.append(bare.swap(target, [root]))
                os.kill(target.pid, signal.SIGHUP)
            for bench in benches:
                bare.clear(bench)
            if before is not None:
                bare.detach(before)
            before = copy


def give_all(data: Path, store: Path, fstype: str, pids: Sequence[int]) -> float:
    """Seconds for giving one image to services that have none yet: what a first start cannot do without."""

    def give(ready: int) -> None:
        bare = Bare(store)
        root = bare.attach(bare.copy(str(data)), fstype)
        bare.read(root)
        for pid in pids:
            bare.clear(bare.swap(Target.of(pid), [root]))
        os.write(ready, b"r")
        signal.pause()

    start = time.monotonic()
    with forked(give):
        return time.monotonic() - start


@contextlib.contextmanager
def loop(directory: Path, store: Path, fstype: str, pids: Sequence[int]) -> Iterator[int]:
    """`follow()` in a process of its own; its PID."""
    with forked(lambda ready: follow(directory, store, fstype, pids, ready)) as pid:
        yield pid


def _read_events(directory: Path, ready: int) -> None:
    inotify = INotify()
    inotify.add_watch(directory, flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.CLOSE_WRITE)
    os.write(ready, b"r")
    header = struct.Struct("iIII")
    while True:
        data = os.read(inotify.fileno(), 1 << 16)
        place = 0
        while place < len(data):
            place += header.size + header.unpack_from(data, place)[3]


@contextlib.contextmanager
def reader(directory: Path) -> Iterator[int]:
    """A process that reads the events of a directory and does nothing with them; its PID."""
    with forked(lambda ready: _read_events(directory, ready)) as pid:
        yield pid


@contextlib.contextmanager
def forked(function: Callable[[int], None]) -> Iterator[int]:
    """A function in a process of its own, which writes "r" when it is ready; its PID.

    Raises:
        Failed: it has ended.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with dying():
            os.close(reading)
            function(writing)
    os.close(writing)
    try:
        if os.read(reading, 1) != b"r":
            raise Failed("the bare calls, which are the floor, did not start")
        yield pid
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise Failed("the bare calls, which are the floor, have ended")
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
