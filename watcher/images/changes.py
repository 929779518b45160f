# SPDX-License-Identifier: LGPL-2.1-or-later
"""What differs between two stacks of the same layers, name by name. Only where layers are not shared is looked.

The host's `/etc` has thousands of files, which two stacks on it have in common: it is asked for the names that the
other layers have, and read as a whole only where one of the two stacks hides it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from watcher.images.layers import Layers, Node, Type, merge
from watcher.images.walk import DIRECTORY, Path, Walk, where
from watcher.model import Busy
from watcher.mounts.descriptors import Descriptors

BYTES_MAX = 256 << 20
"""Bytes of files that are compared, all together. One that would be more counts as different."""

_CHUNK = 1 << 18
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# open(2) and read(2) fail so when a name is no longer what stat(2) saw.
_CHANGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK})


class Side(NamedTuple):
    """What one of the two stacks shows under a name.

    Attributes:
        node: of the uppermost layer that is part of it.
        directory: descriptor of the directory that this layer has it in; open until the next change is asked for.
    """

    node: Node
    directory: int


class Change(NamedTuple):
    """A name that the two stacks do not have from the same layers; perhaps it is the same all the same.

    Attributes:
        path: below the roots, which are ().
        before, after: None: nothing is there.
        nodes: what each layer has there that is looked at, topmost first, whether it is shown or not.
    """

    path: Path
    before: Side | None
    after: Side | None
    nodes: Sequence[Node]


class Places(NamedTuple):
    """The directories of one stack at a path.

    Attributes:
        layers: their numbers, topmost first.
        fds: their descriptors, by the layer's number.
    """

    layers: Sequence[int]
    fds: dict[int, int]

    def parts(self, nodes: dict[int, Node]) -> Sequence[Node]:
        """What is shown of the nodes under one name: `Merged.parts`."""
        if not self.layers:
            return ()
        if len(nodes) == 1:  # which is nearly always
            (node,) = nodes.values()
            return (node,) if node.layer in self.fds and node.type is not Type.WHITEOUT else ()
        return merge([nodes[layer] for layer in self.layers if layer in nodes], self.layers[-1]).parts


def changes(layers: Layers, before: Sequence[int], after: Sequence[int]) -> Iterator[Change]:
    """What is not the same by construction, depth first, names in the order of their bytes.

    Args:
        before, after: numbers of layers, topmost first. A higher number is beneath a lower one only where both have it.

    Raises:
        Refused: a directory is nested too deeply, or there are too many entries.
        Busy: it changed while it was looked at.
        OSError: it cannot be read.
    """
    return _Walk(layers).root(before, after)


class _Walk(Walk):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._layers = layers

    def root(self, before: Sequence[int], after: Sequence[int]) -> Iterator[Change]:
        with Descriptors() as fds:
            # To read them: they may be there for paths alone (O_PATH).
            roots = {
                layer: fds.add(os.open(".", DIRECTORY, dir_fd=self._layers.roots[layer]))
                for layer in {*before, *after}
            }
            nodes = [Node(order[0], Type.DIRECTORY, os.fstat(roots[order[0]])) for order in (before, after)]
            one, other = (Side(node, roots[node.layer]) for node in nodes)
            yield Change((), one, other, ())
            places = [Places(order, {layer: roots[layer] for layer in order}) for order in (before, after)]
            yield from self._directory((), *places)

    def _directory(self, path: Path, before: Places, after: Places) -> Iterator[Change]:
        fds = before.fds | after.fds
        shared = _shared(before.layers, after.layers)
        found: dict[str, dict[int, Node]] = {}
        for layer, fd in fds.items():
            if layer not in shared:
                self._scan(layer, fd, path, found)
        order = sorted(fds)
        # The names of one layer are in order already.
        for name in found if len(fds) - len(shared) == 1 else sorted(found, key=os.fsencode):
            nodes = found[name]
            for layer in shared:
                node = self._layers.look_up(layer, fds[layer], name, marks=False)
                if node is not None:
                    nodes[layer] = node
            one, other = before.parts(nodes), after.parts(nodes)
            if one == other:  # from the same layers
                continue
            inner = (*path, name)
            known = [nodes[layer] for layer in order if layer in nodes]
            yield Change(inner, _side(one, fds), _side(other, fds), known)
            if _is_directory(one) or _is_directory(other):
                with Descriptors() as opened:
                    yield from self._directory(
                        inner, _open(opened, one, fds, inner), _open(opened, other, fds, inner)
                    )

    def _scan(self, layer: int, fd: int, path: Path, found: dict[str, dict[int, Node]]) -> None:
        node, stat_ = self._layers.node, os.stat
        for name in self.names(fd, path):
            try:
                status = stat_(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:  # it is gone meanwhile
                continue
            found.setdefault(name, {})[layer] = node(layer, fd, name, status)


def _shared(before: Sequence[int], after: Sequence[int]) -> Sequence[int]:
    """The layers of both, if they lie in the same order: what only these have is the same."""
    both = set(before) & set(after)
    shared = [layer for layer in before if layer in both]
    return shared if shared == [layer for layer in after if layer in both] else ()


def _side(parts: Sequence[Node], fds: dict[int, int]) -> Side | None:
    return Side(parts[0], fds[parts[0].layer]) if parts else None


def _is_directory(parts: Sequence[Node]) -> bool:
    return bool(parts) and parts[0].type is Type.DIRECTORY


def _open(opened: Descriptors, parts: Sequence[Node], fds: dict[int, int], path: Path) -> Places:
    if not _is_directory(parts):
        return Places((), {})
    try:
        inner = {
            node.layer: opened.add(os.open(path[-1], DIRECTORY, dir_fd=fds[node.layer])) for node in parts
        }
    except OSError as error:
        raise _with_path(error, path) from error
    if not all(_is_still(node, inner[node.layer]) for node in parts):
        raise _with_path(OSError(errno.ELOOP, ""), path)
    return Places([node.layer for node in parts], inner)


def _with_path(error: OSError, path: Path) -> Exception:
    if error.errno in _CHANGED:
        return Busy(f"/etc/{where(path)[: -len(' in it')]} changed while it was looked at: try again")
    return OSError(error.errno, error.strerror, "/".join(("/etc", *path)))


def open_file(side: Side, path: Path) -> int:
    """A descriptor of a regular file, which never waits. Raises Busy: it is another one by now; OSError."""
    try:
        fd = os.open(path[-1], _FILE, dir_fd=side.directory)
    except OSError as error:
        raise _with_path(error, path) from error
    if not _is_still(side.node, fd):
        os.close(fd)
        raise _with_path(OSError(errno.ELOOP, ""), path)
    return fd


def _is_still(node: Node, fd: int) -> bool:
    """Whether what was opened is what was looked at, for the same users.

    A look may take minutes. Meanwhile the base may get a secret where there was a file for all.
    """
    one, other = node.status, os.fstat(fd)
    return os.path.samestat(one, other) and (one.st_mode, one.st_uid, one.st_gid) == (
        other.st_mode,
        other.st_uid,
        other.st_gid,
    )


class Comparison:
    """Compares what both sides of a change show, and reads no more than `BYTES_MAX`."""

    def __init__(self) -> None:
        self._left = BYTES_MAX

    def same(self, change: Change) -> bool:
        """Whether type, mode, owner and content are the same; of a directory, without what is in it."""
        one, other = change.before, change.after
        if one is None or other is None or _visible(one.node) != _visible(other.node):
            return False
        if one.node.type is Type.LINK:
            name = change.path[-1]
            return os.readlink(name, dir_fd=one.directory) == os.readlink(name, dir_fd=other.directory)
        if one.node.type is Type.FILE and not os.path.samestat(one.node.status, other.node.status):
            if one.node.status.st_size > self._left:
                return False
            self._left -= one.node.status.st_size
            with Descriptors() as fds:
                return _same_content(
                    fds.add(open_file(one, change.path)),
                    fds.add(open_file(other, change.path)),
                    one.node.status.st_size,
                )
        return True


def _same_content(one: int, other: int, size: int) -> bool:
    """Whether so many bytes are the same: a file may grow without end meanwhile."""
    while size > 0:
        first, second = os.read(one, _CHUNK), os.read(other, _CHUNK)
        if first != second:
            return False
        if not first:
            return True
        size -= len(first)
    return True


def _visible(node: Node) -> tuple[object, ...]:
    status = node.status
    size = status.st_size if node.type is Type.FILE else 0
    return node.type, status.st_mode, status.st_uid, status.st_gid, status.st_rdev, size
