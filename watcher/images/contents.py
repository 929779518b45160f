# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file, link or directory is and has in it, for `diff`: bounded, whatever it is.

Nothing but regular files is opened. What is no larger than `TEXT_MAX` and has no NUL in it is text; of everything else
there is a SHA-256, up to `BYTES_MAX` bytes of all files together. A hole takes as long to read as data.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from watcher.images import attributes
from watcher.images.changes import BYTES_MAX, Side, open_file
from watcher.images.extension import KEPT_STRICT_XATTR, STRICT_XATTR
from watcher.images.layers import Node, Type
from watcher.images.walk import Path

TEXT_MAX = 1 << 20
"""Bytes of a file that is shown line by line."""

_CHUNK = 1 << 18
_OVERLAY = ".overlay."


@dataclass(frozen=True, slots=True)
class Contents:
    """What one side of a change is.

    Attributes:
        target: of a link.
        text: None: it is no text, or no file.
        sha256: of a file, hexadecimal digits; "": more than is read.
    """

    node: Node
    target: str = ""
    text: bytes | None = None
    sha256: str = ""


class Reader:
    """Reads both sides of changes, and no more than `BYTES_MAX` bytes of files."""

    def __init__(self) -> None:
        self._left = BYTES_MAX

    def read(self, side: Side, path: Path) -> Contents:
        """What a side is.

        Raises:
            Busy: it changed meanwhile.
            OSError: it cannot be read.
        """
        if side.node.type is Type.LINK:
            return Contents(side.node, os.readlink(path[-1], dir_fd=side.directory))
        if side.node.type is not Type.FILE:
            return Contents(side.node)
        size = side.node.status.st_size
        if size > self._left:
            return Contents(side.node)
        self._left -= size
        fd = open_file(side, path)
        try:
            if size > TEXT_MAX:
                return Contents(side.node, sha256=_digest(fd, size))
            data = _read(fd, size)
        finally:
            os.close(fd)
        text = None if b"\0" in data else data
        return Contents(side.node, text=text, sha256=hashlib.sha256(data).hexdigest())


def _read(fd: int, size: int) -> bytes:
    """As much as it had when it was looked at: it may grow without end meanwhile."""
    parts = []
    while size and (part := os.read(fd, min(size, _CHUNK))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _digest(fd: int, size: int) -> str:
    hasher = hashlib.sha256()
    while size and (part := os.read(fd, min(size, _CHUNK))):
        hasher.update(part)
        size -= len(part)
    return hasher.hexdigest()


def xattrs(side: Side | None, path: Path) -> dict[str, bytes]:
    """Without the marks of overlayfs, and as the author of the layer gave them. Raises OSError."""
    if side is None:
        return {}
    node: int | str = f"/proc/self/fd/{side.directory}/{path[-1]}" if path else side.directory
    found = {}
    names = attributes.names(node)
    for name in names:
        if _OVERLAY in name or (name == STRICT_XATTR and KEPT_STRICT_XATTR in names):
            continue
        value = os.getxattr(node, name, follow_symlinks=isinstance(node, int))
        if name == KEPT_STRICT_XATTR:
            name = STRICT_XATTR
        if value or name != STRICT_XATTR:
            found[name] = value
    return found
