# SPDX-License-Identifier: LGPL-2.1-or-later
"""The extension-release files of a mounted image or a directory tree (os-release(5)).

Strangers made the tree. It is opened by descriptor, one component at a time. No link in it is followed: not `etc`, not
the directory, not a release file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from itertools import islice

from watcher.images.walk import DIRECTORY
from watcher.model import Refused, Sysext, shown
from watcher.mounts.descriptors import Descriptors
from watcher.resolve.release import PREFIX

Release = tuple[Mapping[str, str], frozenset[str]]
"""See `read_release()`."""

RELEASE_DIRECTORY = "etc/extension-release.d"

# systemd accepts a release file under any name when this attribute is false (portable.c, extension-util.c).
STRICT_XATTR = "user.extension-release.strict"
# On the store's copies STRICT_XATTR is ours; this keeps what the source had, empty for nothing.
KEPT_STRICT_XATTR = "user.confext-watcher.strict"

_NAMES_MAX = 1024
_FILES_MAX = 64
_BYTES_MAX = 64 * 1024
_FALSE = frozenset({"0", "no", "n", "false", "f", "off"})  # systemd's parse_boolean()
_NO_XATTR = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})


class NoRelease(Refused):
    """There is no `etc/extension-release.d/`."""


def read_release(root_fd: int) -> Release:
    """Read `etc/extension-release.d/` below the directory `root_fd` (an O_PATH descriptor will do).

    Returns:
        The text of each file called `extension-release.*` by file name, and those of the names whose
        `user.extension-release.strict` is false. Bytes that are not UTF-8 are surrogates.

    Raises:
        Refused: not a confext (`NoRelease`, `Sysext`), a link on the way, too many or too large files.
        OSError: it could not be read.
    """
    with Descriptors() as fds:
        fd = root_fd
        for name in RELEASE_DIRECTORY.split("/"):
            fd = fds.add(_directory(fd, name, root_fd))
        return _read_all(fd)


def _directory(parent: int, name: str, root_fd: int) -> int:
    try:
        return os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        raise _not_a_confext(root_fd) from None
    except NotADirectoryError:
        # O_DIRECTORY wins over O_NOFOLLOW: a link ends here, too.
        link = stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
        what = "a link" if link else "no directory"
        raise Refused(f"not a confext: {name} in it is {what}") from None


def _not_a_confext(root_fd: int) -> Refused:
    proposed = "etc/confext-release.d"
    if os.access(proposed, os.F_OK, dir_fd=root_fd, follow_symlinks=False):
        return NoRelease(
            f"not a confext: {proposed}/ in it is from an early proposal, call it"
            f" {RELEASE_DIRECTORY}/{PREFIX}NAME"
        )
    with Descriptors() as fds:
        fd = root_fd
        try:
            for name in ("usr", "lib", "extension-release.d"):
                fd = fds.add(os.open(name, DIRECTORY, dir_fd=fd))
        except OSError:  # only decides which words the refusal has
            return NoRelease(f"not a confext: there is no {RELEASE_DIRECTORY}/ in it")
    return Sysext(
        f"not a confext but a sysext: it has usr/lib/extension-release.d/ and no {RELEASE_DIRECTORY}/"
    )


def _read_all(directory: int) -> Release:
    with os.scandir(directory) as entries:  # there may be ten million
        found = [entry.name for entry in islice(entries, _NAMES_MAX + 1)]
    if len(found) > _NAMES_MAX:
        raise Refused(f"it has more than {_NAMES_MAX} entries in {RELEASE_DIRECTORY}/")
    names = sorted(name for name in found if name.startswith(PREFIX))
    if len(names) > _FILES_MAX:
        raise Refused(f"it has more than {_FILES_MAX} extension-release files")
    texts: dict[str, str] = {}
    relaxed: set[str] = set()
    for name in names:
        fd = _open_release(directory, name)
        try:
            texts[name] = _read_text(fd, name)
            if _strict(fd).lower() in _FALSE:
                relaxed.add(name)
        finally:
            os.close(fd)
    return texts, frozenset(relaxed)


def _open_release(directory: int, name: str) -> int:
    # The type first: opening a FIFO or a device node can have effects of its own.
    mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise Refused(f"{RELEASE_DIRECTORY}/{shown(name)} in it is {what}")
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def _read_text(fd: int, name: str) -> str:
    size = os.fstat(fd).st_size
    if size > _BYTES_MAX:
        what = f"{size} bytes, {_BYTES_MAX} is the limit"
        raise Refused(f"{RELEASE_DIRECTORY}/{shown(name)} in it has {what}")
    return os.pread(fd, _BYTES_MAX, 0).decode("utf-8", "surrogateescape")


def _strict(fd: int) -> str:
    """The value of `user.extension-release.strict` in the tree as its author made it, "" without one."""
    for name in (KEPT_STRICT_XATTR, STRICT_XATTR):
        try:
            return os.getxattr(fd, name).decode("utf-8", "surrogateescape")
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
    return ""
