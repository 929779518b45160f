# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mounts that a service's sandbox has below `/etc`: taken out of the old stack, put onto the new one.

Three kinds:

- A mount with content of its own (a tmpfs, a bind mount of something else, `InaccessiblePaths=`): its clone is mounted
  on the new stack.
- A bind mount of the stack itself (`ReadWritePaths=` below `/etc`): a clone would go on showing the old stack's files,
  so it is made anew from the new one, with the same flags.
- A bind mount of a directory of the base on itself, made for the sake of its flags before there was a stack: if the new
  stack brings something there, a clone would hide that, and it becomes one of the second kind; else one of the first.

The cover is the topmost layer of a stack, which has an empty place for each of these mounts. Lifting an overlay off
also disconnects what is mounted on it. A process that still holds a directory of the old stack (its working directory,
a descriptor) would then see the file that a sandbox mount had hidden. With a cover it sees an empty file of mode 000,
or an empty opaque directory.

The cover also gives each mount a place in a stack that no longer has that path: what is left out once is lost for good.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from watcher.model import Refused
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Moved, clone, mount_on, open_inside
from watcher.mounts.mountinfo import Mount
from watcher.mounts.table import COVER, Table

# More than any sandbox has. A service that may mount in a user namespace of its own can have as many as it likes.
_MOUNTS_MAX = 1000

_FLAGS = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "nodiratime": syscalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}
# A clone comes with the flags of the stack: these are cleared. How access times are kept is a field of several bits.
_CLEARED = sum(_FLAGS.values()) | syscalls.MOUNT_ATTR_ATIME


def attributes(options: Sequence[str]) -> int:
    """The flags of a row of mountinfo, as fsmount(2) and mount_setattr(2) take them."""
    flags = 0
    for option in options:
        flags |= _FLAGS.get(option, 0)
    if "noatime" not in options and "relatime" not in options:
        flags |= syscalls.MOUNT_ATTR_STRICTATIME
    return flags


@dataclass(slots=True)
class Sandbox:
    """One mount that has to be there after the swap too.

    Attributes:
        path: relative to `/etc`.
        tree: descriptor of its clone; -1: it is still to be made from the new stack.
        source: for one that is made anew: the path in the stack that it shows.
        place: the path in the stack that it is mounted on; None if it is mounted on another of these mounts.
        mode: type and permissions of its root.
    """

    path: str
    tree: int
    source: str
    place: str | None
    options: tuple[str, ...]
    mode: int


@dataclass(frozen=True, slots=True)
class Lower:
    """The layers below the cover: descriptors of directories, topmost first; the last one is the base."""

    directories: Sequence[int]

    def has(self, path: str) -> bool:
        return any(_has(directory, path) for directory in self.directories)

    def brings(self, path: str) -> bool:
        """Whether one of the layers above the base has something there."""
        return any(_has(directory, path) for directory in self.directories[:-1])


def _has(directory: int, path: str) -> bool:
    fd = open_inside(directory, path)
    if fd is not None:
        os.close(fd)
    return fd is not None


def gather(fds: Descriptors, table: Table, old: int, lower: Lower) -> tuple[list[Sandbox], list[str]]:
    """All sandbox mounts of a service, each before those that are mounted on it; and remarks about them.

    Args:
        fds: closes the clones.
        old: descriptor of a clone of `/etc` with all that is mounted on it.

    Raises:
        Moved: a mount is no longer where the table has it.
        Refused: there are too many.
    """
    if sum(1 for _ in islice(table.above(table.top), _MOUNTS_MAX + 1)) > _MOUNTS_MAX:
        raise Refused(f"more than {_MOUNTS_MAX} mounts below /etc in the service: unmount some")
    found = _Found(fds, table, old, lower, [], [])
    todo: list[_Todo] = [(row, row.point.removeprefix("/etc/")) for row in reversed(table.on(table.top))]
    while todo:
        todo += reversed(found.add(*todo.pop()))
    return found.mounts, found.remarks


_Todo = tuple[Mount, str | None]
"""A row of the mount table, and its `Sandbox.place`."""


@dataclass(frozen=True, slots=True)
class _Found:
    fds: Descriptors
    table: Table
    etc: int
    lower: Lower
    mounts: list[Sandbox]
    remarks: list[str]

    def add(self, row: Mount, place: str | None) -> list[_Todo]:
        """Take a mount up. Returns the mounts on it that are to be taken up by themselves."""
        path = row.point.removeprefix("/etc/")
        fd = self._open(path)
        mode = os.fstat(fd).st_mode
        source = self._source(row, path)
        if source is not None:
            self.mounts.append(Sandbox(path, -1, source, place, row.options, mode))
            return [(above, source + above.point[len(row.point) :]) for above in self.table.on(row)]
        # If a bind mount of the stack is mounted on it, that one is made anew: the clone must come without.
        tree, whole = clone(self.fds, fd, whole=not any(map(self._shows_stack, self.table.above(row))))
        self.mounts.append(Sandbox(path, tree, "", place, row.options, mode))
        return [] if whole else [(above, None) for above in self.table.on(row)]

    def _open(self, path: str) -> int:
        fd = open_inside(self.etc, path)
        if fd is None:
            raise Moved
        if not syscalls.is_mount_root("", self.fds.add(fd)):  # the service has renamed a directory on the way
            raise Moved
        return fd

    def _source(self, row: Mount, path: str) -> str | None:
        """`Sandbox.source` of a mount that is to be made anew; None for another."""
        if self._shows_stack(row):
            source = row.root.strip("/")
            return source if self.lower.has(source) else path
        if self._shows_base(row) and self.lower.brings(path):
            self.remarks.append(
                f"{row.point}: the unit's mount there would hide what the stack brings: it shows the stack from now"
                " on, read-only, as it will after a restart"
            )
            return path
        return None

    def _shows_stack(self, row: Mount) -> bool:
        return bool(self.table.stacks) and row.device == self.table.top.device

    def _shows_base(self, row: Mount) -> bool:
        """Whether it is a bind mount of a directory of the base on itself."""
        device, root = self.table.base
        return row.device == device and row.root == root + row.point[len("/etc") :]


def renew(fds: Descriptors, mounts: Iterable[Sandbox], overlay: int) -> None:
    """Make those anew that show the stack, from the new one, before anything is mounted on it."""
    for mount in mounts:
        if mount.tree >= 0:
            continue
        with Descriptors() as own:
            resolve = syscalls.RESOLVE_INSIDE | syscalls.RESOLVE_NO_XDEV
            source = own.add(syscalls.openat2(overlay, mount.source, os.O_PATH, resolve))
            mount.tree, _ = clone(fds, source, whole=False)
        flags = attributes(mount.options)
        syscalls.mount_setattr(mount.tree, "", syscalls.AT_EMPTY_PATH, attr_set=flags, attr_clr=_CLEARED)


def put_on(mounts: Iterable[Sandbox], overlay: int) -> None:
    """Mount all of them at their places on the new stack."""
    for mount in mounts:
        with Descriptors() as own:
            place = own.add(syscalls.openat2(overlay, mount.path, os.O_PATH, syscalls.RESOLVE_INSIDE))
            mount_on(mount.tree, place)


class Cover:
    """A cover, in the working directory.

    Args:
        privileged: False in a user namespace, where owners that have no number there and attributes that may not be
            set are left out.
    """

    def __init__(self, lower: Lower, *, privileged: bool) -> None:
        self._lower, self._privileged = lower, privileged
        self._made = {""}
        os.mkdir(COVER, 0o755)
        # As at a start, where systemd mounts no cover: /etc itself is like that of the topmost layer.
        self._copy_attributes(lower.directories[0], COVER)

    def fill(self, mounts: Iterable[Sandbox]) -> None:
        """Make an empty place for each mount that stands on the stack."""
        for mount in mounts:
            if mount.place is None:
                continue
            hides = mount.tree >= 0 and mount.place == mount.path
            if hides or not self._lower.has(mount.place):
                self._make_directory(os.path.dirname(mount.place))
                self._make_place(mount, f"{COVER}/{mount.place}")
                self._made.add(mount.place)

    def _make_directory(self, path: str) -> None:
        """Make a directory, and those above it, each like the directory that it lies upon."""
        if path in self._made:
            return
        self._make_directory(os.path.dirname(path))
        self._made.add(path)
        place = f"{COVER}/{path}"
        os.mkdir(place, 0o755)
        for layer in self._lower.directories:
            fd = open_inside(layer, path, os.O_RDONLY | os.O_DIRECTORY)
            if fd is not None:
                try:
                    self._copy_attributes(fd, place)
                finally:
                    os.close(fd)
                return

    def _make_place(self, mount: Sandbox, place: str) -> None:
        if stat.S_ISDIR(mount.mode):
            os.mkdir(place, 0)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0))
        if mount.tree < 0:  # it is made anew from the stack, which has nothing there: it will show this place
            os.chmod(place, stat.S_IMODE(mount.mode))  # whatever the umask
        elif stat.S_ISDIR(mount.mode):
            os.setxattr(place, f"{'trusted' if self._privileged else 'user'}.overlay.opaque", b"y")

    def _copy_attributes(self, source: int, place: str) -> None:
        """Give a directory the owner, mode and extended attributes of another (a descriptor)."""
        status = os.fstat(source)
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            self._attempt(os.chown, place, status.st_uid, status.st_gid)
        os.chmod(place, stat.S_IMODE(status.st_mode))
        node = f"/proc/self/fd/{source}"  # an O_PATH descriptor itself gives no attributes
        try:
            names = os.listxattr(node)
        except OSError as error:
            if error.errno == errno.ENOTSUP:  # a file system without any
                return
            raise
        for name in names:
            if ".overlay." not in name:
                self._attempt(os.setxattr, place, name, os.getxattr(node, name))

    def _attempt(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        except OSError as error:
            if self._privileged or error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
                raise
