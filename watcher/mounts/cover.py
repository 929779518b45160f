# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cover: the topmost layer of a stack, which has an empty place for each sandbox mount below `/etc`.

Lifting an overlay off also disconnects what is mounted on it. A process that still holds a directory of the old stack
(its working directory, a descriptor) would then see the file that a sandbox mount had hidden. With a cover it sees an
empty file of mode 000, or an empty opaque directory.

The cover also gives each mount a place in a stack that no longer has that path: what is left out once is lost for good.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable

from watcher.mounts.etc import open_inside
from watcher.mounts.sandbox import Lower, Sandbox
from watcher.mounts.table import COVER


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
        self._copy_attributes(lower.directories[-1], COVER)  # /etc itself is always like the base

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
