# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which layer of an overlay a path comes from, and what it covers there. By descriptor, without that overlay.

The overlay itself shows the result, and does not tell where it is from. So this looks a path up in each layer, and
joins what it finds as overlayfs does (ovl_lookup() in fs/overlayfs/namei.c, for an overlay without an upper layer):

- a whiteout ends the look-up: nothing is there;
- so does the first file, and every other thing that is no directory;
- directories are joined, down to one that is opaque, or up to something else, which is covered;
- owner and mode of joined directories are the uppermost one's;
- a redirect or a metacopy mark makes the name unusable (EPERM): a stack has `redirect_dir=nofollow,metacopy=off`.
  Admission lets none in.

In the lowest layer that has the parent, marks of a directory do not count. The roots are joined, whatever they say.
"""

from __future__ import annotations

import enum
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from watcher.images.walk import DIRECTORY, Path
from watcher.model import DEPTH_MAX, Refused, shown
from watcher.mounts.descriptors import Descriptors

LINKS_MAX = 40
"""MAXSYMLINKS of the kernel (path_resolution(7))."""


class Type(enum.Enum):
    """What a layer has under a name."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    FIFO = "FIFO"
    SOCKET = "socket"
    DEVICE = "device"
    WHITEOUT = "whiteout"


class Node(NamedTuple):
    """What one layer has under a name.

    Attributes:
        layer: its number.
        opaque: a directory that hides what is beneath.
        refused: it has a mark that a stack does not follow.
    """

    layer: int
    type: Type
    status: os.stat_result
    opaque: bool = False
    refused: bool = False


class Merged(NamedTuple):
    """What an overlay makes of the nodes under one name, topmost first.

    Attributes:
        parts: what is shown: nothing, one node, or the directories that are joined.
        covered: what is not, beneath `end`.
        end: what ended the look-up, None if nothing did.
        refused: the kernel will not look the name up.
    """

    parts: Sequence[Node]
    covered: Sequence[Node] = ()
    end: Node | None = None
    refused: bool = False


def merge(nodes: Sequence[Node], lowest: int) -> Merged:
    """The rule. Pure.

    Args:
        nodes: those of the layers that are joined in the parent directory, topmost first.
        lowest: number of the lowest one of these layers, whether it has such a node or not.
    """
    for count, node in enumerate(nodes):
        if node.type is not Type.DIRECTORY:
            if count:  # above are directories, which cover it
                return Merged(nodes[:count], nodes[count:], nodes[count - 1])
            if node.type is Type.WHITEOUT:
                return Merged((), nodes[1:], node)
            return Merged(nodes[:1], nodes[1:], node, node.refused)
        if node.layer == lowest:
            break
        if node.opaque:
            return Merged(nodes[: count + 1], nodes[count + 1 :], node)
        if node.refused:
            return Merged(nodes[: count + 1], nodes[count + 1 :], node, True)
    return Merged(nodes)


class Role(enum.Enum):
    """What becomes of a node."""

    SHOWN = "shown"
    MERGED = "merged"  # a directory whose content is seen, beneath one whose owner and mode are
    WHITEOUT = "whiteout"
    COVERED = "covered"


@dataclass(frozen=True, slots=True)
class Item:
    """One node of a chain.

    Attributes:
        by: of what is covered, the layer that covers it.
        at: by what it has at this path.
    """

    node: Node
    role: Role
    by: int | None = None
    at: Path = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A path, without links in it but perhaps its end, and what each layer has there.

    Attributes:
        path: below `/etc`.
        chain: topmost first.
        target: of the link that is there, "" if none is.
        problem: why the path cannot be used, or is not told; "" if it can. Then it ends here.
        outside: the path leads out of `/etc`, to this absolute one.
    """

    path: Path
    chain: tuple[Item, ...] = ()
    target: str = ""
    problem: str = ""
    outside: str = ""

    @property
    def shown(self) -> Node | None:
        """What is seen there."""
        return next((item.node for item in self.chain if item.role is Role.SHOWN), None)


class _Place(NamedTuple):
    """A layer's directory at a path; `by` and `at` as of an `Item` if it is covered."""

    layer: int
    fd: int
    by: int | None = None
    at: Path = ()


class Layers:
    """Directories that are stacked on one another.

    Args:
        roots: their descriptors, topmost first; the last one is the base.
        privileged: False: the overlay was mounted in a user namespace, where `user.overlay.` attributes count.
        may_search: whether who asks may look up names in a directory, by its descriptor.
    """

    def __init__(
        self,
        roots: Sequence[int],
        *,
        privileged: bool = True,
        may_search: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.roots = roots
        self._may_search = may_search
        space = "trusted" if privileged else "user"
        self._opaque = f"{space}.overlay.opaque"
        self._whiteout = f"{space}.overlay.whiteout"
        self._refused = (f"{space}.overlay.redirect", f"{space}.overlay.metacopy")

    def look_up(self, layer: int, directory: int, name: str, *, marks: bool = True) -> Node | None:
        """What a layer has under a name in a directory of it; None: nothing.

        Args:
            marks: also those that no admitted layer has.
        """
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self.node(layer, directory, name, status, marks=marks)

    def node(
        self, layer: int, directory: int, name: str, status: os.stat_result, *, marks: bool = False
    ) -> Node:
        """The same, of what stat(2) has said already."""
        mode = status.st_mode
        if stat.S_ISREG(mode):
            if not status.st_size and _xattr(directory, name, self._whiteout) is not None:
                return Node(layer, Type.WHITEOUT, status)
            return Node(layer, Type.FILE, status, False, marks and self._is_refused(directory, name))
        if stat.S_ISDIR(mode):
            opaque = _xattr(directory, name, self._opaque) == b"y"
            return Node(layer, Type.DIRECTORY, status, opaque, marks and self._is_refused(directory, name))
        if stat.S_ISCHR(mode) and not status.st_rdev:
            return Node(layer, Type.WHITEOUT, status)
        return Node(layer, _TYPES.get(stat.S_IFMT(mode), Type.DEVICE), status)

    def _is_refused(self, directory: int, name: str) -> bool:
        return any(_xattr(directory, name, mark) is not None for mark in self._refused)

    def find(self, path: str) -> Iterator[Found]:
        """What each layer has at an absolute path: of each link on the way, and of its end, and what that leads to.

        Raises:
            Refused: the path is too deep.
        """
        ahead = deque(_split(path))
        behind: list[str] = []
        links = 0
        while ahead:
            name = ahead.popleft()
            if name == "..":
                behind = behind[:-1]
                continue
            behind.append(name)
            if behind[0] != "etc":
                yield Found((), outside="/" + "/".join((*behind, *ahead)))
                return
            if len(behind) > DEPTH_MAX:
                raise Refused(f"{shown(path)}: nested too deeply: {DEPTH_MAX} levels are the limit")
            found = self._chain(tuple(behind[1:]))
            if found.target:
                links += 1
                if links > LINKS_MAX:
                    yield _with_problem(found, "too many links, it may lead round in a circle")
                    return
                yield found
                ahead.extendleft(reversed(_split(found.target)))
                behind = [] if found.target.startswith("/") else behind[:-1]
                continue
            node = found.shown
            if found.problem or not ahead:
                yield found
                return
            if node is not None and node.type is not Type.DIRECTORY:
                yield _with_problem(found, f"is no directory, so there is no {shown('/'.join(ahead))} in it")
                return
        yield self._chain(tuple(behind[1:])) if behind else Found((), outside="/")

    def _chain(self, path: Path) -> Found:
        """What each layer has at a path, of which only the end may be a link.

        What is shown is told to who could look it up in the overlay; the rest, if he could in the layer, too.
        """
        with Descriptors() as fds:
            places = [_Place(layer, fd) for layer, fd in enumerate(self.roots)]
            items = [Item(self._root(place), Role.MERGED if place.layer else Role.SHOWN) for place in places]
            refused, unseen = False, set[int]()
            for count, name in enumerate(path, 1):
                closed = [place for place in places if not self._may_search(place.fd)]
                if closed and next((place for place in places if place.by is None), None) in closed:
                    place = shown("/".join(("/etc", *path[: count - 1])))
                    return Found(path, problem=f"not shown to a user who could not look up names in {place}")
                unseen.update(place.layer for place in closed)
                items, refused = self._at(places, name, path[:count])
                if refused or count == len(path):
                    break
                places = [_open(fds, items, place, name) for place in places if _has_directory(items, place)]
            first = items[0] if items else None
            target = ""
            if (
                first is not None
                and first.role is Role.SHOWN
                and first.node.type is Type.LINK
                and not refused
            ):
                parent = next(place.fd for place in places if place.layer == first.node.layer)
                target = os.readlink(path[-1], dir_fd=parent)
        problem = "overlayfs refuses it for a mark (redirect or metacopy) that a stack does not follow"
        told = (item for item in items if item.role is Role.SHOWN or item.node.layer not in unseen)
        return Found(path, tuple(told), target, problem if refused else "")

    def _root(self, place: _Place) -> Node:
        return Node(place.layer, Type.DIRECTORY, os.fstat(place.fd))

    def _at(self, places: Sequence[_Place], name: str, path: Path) -> tuple[list[Item], bool]:
        """What the places have under a name, and whether the kernel refuses it."""
        joined = [place for place in places if place.by is None]
        found = [node for place in joined if (node := self.look_up(place.layer, place.fd, name))]
        merged = merge(found, joined[-1].layer if joined else -1)
        items = [
            Item(node, Role.SHOWN if not count else Role.MERGED) for count, node in enumerate(merged.parts)
        ]
        if merged.end is not None and merged.end.type is Type.WHITEOUT:
            items.append(Item(merged.end, Role.WHITEOUT))
        if merged.end is not None:
            items += [Item(node, Role.COVERED, merged.end.layer, path) for node in merged.covered]
        for place in places:
            if place.by is not None and (node := self.look_up(place.layer, place.fd, name)):
                items.append(Item(node, Role.COVERED, place.by, place.at))
        return sorted(items, key=lambda item: item.node.layer), merged.refused


def _has_directory(items: Iterable[Item], place: _Place) -> bool:
    return any(item.node.layer == place.layer and item.node.type is Type.DIRECTORY for item in items)


def _open(fds: Descriptors, items: Sequence[Item], place: _Place, name: str) -> _Place:
    item = next(item for item in items if item.node.layer == place.layer)
    return _Place(place.layer, fds.add(os.open(name, DIRECTORY, dir_fd=place.fd)), item.by, item.at)


def _with_problem(found: Found, problem: str) -> Found:
    return Found(found.path, found.chain, found.target, problem)


def _split(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _xattr(directory: int, name: str, attribute: str) -> bytes | None:
    try:
        return os.getxattr(f"/proc/self/fd/{directory}/{name}", attribute, follow_symlinks=False)
    except OSError:  # there is none, or no attributes at all
        return None


_TYPES = {
    stat.S_IFLNK: Type.LINK,
    stat.S_IFIFO: Type.FIFO,
    stat.S_IFSOCK: Type.SOCKET,
    stat.S_IFBLK: Type.DEVICE,
    stat.S_IFCHR: Type.DEVICE,
}
