# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real paths that routes go through, and one inotify watch for each directory among them.

All routes share the nodes. A service has about seven routes, so these objects are small. A watch asks for as little as
will do:

- A directory that a route passes through: it is moved or deleted itself (MOVE_SELF, DELETE_SELF), its mode changes
  (ATTRIB), or a name in it is deleted (DELETE). DELETE_SELF alone comes too late where a shell still has the directory
  as its cwd: it waits for the inode's end.
- A directory that holds a link of the route, or lacks its next component: names that come and go.
- The end of a route: all its entries. With Scope.TREE also the entries of all directories below.

The identity of a directory is its watch descriptor. The kernel gives the same number for an inode as long as the inode
lives and is watched, and a new number after that. Inode numbers are used again at once.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from inotify_simple import INotify, flags

from watcher.model import Interest, Scope
from watcher.resolve.strict_modes import components

PASSED: int = flags.DELETE_SELF | flags.MOVE_SELF | flags.ATTRIB | flags.DELETE
NAMED: int = PASSED | flags.CREATE | flags.MOVED_FROM | flags.MOVED_TO
CHILDREN: int = NAMED | flags.CLOSE_WRITE
# truncate(2) by path says no more than IN_MODIFY. For images that is not worth a wake-up for each write of an upload.
TREE: int = CHILDREN | flags.MODIFY

OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

FORETOLD = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG))
"""A path that ends in one of these goes on with an event. For any other errno no event tells when it is over."""

UNANSWERED = errno.ENOTRECOVERABLE
"""For what is left alone because it does not answer: an errno that no file system has."""


class Route:
    """An interest, the keys that have it, and where its path led when it was last followed.

    Attributes:
        matches: tells whether a name matters.
        nodes: where the path ends, crosses a link, or turns back at `..`. All else on it is above one of these.
        state: watch descriptor of the directory that the path leads to, or the negative errno that stopped it;
            0: not followed yet.
    """

    __slots__ = ("interest", "keys", "matches", "nodes", "state")

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.matches = (
            re.compile(interest.pattern, re.DOTALL).fullmatch if interest.pattern is not None else bool
        )
        self.keys: set[str] = set()
        self.nodes: tuple[Node, ...] = ()
        self.state = 0

    @property
    def is_tree(self) -> bool:
        return self.interest.scope is Scope.TREE


class Node:
    """A real path: its parent's and one more name. That name is a link only where a route crosses it.

    Attributes:
        routes: those that have this among their `nodes`.
        ends: those of `routes` that lead to this directory.
        wd: watch descriptor; None: not a directory, or not watched.
        in_tree: in the tree of some route (Scope.TREE).
        level: how many directories lie between this and the root.
        barred: the file system here does not answer, so that nothing here and below is looked up.
        counted: if `in_tree` and listed: the top of the tree that it was listed for, and how many entries it had.
    """

    __slots__ = (
        "barred",
        "children",
        "counted",
        "ends",
        "in_tree",
        "level",
        "name",
        "parent",
        "routes",
        "wd",
    )

    def __init__(self, parent: Node | None, name: str) -> None:
        self.parent = parent
        self.name = name
        self.children: dict[str, Node] = {}
        self.routes: set[Route] = set()
        self.ends: tuple[Route, ...] = ()
        self.wd: int | None = None
        self.in_tree = False
        self.barred = False
        self.level: int = 0 if parent is None else parent.level + 1
        self.counted: tuple[Node, int] | None = None

    @property
    def path(self) -> str:
        names = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            names.append(node.name)
            node = node.parent
        return "/" + "/".join(reversed(names))

    def child(self, name: str) -> Node:
        """The node of a name in this directory; made if there is none yet."""
        node = self.children.get(name)
        if node is None:
            node = self.children[name] = Node(self, name)
        return node

    def below(self) -> Iterator[Node]:
        """This node and all under it."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(node.children.values())

    def routes_below(self) -> set[Route]:
        return set().union(*(node.routes for node in self.below()))

    def trees(self) -> Iterator[Route]:
        """Routes in whose tree this is."""
        node: Node | None = self
        while node is not None and node.in_tree:
            yield from (route for route in node.ends if route.is_tree)
            node = node.parent

    @property
    def is_top(self) -> bool:
        """A tree begins here."""
        return any(route.is_tree for route in self.ends)

    def nearest_top(self) -> Node:
        """Where the tree begins in which this is; this node itself if it is in none."""
        node = self
        while not node.is_top and node.in_tree and node.parent is not None and node.parent.in_tree:
            node = node.parent
        return node


class Abandoned(Exception):
    """This thread has hung, and another one follows the paths in its place."""


@dataclass(slots=True)
class _Watch:
    """One inotify watch. Several nodes share it where a directory is mounted at several places."""

    mask: int = 0
    nodes: list[Node] = field(default_factory=list)


class WatchedDirectories:
    """All nodes, and their watches.

    Attributes:
        root: the node of `/`.
        dirty: routes to be followed again.
        relist: directories in trees whose subdirectories may be others now.
        changed: routes that show something else now, for the caller to take away.
        additions: how many watches were added, moved or widened so far.
        steps: how many steps on paths were made; one that hangs is the last.
        at: where the last one was made.
        abandoned: set by another thread; no further step is made.
    """

    def __init__(self, inotify: INotify) -> None:
        self._inotify = inotify
        self._watches: dict[int, _Watch] = {}
        self.root = self.at = Node(None, "/")
        self.steps = self.additions = 0
        self.abandoned = False
        self.dirty: set[Route] = set()
        self.relist: set[Node] = set()
        self.changed: set[Route] = set()

    def __len__(self) -> int:
        """How many watches there are."""
        return len(self._watches)

    def nodes(self, wd: int) -> Iterable[Node]:
        """The paths of the directory that an event is about; none if it is not watched any more."""
        watch = self._watches.get(wd)
        return tuple(watch.nodes) if watch else ()

    def lost(self, wd: int) -> None:
        """The kernel has dropped this watch."""
        watch = self._watches.pop(wd, None)
        for node in watch.nodes if watch else ():
            node.wd = None

    def lost_events(self) -> None:
        """Anything may have happened to any node, unseen."""
        for node in self.root.below():
            self.dirty |= node.routes
            if node.in_tree:
                self.relist.add(node)

    def bar(self, path: str) -> None:
        """From now on leave alone what is at `path` and below it. To be called before anything is followed."""
        self._node(path).barred = True

    def unbar(self, path: str) -> None:
        """It may answer again."""
        node = self._node(path)
        node.barred = False
        self.dirty |= node.routes_below()
        if node.parent is not None and node.parent.in_tree:
            self.relist.add(node.parent)
        self.prune(node)

    def _node(self, path: str) -> Node:
        node = self.root
        for name in components(path):
            node = node.child(name)
        return node

    def step(self, node: Node) -> None:
        """To be called before each system call that looks up the path of `node`.

        Raises:
            Abandoned: this thread is to end.
            OSError: UNANSWERED.
        """
        if self.abandoned:
            raise Abandoned
        if node.barred:
            raise OSError(UNANSWERED, os.strerror(UNANSWERED))
        self.at = node
        self.steps += 1

    def watch(self, node: Node, fd: int, mask: int) -> int:
        """Watch the directory of `node`, open as `fd`, at least for `mask`. Returns 0 or the errno."""
        try:
            self.step(node)
            wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", mask | flags.MASK_ADD | flags.ONLYDIR)
        except OSError as error:
            self.unwatch(node)
            return error.errno or errno.EIO
        watch = self._watches.setdefault(wd, _Watch())
        if mask & ~watch.mask:
            watch.mask |= mask
            self.additions += 1
        if node.wd != wd:
            self.unwatch(node)
            node.wd = wd
            watch.nodes.append(node)
            self.additions += 1
            if node.in_tree:
                self.relist.add(node)  # it is another directory now, with others in it
        return 0

    def unwatch(self, node: Node) -> None:
        """What was found at `node` and below it is not true any more."""
        if node.wd is not None:
            self.dirty |= node.routes_below()
            self._release(node)

    def _release(self, node: Node) -> None:
        wd, node.wd = node.wd, None
        if wd is None or (watch := self._watches.get(wd)) is None:
            return
        watch.nodes.remove(node)
        if watch.nodes:
            return
        del self._watches[wd]
        try:
            self._inotify.rm_watch(wd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the directory went, and its watch with it
                raise

    def prune(self, node: Node) -> None:
        """Forget the nodes that no route needs, from here upwards."""
        while node.parent is not None and not (node.routes or node.children or node.in_tree or node.barred):
            self._release(node)
            if node.parent.children.get(node.name) is node:
                del node.parent.children[node.name]
            node = node.parent


class OpenDirectories:
    """Directories that stay open while routes are followed, so that paths side by side open their ancestors once.

    A context manager, which closes them. The least recently used one is closed earlier when there are too many: no
    path, however deep, takes all descriptors.

    Attributes:
        errors: for each directory that a route has passed, the errno for which it is not watched, or 0.
    """

    MAX = 64

    def __init__(self, directories: WatchedDirectories) -> None:
        self._directories = directories
        self._fds: dict[Node, int] = {}  # the least recently used first
        self.errors: dict[Node, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def __getitem__(self, node: Node) -> int:
        """Descriptor (O_PATH) of the directory of `node`, good until the next call.

        Raises:
            OSError: as openat(2); ENOTDIR for a link too.
        """
        missing = []
        at: Node | None = node
        while at is not None and at not in self._fds:
            missing.append(at)
            at = at.parent
        fd = None
        if at is not None:
            fd = self._fds[at] = self._fds.pop(at)
        for part in reversed(missing):
            self._directories.step(part)
            fd = self._fds[part] = os.open(part.name, OPEN, dir_fd=fd)
            if len(self._fds) > self.MAX:
                os.close(self._fds.pop(next(iter(self._fds))))
        return self._fds[node]
