# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file of a tree has besides its content: owner, mode, times, extended attributes; for a copy to have them, too.

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

# fs/overlayfs/overlayfs.h.
OPAQUE = "trusted.overlay.opaque"
"""Of a directory: "y" hides all that the layers beneath have in it; "x" says that files in it may have WHITEOUT."""
WHITEOUT = "trusted.overlay.whiteout"
"""Of an empty file: it is a whiteout."""
_HIDING = frozenset({OPAQUE, WHITEOUT})

# Of one file: ext4 always has room for so much, and for what the copy of a release file gets besides.
_BYTES_MAX = 3584
_BYTES_EACH = 20

_SETID = stat.S_ISUID | stat.S_ISGID


def read(node: int | str, where: str) -> Xattrs:
    """Extended attributes by name, as the author of the tree gave them: without what `relaxed()` adds to our copies.

    Args:
        where: what has them, in words.

    Raises:
        Refused: they are too large: nothing else bounds their size.
    """
    present = names(node)
    found: dict[str, bytes] = {}
    size = 0
    for name in present:
        if name == STRICT_XATTR and KEPT_STRICT_XATTR in present:
            continue
        value = os.getxattr(node, name, follow_symlinks=isinstance(node, int))
        if name == KEPT_STRICT_XATTR:
            name = STRICT_XATTR
        if name == STRICT_XATTR and not value:
            continue
        found[name] = value
        size += _BYTES_EACH + len(os.fsencode(name)) + len(value)
        if size > _BYTES_MAX:
            text = f"too many extended attributes: remove some, {_BYTES_MAX} bytes are the limit"
            raise Refused(f"{where} has {text} ({_BYTES_EACH} for each, its name, its value)")
    return sorted(found.items(), key=lambda item: os.fsencode(item[0]))


def require_unmarked(names: Iterable[str], where: str) -> None:
    """Refuse attributes by which overlayfs shows something else than what is there.

    OPAQUE and WHITEOUT only hide. All others (redirect, metacopy, origin, and those that are yet to come) are for
    overlayfs itself to write. `user.overlay.opaque` and `user.overlay.whiteout` count where root of a user namespace
    has mounted the overlay, and nowhere else; what hides something here must not show it there.

    Args:
        where: what has them, in words.

    Raises:
        Refused: there is one.
    """
    for name in names:
        space, _, mark = name.partition(".overlay.")
        if space not in ("trusted", "user") or not mark or name in _HIDING:
            continue
        why = "by which overlayfs shows something else: remove that"
        if f"trusted.overlay.{mark}" in _HIDING:
            why = f"which hides something in a user namespace alone: remove it, or have root set trusted.overlay.{mark}"
        raise Refused(f"{where} has the extended attribute {shown(name)}, {why}")


def names(node: int | str) -> list[str]:
    """Names of the attributes of a descriptor, or of the end of a path, which may be a link."""
    try:
        return os.listxattr(node, follow_symlinks=isinstance(node, int))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # an image that was made without any
            return []
        raise


def _set(node: int | str, xattrs: Xattrs) -> None:
    for name, value in xattrs:
        try:
            os.setxattr(node, name, value, follow_symlinks=isinstance(node, int))
        except OSError as error:
            if error.errno not in _XATTR_REFUSED:
                raise


def relaxed(xattrs: Xattrs) -> Xattrs:
    """The attributes of a release file's copy: systemd takes it under any name, and what the source said is kept."""
    values = dict(xattrs)
    values[KEPT_STRICT_XATTR] = values.get(STRICT_XATTR, b"")
    values[STRICT_XATTR] = b"0"
    return list(values.items())


def give(made: int, st: os.stat_result, xattrs: Xattrs) -> None:
    """Owner, mode, attributes and times, in the order in which none undoes another.

    Without root, user.* needs the write permission that the final mode may take away. chown(2) clears set-id bits and
    security.capability.
    """
    _set(made, [(name, value) for name, value in xattrs if name.startswith("user.")])
    mode = stat.S_IMODE(st.st_mode)
    if not _chown(made, st):
        # The copy has another owner: no set-id program for him, and he can read it.
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
