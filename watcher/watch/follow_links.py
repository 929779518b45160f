# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follows routes through links, and watches all that they depend on.

inotify watches inodes, people mean paths. A path changes its meaning when a link on it is pointed elsewhere, when an
ancestor is renamed, when something is mounted over it, when it is removed and made anew. The alternatives:

- Watch the parent of everything, all the way up, by name. Right, but every file made in `/tmp` wakes the daemon.
- fanotify with FAN_MARK_FILESYSTEM. It needs CAP_SYS_ADMIN, and brings the events of the whole file system.
- Poll. The design has a number for that: 0 wake-ups.

So each path is followed component by component, through O_PATH descriptors, and each directory on it is watched
(watched_directories.py). No descriptor stays open: it would keep a file system from being unmounted.

A path is followed again until nothing new had to be watched on it. Then all of it was watched before the last look, and
no change can have slipped through in between.
"""

from __future__ import annotations

import errno
import os

from inotify_simple import INotify

from watcher.resolve.strict_modes import LINKS_MAX, components
from watcher.watch.watched_directories import (
    CHILDREN,
    FORETOLD,
    NAMED,
    PASSED,
    TREE,
    UNANSWERED,
    Node,
    OpenDirectories,
    Route,
    WatchedDirectories,
)
from watcher.watch.watched_trees import WatchedTrees

LEVELS_MAX = 2048
"""No directory further down has a path that a system call takes: PATH_MAX is 4096 bytes. Links can lead there."""

ROUNDS = 16
"""After so many rounds in a row something else may run, though paths still change under our hands."""


class Follower:
    """Keeps all routes followed.

    Attributes:
        directories: what is watched, and what is to be done about it.
        trees: those below routes with Scope.TREE.
    """

    def __init__(self, inotify: INotify) -> None:
        self.directories = WatchedDirectories(inotify)
        self.trees = WatchedTrees(self.directories)
        self._gaps: dict[Route, int] = {}

    def gaps(self) -> dict[Route, int]:
        """Routes of which a part cannot be watched, and the errno why. No event tells when it can be."""
        return self.trees.gaps() | self._gaps

    def polled(self) -> set[Route]:
        """Those of the gaps that must be looked at from time to time; what does not answer tells when it does."""
        return {route for route, reason in self.gaps().items() if reason != UNANSWERED}

    def run(self) -> bool:
        """Follow what is dirty until nothing new had to be watched; False: not done yet, call again."""
        todo = self.directories
        for _ in range(ROUNDS):
            if not todo.dirty and not todo.relist:
                return True
            dirty, todo.dirty = todo.dirty, set()
            with OpenDirectories(todo) as opened:
                for route in dirty:
                    self._follow(route, opened)
                relist, todo.relist = todo.relist, set()
                for node in relist:
                    self.trees.watch_below(node, opened)
        return False

    def retry(self) -> None:
        """See whether what could not be watched can be now."""
        self.directories.dirty.update(self.gaps())
        self.trees.retry()

    def forget(self, route: Route) -> None:
        """No key has this interest any more."""
        self.directories.dirty.discard(route)
        self.directories.changed.discard(route)
        self._gaps.pop(route, None)
        for node in route.nodes:
            self._leave_end(route, node)
            self._leave(route, node)

    def _follow(self, route: Route, opened: OpenDirectories) -> None:
        """Follow one route, and note where it leads now."""
        additions = self.directories.additions
        self._gaps.pop(route, None)
        before, state = route.nodes, route.state
        turns: list[Node] = []
        try:
            now = self._walk(route, opened, turns)
        except OSError as error:
            # No descriptors are left, or a directory on the way fails: no event tells when that is over.
            self._gaps[route] = error.errno or errno.EIO
            now = -self._gaps[route]
        route.nodes, route.state = tuple(turns), now
        end = route.nodes[-1] if route.state > 0 else None
        for node in route.nodes:
            node.routes.add(route)
        if end is not None:
            if route not in end.ends:
                end.ends += (route,)
            if route.is_tree:
                self.trees.begin(end)
        for node in before:
            if node is not end:
                self._leave_end(route, node)
            if node not in route.nodes:
                self._leave(route, node)
        if route.state != state and state != 0:
            self.directories.changed.add(route)
        if self.directories.additions != additions:
            self.directories.dirty.add(route)

    def _leave_end(self, route: Route, node: Node) -> None:
        """`route` does not lead to `node` (any more)."""
        node.ends = tuple(end for end in node.ends if end is not route)
        self.trees.end(node)

    def _leave(self, route: Route, node: Node) -> None:
        node.routes.discard(route)
        self.directories.prune(node)

    def _walk(self, route: Route, opened: OpenDirectories, turns: list[Node]) -> int:
        """The state in which the path of `route` ends; `turns` gets its nodes, the one where it ends as the last."""
        todo = components(route.interest.path)[::-1]
        node = self.directories.root
        self._pass(route, node, opened)
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                turns.append(node)
                self.directories.step(node)
                if reason := _no_way_back(opened[node]):
                    return -reason
                node = node.parent or node
                continue
            if node.level == LEVELS_MAX:
                turns.append(node)
                return -errno.ENAMETOOLONG
            child = node.child(name)
            try:
                self._pass(route, child, opened)
                node = child
                continue
            except OSError as error:
                reason = error.errno or errno.EIO
            turns.append(child)
            target = self._stopped(route, child, opened, reason)
            if target is None or links == LINKS_MAX:
                return -(errno.ELOOP if target else reason)
            links += 1
            todo += reversed(components(target))
            node = self.directories.root if target.startswith("/") else node
        turns.append(node)
        refused = self.directories.watch(node, opened[node], TREE if route.is_tree else CHILDREN)
        return -refused or node.wd or 0

    def _pass(self, route: Route, node: Node, opened: OpenDirectories) -> None:
        """Open a directory on the way and watch what can happen to itself; raises OSError as openat(2)."""
        if node not in opened.errors:
            opened.errors[node] = self.directories.watch(node, opened[node], PASSED)
        refused = opened.errors[node]
        if refused == errno.EACCES and node.parent:
            # We may not read it. What happens to it is also an event of its name in its parent.
            refused = self.directories.watch(node.parent, opened[node.parent], NAMED)
        if refused:
            self._gaps[route] = refused

    def _stopped(self, route: Route, node: Node, opened: OpenDirectories, reason: int) -> str | None:
        """`node` is no directory: watch for its name. Returns where it leads if it is a link."""
        self.directories.unwatch(node)
        assert node.parent is not None
        parent = opened[node.parent]
        refused = self.directories.watch(node.parent, parent, NAMED) if reason != errno.EACCES else 0
        if refused or reason not in FORETOLD:
            self._gaps[route] = refused or reason
        if reason != errno.ENOTDIR:
            return None
        self.directories.step(node)
        try:
            return os.readlink(node.name, dir_fd=parent)
        except OSError:  # it is none, or not any more
            return None


def _no_way_back(fd: int) -> int:
    """0, or the errno for which `..` cannot be followed from here: that needs the right to search this directory."""
    try:
        os.stat("..", dir_fd=fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
