# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file of a tree has besides its content: owner, mode, times and extended attributes; read, and given to a copy.

What the kernel does not let us set (no privilege, an unmapped owner, no support) is left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from watcher.images.extension import KEPT_STRICT_XATTR, STRICT_XATTR
from watcher.model import Refused, shown

Xattrs = list[tuple[str, bytes]]

# xattr(7): the kernel will not have an attribute (no privilege, no support, unmapped ids in an ACL).
_XATTR_REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL})
# chown(2): no privilege, or an owner that this user namespace does not know.
_CHOWN_REFUSED = frozenset({errno.EPERM, errno.EINVAL})

# fs/overlayfs/overlayfs.h; a directory with whiteouts that are attributes is itself marked by opaque=x.
_HIDING = frozenset({"opaque", "whiteout"})

# Of one file: what ext4 always has room for, with what the copy of a release file gets besides.
_BYTES_MAX = 3584
_BYTES_EACH = 20

_SETID = stat.S_ISUID | stat.S_ISGID


def read(node: int | str, where: str) -> Xattrs:
    """Extended attributes by name, those that count: what `copy` adds to release files does not.

    Args:
        where: what has them, in words.

    Raises:
        Refused: they are too large: they are in no size that is bounded elsewhere.
    """
    follow = isinstance(node, int)
    try:
        names = sorted(os.listxattr(node, follow_symlinks=follow), key=os.fsencode)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    values: dict[str, bytes] = {}

    def add(name: str, value: bytes) -> None:
        values[name] = value
        size = sum(_BYTES_EACH + len(os.fsencode(name)) + len(value) for name, value in values.items())
        if size > _BYTES_MAX:
            text = f"too many extended attributes: remove some, {_BYTES_MAX} bytes are the limit"
            raise Refused(f"{where} has {text} ({_BYTES_EACH} for each, its name, its value)")

    for name in names:
        if name not in (STRICT_XATTR, KEPT_STRICT_XATTR):
            add(name, os.getxattr(node, name, follow_symlinks=follow))
    for name in (KEPT_STRICT_XATTR, STRICT_XATTR):
        if name in names:
            if strict := os.getxattr(node, name, follow_symlinks=follow):
                add(STRICT_XATTR, strict)
            break
    return sorted(values.items(), key=lambda item: os.fsencode(item[0]))


def require_unmarked(names: Iterable[str], where: str) -> None:
    """Refuse attributes by which overlayfs shows something else than what is there.

    `opaque` and `whiteout` only ever hide; all others (redirect, metacopy, origin and those that are yet to come) are
    for overlayfs itself to write.

    Args:
        where: what has them, in words.

    Raises:
        Refused: there is one.
    """
    for name in names:
        space, _, mark = name.partition(".overlay.")
        if space in ("trusted", "user") and mark and mark not in _HIDING:
            raise Refused(
                f"{where} has the extended attribute {shown(name)},"
                " by which overlayfs shows something else: remove that"
            )


def _set(node: int | str, xattrs: Xattrs) -> None:
    for name, value in xattrs:
        try:
            os.setxattr(node, name, value, follow_symlinks=isinstance(node, int))
        except OSError as error:
            if error.errno not in _XATTR_REFUSED:
                raise


def relaxed(xattrs: Xattrs) -> Xattrs:
    """Those of a release file's copy: any name will do for systemd, and what the source said is kept."""
    values = dict(xattrs)
    values[KEPT_STRICT_XATTR] = values.get(STRICT_XATTR, b"")
    values[STRICT_XATTR] = b"0"
    return list(values.items())


def give(made: int, st: os.stat_result, xattrs: Xattrs) -> None:
    """Owner, mode, attributes and times, in the order in which none undoes another.

    Without root, user.* needs the write permission that the final mode may take away; chown(2) clears set-id bits and
    security.capability.
    """
    _set(made, [(name, value) for name, value in xattrs if name.startswith("user.")])
    mode = stat.S_IMODE(st.st_mode)
    if not _chown(made, st):
        # Never hand one user's set-id program to another; and let whom it belongs to now read it.
        mode = mode & ~_SETID | stat.S_IRUSR | (stat.S_IXUSR if stat.S_ISDIR(st.st_mode) else 0)
    os.fchmod(made, mode)
    _set(made, [(name, value) for name, value in xattrs if not name.startswith("user.")])
    os.utime(made, ns=(st.st_atime_ns, st.st_mtime_ns))


def give_to_link(name: str, parent: int, st: os.stat_result, xattrs: Xattrs) -> None:
    """The same for the link `name` of the directory `parent`; a link has no mode of its own."""
    _chown(name, st, parent)
    _set(f"/proc/self/fd/{parent}/{name}", xattrs)
    os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=parent, follow_symlinks=False)


def _chown(node: int | str, st: os.stat_result, parent: int | None = None) -> bool:
    try:
        os.chown(node, st.st_uid, st.st_gid, dir_fd=parent, follow_symlinks=parent is None)
    except OSError as error:
        if error.errno in _CHOWN_REFUSED:
            return False
        raise
    return True
