# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a service that runs on a stack see what the host has changed in its `/etc`.

Overlayfs remembers what it found in its layers, name by name (dentries), also that a name was not there. It does not
notice when a layer changes below it: a file that is replaced by rename, created after a look-up that failed, or whose
mode changes, stays what it was for the service. Only a write in place shows by itself. There are three ways to cure it:

- Mount the same stack anew. A swap takes a millisecond, and who holds a directory of the old stack keeps the old files.
- Drop what the kernel remembers, for the whole machine (`drop_caches`). Every program pays for that.
- Reconfigure the overlay, as `mount -o remount,ro` does: the kernel then drops the names of that one file system which
  nobody uses at this moment (reconfigure_super(), shrink_dcache_sb()). 20 us, no mount, and directories that are held
  see it too. A name that a process holds open stays.

So the overlay is reconfigured, and only if a name proves old after that, because it is held open, is the stack mounted
anew. Whether the overlay remembers a name at all is asked first (RESOLVE_CACHED): most changes concern no service, and
that costs 5 us. While others mount something (every 50 us), the kernel says of one name in a hundred that it remembers
that it would have to look. So what has changed is asked for again later.

All of it works on descriptors that were opened once, in a namespace that was proved to be the service's. Nothing is
entered, and nothing is mounted for it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from watcher.model import ENTRIES_MAX, Stack
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import hold, open_etc, open_inside
from watcher.mounts.namespaces import of_service
from watcher.mounts.process import Process, namespace_id
from watcher.mounts.survey import Survey, clone_base, private_clone, read_own
from watcher.mounts.swap import attach_base
from watcher.mounts.table import Table
from watcher.mounts.workers import MountWorkers

_LOOK = os.O_PATH | os.O_NOFOLLOW

# While others mount, "not remembered" may be wrong once in a hundred times: so often it has to be said of a held name.
_ASKED = 6

_SAID_MAX = 5

# With xino=on overlayfs puts the number of the layer into the upper bits of an inode number.
_INODE = 0xFFFF_FFFF


class View:
    """The overlay on a service's `/etc`, and what it has as its base; both without what is mounted on them.

    Attributes:
        fd: O_PATH descriptor of the overlay's root, in a clone of its mount: it is of no namespace.
        base: O_PATH descriptor of the base.
        device: of the overlay, as stat(2) has it: all mounts of one overlay have the same names in the cache.
        base_id: device and inode of the base.
        fstype: of the base.
        resolve: RESOLVE_ flags for a look into the overlay.
        frank: what it is can be asked. Else somebody else than root may have made it, of a file system that does not
            answer (the namespace is another user namespace's), or it comes with the mounts on it; it is refreshed at
            each change then.
        hidden: paths on which the service has another file system mounted: what is below that does not matter.
    """

    __slots__ = ("base", "base_id", "device", "fd", "frank", "fstype", "hidden", "resolve")

    def __init__(self, fd: int, base: int, table: Table, *, frank: bool) -> None:
        self.fd, self.base, self.fstype, self.frank = fd, base, table.beneath.fstype, frank
        foreign = (row for row in table.on(table.top) if row.device != table.top.device)
        self.hidden = frozenset(row.point.removeprefix("/etc/") for row in foreign)
        # With RESOLVE_NO_XDEV the cache does not tell of a name that anything is mounted on, in any namespace.
        self.resolve = syscalls.RESOLVE_INSIDE | (0 if frank else syscalls.RESOLVE_NO_XDEV)
        self.device = os.fstat(fd).st_dev
        status = os.fstat(base)
        self.base_id = status.st_dev, status.st_ino

    def take_base(self) -> int:
        """`base`, which is the caller's to close from now on."""
        fd, self.base = self.base, -1
        return fd

    def close(self) -> None:
        """Let go of the overlay; may be called twice."""
        for fd in (self.fd, self.base):
            if fd >= 0:
                os.close(fd)
        self.fd = self.base = -1

    def drop_unused(self) -> None:
        """Have the kernel forget all names of the overlay that nobody uses at this moment.

        Raises OSError: the kernel refused.
        """
        context = syscalls.fspick(self.fd)
        try:
            # It is read-only already. Without the flag the kernel would try to make it writable, and refuse (EROFS).
            syscalls.fsconfig_set_flag(context, "ro")
            syscalls.fsconfig_cmd_reconfigure(context, "overlay")
        finally:
            os.close(context)


@dataclass(slots=True)
class Changes:
    """What has changed in a base.

    Attributes:
        names: by directory (relative to the base, "" for the base itself) the names in it that came, went, were
            replaced (True), or whose mode or owner changed (False).
        unknown: directories of which it is not known what has changed in them.
        anything: all may have changed.
    """

    names: dict[str, dict[str, bool]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    anything: bool = False

    def add(self, directory: str, name: str, *, replaced: bool) -> None:
        """Note a name."""
        names = self.names.setdefault(directory, {})
        names[name] = names.get(name, False) or replaced

    def __bool__(self) -> bool:
        return bool(self.names or self.unknown or self.anything)

    def merge(self, other: Changes) -> None:
        """Add what has changed later."""
        for directory, names in other.names.items():
            for name, replaced in names.items():
                self.add(directory, name, replaced=replaced)
        self.unknown |= other.unknown
        self.anything |= other.anything

    def __str__(self) -> str:
        some = list(islice((path for path, _ in self.paths()), _SAID_MAX + 1))
        return ", ".join(some[:_SAID_MAX]) + (" and more" if some[_SAID_MAX:] else "") or "anything"

    def paths(self) -> Iterator[tuple[str, bool]]:
        """All of `names` as paths, with what happened."""
        for directory, names in self.names.items():
            for name, replaced in names.items():
                yield _join(directory, name), replaced


class BaseNow:
    """What a base has under a path now; looked up once for all services.

    Args:
        directory: descriptor of the base.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._found: dict[str, tuple[int, ...] | None] = {}

    def identity(self, path: str) -> tuple[int, ...] | None:
        """What tells a file from the one that replaces it; None: there is nothing."""
        if path not in self._found:
            fd = open_inside(self._directory, path, _LOOK, syscalls.RESOLVE_NO_XDEV)
            try:
                self._found[path] = None if fd is None else _identity(os.fstat(fd))
            finally:
                if fd is not None:
                    os.close(fd)
        return self._found[path]


def is_concerned(view: View, changes: Changes, now: BaseNow) -> bool:
    """Whether the overlay remembers anything of what has changed."""
    if changes.anything or not view.frank:
        return True
    if any(_cached(view, directory) for directory in changes.unknown):
        return True
    for directory, names in changes.names.items():
        fd = _open_cached(view.fd, directory, view.resolve) if directory else os.dup(view.fd)
        if fd < 0:
            continue  # the names of a directory are forgotten before it
        try:
            for name, replaced in names.items():
                if _is_old(view, fd, name, replaced, now, _join(directory, name)):
                    return True
        finally:
            os.close(fd)
    return False


def still_old(view: View, paths: Iterable[str], now: BaseNow) -> tuple[str, ...]:
    """Those of the paths that the overlay has otherwise than the base: they are held open, or a layer has them
    (`renew.py` finds out which)."""
    if not view.frank:
        return ()
    return tuple(path for path in paths if _is_old(view, view.fd, path, True, now, path, asked=_ASKED))


def listed_wrongly(view: View, changes: Changes) -> tuple[str, ...]:
    """Paths that came or went, and which a directory of the overlay does not list so.

    Overlayfs keeps the list of a directory that several layers have, for as long as a process that has read it keeps it
    open, and gives it to all others, too.
    """
    found: list[str] = []
    if not view.frank:
        return ()
    for directory, names in changes.names.items():
        fd = _open_cached(view.fd, directory or ".", view.resolve)
        if fd < 0:
            continue  # so nobody has it open
        try:
            joined = os.fstat(fd).st_nlink == 1  # the mark of a directory of several layers (ovl_getattr())
        finally:
            os.close(fd)
        if joined and any(names.values()):
            found += [_join(directory, name) for name in _listed_wrongly(view, directory, names)]
    return tuple(found)


def _listed_wrongly(view: View, directory: str, names: Iterable[str]) -> list[str]:
    fd = open_inside(view.fd, directory or ".", os.O_RDONLY | os.O_DIRECTORY)
    if fd is None:
        return []
    try:
        with os.scandir(fd) as entries:  # of which there may be ten million
            listed = frozenset(islice((entry.name for entry in entries), ENTRIES_MAX))
        if len(listed) == ENTRIES_MAX:
            return []
        return [name for name in names if (name in listed) != _is_there(fd, name)]
    finally:
        os.close(fd)


def _is_there(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_old(
    view: View, directory: int, name: str, replaced: bool, now: BaseNow, path: str, asked: int = 1
) -> bool:
    """Whether a name in the cache is not, or may not be, what the base has; the kernel is asked so often for it."""
    if path in view.hidden:
        return False
    fd = -errno.EAGAIN
    for _ in range(asked):
        if fd == -errno.EAGAIN:
            fd = _open_cached(directory, name, view.resolve)
    if fd < 0:
        return fd == -errno.ENOENT and now.identity(path) is not None
    try:
        # Overlayfs checks modes by what it read once; stat(2) shows what they are now.
        return not replaced or _identity(os.fstat(fd)) != now.identity(path)
    finally:
        os.close(fd)


def _open_cached(directory: int, path: str, resolve: int) -> int:
    return syscalls.openat2_cached(directory, path, _LOOK, resolve)


def _cached(view: View, path: str) -> bool:
    fd = _open_cached(view.fd, path or ".", view.resolve)
    if fd >= 0:
        os.close(fd)
    return fd != -errno.EAGAIN


def _identity(status: os.stat_result) -> tuple[int, ...]:
    always = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_ctime_ns)
    if stat.S_ISDIR(status.st_mode):  # overlayfs gives directories numbers of its own
        return always
    return (*always, status.st_ino & _INODE, status.st_size, status.st_rdev)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def views_of(
    workers: MountWorkers,
    main: Process,
    pids: Iterable[int],
    kept: Callable[[], Iterable[Stack]],
    other_mains: Callable[[], Iterable[int]],
) -> list[View]:
    """The overlays on a service's `/etc`, in all its namespaces; none where it has no stack.

    Runs inside `MountWorkers.call()`. A namespace that was copied from another one shows the same overlay: that is told
    once.

    Args:
        pids, kept, other_mains: see `of_service()`.

    Raises:
        Whatever `of_service()` does.
    """
    views: dict[int, View] = {}
    try:
        with of_service(workers, main, pids, kept, other_mains) as found:
            for namespace in (found.main, *found.apart, *found.following):
                view = view_of(workers, namespace)
                if view is not None and view.device in views:
                    view.close()
                elif view is not None:
                    views[view.device] = view
    except BaseException:
        for view in views.values():
            view.close()
        raise
    return list(views.values())


def view_of(workers: MountWorkers, namespace: int) -> View | None:
    """The stack that a namespace shows on `/etc`; None if it shows none. Runs inside `MountWorkers.call()`."""
    with workers.attending(namespace), Descriptors() as fds:
        with workers.entered(namespace):
            table = Table(read_own(workers))
            if not _is_stack(table):
                return None
            etc = hold(fds, table.top)
            overlay, whole = private_clone(fds, etc.fd, whole=False)
            found = Survey(table, -1, etc)
            clone_base(fds, found)
        if found.peel:
            with workers.scratch():
                os.mkdir("root")
                base = attach_base(fds, found)
        else:
            base = open_etc(fds, found.root, syscalls.RESOLVE_NO_XDEV)
        view = View(overlay, base, table, frank=not whole and _is_ours(namespace))
        fds.keep(overlay, base)
        return view


def _is_ours(namespace: int) -> bool:
    """Whether only we, or root, may mount in it."""
    try:
        return syscalls.owner(namespace) == namespace_id("/proc/self/ns/user")
    except PermissionError:
        return False


def _is_stack(table: Table) -> bool:
    """Whether `/etc` shows one. A service that may mount can put there what looks like one, and can be written to."""
    return bool(table.stacks) and "ro" in table.top.super_options.split(",")
