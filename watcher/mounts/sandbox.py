# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mounts that a service's sandbox has below `/etc`: taken out of the old stack, hung into the new one.

Three kinds:

- Anything with content of its own (a tmpfs, a bind mount of something else, `InaccessiblePaths=`): its clone is hung
  into the new stack.
- A bind mount of the stack itself (`ReadWritePaths=` below `/etc`): a clone would go on showing the old stack's files,
  so it is made anew from the new one, with the same flags.
- A bind mount of the base's directory on itself, made for the sake of its flags before there was a stack: where the new
  stack brings something there it would hide that, so it becomes one of the second kind; else it is one of the first.

**The cover.** Lifting an overlay off also disconnects what is mounted on it, and whoever still holds a directory of
it (its working directory, a descriptor) then sees the file that a sandbox mount had hidden. So a topmost layer
carries, at the place of each sandbox mount, an empty file of mode 000 or an empty opaque directory. It also gives
every mount a place to stand on in a stack that no longer has that path: one that vanished once would be lost for good.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from watcher.model import Refused
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Moved
from watcher.mounts.mountinfo import Mount
from watcher.mounts.table import COVER, Table

_EMPTY = syscalls.AT_EMPTY_PATH

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
# How an attempt to open says that there is nothing to be seen at a path: also where the way leads through a link.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

# What a clone carries over and is then set anew; how access times are kept is one field of several bits.
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
        source: for one that is made anew, where in the stack that is which it shows.
        place: where in the stack it stands; None if it stands on another of these mounts.
        mode: type and permissions of its root.
    """

    path: str
    tree: int
    source: str
    place: str | None
    options: tuple[str, ...]
    mode: int


class Lower:
    """The layers below the cover.

    Args:
        directories: descriptors of them, topmost first; the last one is the base.
    """

    def __init__(self, directories: Sequence[int]) -> None:
        self.directories = directories

    def has(self, path: str) -> bool:
        return any(_has(directory, path) for directory in self.directories)

    def brings(self, path: str) -> bool:
        """Whether one of the layers above the base has something there."""
        return any(_has(directory, path) for directory in self.directories[:-1])


def gather(fds: Descriptors, table: Table, old: int, lower: Lower) -> tuple[list[Sandbox], list[str]]:
    """All sandbox mounts of a service, each before those that lie on it; and remarks about them.

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
"""A row, and the place in the stack where its mount stands; None if it stands on another of these mounts."""


@dataclass(frozen=True, slots=True)
class _Found:
    fds: Descriptors
    table: Table
    etc: int
    lower: Lower
    mounts: list[Sandbox]
    remarks: list[str]

    def add(self, row: Mount, place: str | None) -> list[_Todo]:
        """Take a mount up; what lies on it and is to be taken up by itself."""
        path = row.point.removeprefix("/etc/")
        fd = self._open(path)
        mode = os.fstat(fd).st_mode
        source = self._source(row, path)
        if source is not None:
            self.mounts.append(Sandbox(path, -1, source, place, row.options, mode))
            return [(above, source + above.point[len(row.point) :]) for above in self.table.on(row)]
        tree, whole = self._clone(fd, row)
        self.mounts.append(Sandbox(path, tree, "", place, row.options, mode))
        return [] if whole else [(above, None) for above in self.table.on(row)]

    def _open(self, path: str) -> int:
        try:
            fd = self.fds.add(syscalls.openat2(self.etc, path, os.O_PATH, syscalls.RESOLVE_INSIDE))
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise
            raise Moved from None
        if not syscalls.is_mount_root(fd):  # the service has renamed a directory on the way
            raise Moved
        return fd

    def _source(self, row: Mount, path: str) -> str | None:
        """For what is to be made anew from the new stack: what it shows, below `/etc`."""
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
        """Whether it is a bind mount of the base's own directory on itself, made for the sake of its flags alone."""
        device, root = self.table.base
        return row.device == device and row.root == root + row.point[len("/etc") :]

    def _clone(self, fd: int, row: Mount) -> tuple[int, bool]:
        """A clone of a mount, and whether everything on it came with it."""
        whole = not any(map(self._shows_stack, self.table.above(row)))
        flags = syscalls.OPEN_TREE_CLONE | _EMPTY
        try:
            tree = syscalls.open_tree(fd, "", flags | (syscalls.AT_RECURSIVE if whole else 0))
        except OSError as error:
            # mount_namespaces(7): mounts that came as a unit from a more privileged namespace do not part.
            if whole or error.errno != errno.EINVAL:
                raise
            whole = True
            tree = syscalls.open_tree(fd, "", flags | syscalls.AT_RECURSIVE)
        return self.fds.add(tree), whole


def make_cover(mounts: Sequence[Sandbox], lower: Lower, *, privileged: bool) -> None:
    """Fill the cover, in the working directory, with an empty place for each mount that stands on the stack."""
    made = {""}
    for mount in mounts:
        if mount.place is None:
            continue
        hides = mount.tree >= 0 and mount.place == mount.path
        if not hides and lower.has(mount.place):
            continue
        _make_parents(os.path.dirname(mount.place), lower, made, privileged=privileged)
        _make_place(mount, f"{COVER}/{mount.place}", privileged=privileged)
        made.add(mount.place)


def _make_place(mount: Sandbox, place: str, *, privileged: bool) -> None:
    # What is made anew from the stack shows its own place where the stack has nothing for it.
    mode = stat.S_IMODE(mount.mode) if mount.tree < 0 else 0
    if stat.S_ISDIR(mount.mode):
        os.mkdir(place, 0)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0))
    if mode:
        os.chmod(place, mode)  # whatever the umask
    if mount.tree >= 0 and stat.S_ISDIR(mount.mode):
        os.setxattr(place, f"{'trusted' if privileged else 'user'}.overlay.opaque", b"y")


def _make_parents(path: str, lower: Lower, made: set[str], *, privileged: bool) -> None:
    """Directories of the cover that must look just like the ones they lie upon."""
    if path in made:
        return
    _make_parents(os.path.dirname(path), lower, made, privileged=privileged)
    made.add(path)
    place = f"{COVER}/{path}"
    os.mkdir(place, 0o755)
    for layer in lower.directories:
        try:
            fd = syscalls.openat2(layer, path, os.O_RDONLY | os.O_DIRECTORY, syscalls.RESOLVE_INSIDE)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise
            continue  # the next layer shows through
        try:
            copy_attributes(fd, place, privileged=privileged)
        finally:
            os.close(fd)
        return


def copy_attributes(source: int, place: str, *, privileged: bool) -> None:
    """Give a directory the owner, mode and extended attributes of another (a descriptor)."""
    status = os.fstat(source)
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        _attempt(privileged, os.chown, place, status.st_uid, status.st_gid)
    os.chmod(place, stat.S_IMODE(status.st_mode))
    node = f"/proc/self/fd/{source}"  # an O_PATH descriptor itself gives no attributes
    for name in _attributes_of(node):
        if ".overlay." not in name:
            _attempt(privileged, os.setxattr, place, name, os.getxattr(node, name))


def _attributes_of(node: str) -> list[str]:
    try:
        return os.listxattr(node)
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # an image that was made without any
            return []
        raise


def _attempt(privileged: bool, function: Callable[..., None], *args: object) -> None:
    """In a user namespace: owners that it has no number for, and attributes that it may not set, stay away."""
    try:
        function(*args)
    except OSError as error:
        if privileged or error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def renew(mounts: Sequence[Sandbox], overlay: int, fds: Descriptors) -> None:
    """Make those anew that show the stack, out of the new one, on which nothing is hung yet."""
    for mount in mounts:
        if mount.tree >= 0:
            continue
        source = syscalls.openat2(
            overlay, mount.source, os.O_PATH, syscalls.RESOLVE_INSIDE | syscalls.RESOLVE_NO_XDEV
        )
        try:
            mount.tree = fds.add(syscalls.open_tree(source, "", syscalls.OPEN_TREE_CLONE | _EMPTY))
        finally:
            os.close(source)
        flags = attributes(mount.options)
        syscalls.mount_setattr(mount.tree, "", _EMPTY, attr_set=flags, attr_clr=_CLEARED)


def hang(mounts: Sequence[Sandbox], overlay: int) -> None:
    """Put all of them at their places in the new stack."""
    flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
    for mount in mounts:
        place = syscalls.openat2(overlay, mount.path, os.O_PATH, syscalls.RESOLVE_INSIDE)
        try:
            syscalls.move_mount(mount.tree, "", place, "", flags)
        finally:
            os.close(place)


def _has(dirfd: int, path: str) -> bool:
    try:
        os.close(syscalls.openat2(dirfd, path, os.O_PATH, syscalls.RESOLVE_INSIDE))
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        return False
    return True
