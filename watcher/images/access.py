# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a user could read a file, look up names in a directory or list it: by owner, mode and access control list.

The daemon may read everything, and tells a user no more than the kernel would let him read himself. To ask the kernel
in his name (setfsuid(2)) would take rights that the daemon's unit does not have. So this is the rule of acl(5), "ACCESS
CHECK ALGORITHM", and of path_resolution(7). What a security module would say to it is not known here.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from watcher.images.changes import Change, Side
from watcher.images.layers import Type
from watcher.images.walk import Path

READ = 4
SEARCH = 1

CLOSED = "what is in it is not shown to a user who could not list it"

T = TypeVar("T")

_ACL = "system.posix_acl_access"
_NO_ACL = frozenset({errno.ENODATA, errno.EOPNOTSUPP})

# include/uapi/linux/posix_acl_xattr.h and posix_acl.h.
_HEAD = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2
_USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x02, 0x04, 0x08, 0x10, 0x20


class User(NamedTuple):
    """Whose rights count; one without privileges.

    Attributes:
        groups: the primary and the supplementary ones, by number.
    """

    uid: int
    groups: frozenset[int]


def may(user: User, wanted: int, node: int | str, status: os.stat_result) -> bool:
    """Whether a user may do what is `wanted`, READ or SEARCH.

    Args:
        node: a descriptor, or a path by /proc/self/fd, of what `status` is about; no link.
    """
    if status.st_uid == user.uid or not status.st_mode & stat.S_IRWXG:
        # acl_permission_check() in fs/namei.c: no list is asked that could allow nothing but what the mode does.
        return _by_mode(user, wanted, status)
    try:
        acl = os.getxattr(node, _ACL, follow_symlinks=isinstance(node, int))
    except OSError as error:
        return error.errno in _NO_ACL and _by_mode(user, wanted, status)
    return _by_acl(user, wanted, status, acl)


def _by_mode(user: User, wanted: int, status: os.stat_result) -> bool:
    shift = 6 if status.st_uid == user.uid else 3 if status.st_gid in user.groups else 0
    return status.st_mode >> shift & wanted == wanted


def _by_acl(user: User, wanted: int, status: os.stat_result, acl: bytes) -> bool:
    """A list that is not understood lets nobody."""
    body = acl[_HEAD.size :]
    if len(acl) < _HEAD.size or _HEAD.unpack_from(acl) != (_VERSION,) or len(body) % _ENTRY.size:
        return False
    entries = list(_ENTRY.iter_unpack(body))
    mask = next((bits for tag, bits, _ in entries if tag == _MASK), READ | SEARCH)

    def allowed(kind: int, ids: frozenset[int] | None = None) -> list[int]:
        return [bits for tag, bits, who in entries if tag == kind and (ids is None or who in ids)]

    if named := allowed(_USER, frozenset({user.uid})):
        found = [bits & mask for bits in named]
    else:
        groups = allowed(_GROUP_OBJ) if status.st_gid in user.groups else []
        groups += allowed(_GROUP, user.groups)
        # Who is in one of these groups is not one of the others, even if none of them lets him.
        found = [bits & mask for bits in groups] if groups else allowed(_OTHER)
    return any(bits & wanted == wanted for bits in found)


def may_search(user: User, directory: int) -> bool:
    """Whether a user could look up names in a directory, which may be open for its path alone (O_PATH)."""
    return may(user, SEARCH, f"/proc/self/fd/{directory}/.", os.fstat(directory))


def may_read(user: User, side: Side | None, path: Path) -> bool:
    """Whether there is no file that a user could not read, if he gets there."""
    return side is None or side.node.type is not Type.FILE or may(user, READ, *_found(side, path))


def _may_list(user: User, side: Side | None, path: Path) -> bool:
    """Whether there is no directory that a user could not list with what stat(2) tells, if he gets there."""
    if side is None or side.node.type is not Type.DIRECTORY:
        return True
    return all(may(user, wanted, *_found(side, path)) for wanted in (READ, SEARCH))


def _found(side: Side, path: Path) -> tuple[str, os.stat_result]:
    return f"/proc/self/fd/{side.directory}/{path[-1] if path else '.'}", side.node.status


def told(
    found: Iterable[Change],
    user: User | None,
    look: Callable[[Change], T | None],
    closed: Callable[[Change, T | None], T],
) -> Iterator[T]:
    """What comes of changes. A user is told nothing of what is in a directory that he could not list in each of the two
    stacks that has it, but that something comes of that.

    Args:
        found: depth first, each directory before what is in it.
        user: None: is told all.
        look: what comes of a change, None: nothing.
        closed: gets such a directory and what came of that itself, and returns what is to be told then.
    """
    shut: Change | None = None
    said: T | None = None
    hides = False
    for change in found:
        if shut is not None and change.path[: len(shut.path)] == shut.path:
            if not hides and look(change) is not None:
                said, hides = closed(shut, said), True
            continue
        if shut is not None and said is not None:
            yield said
        shut, said, hides = None, look(change), False
        if user is None or all(_may_list(user, side, change.path) for side in (change.before, change.after)):
            if said is not None:
                yield said
        else:
            shut = change
    if shut is not None and said is not None:
        yield said
