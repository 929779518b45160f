# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees: all directories below one to which a route with Scope.TREE leads.

A directory is watched before it is listed, so what appears in it later is an event. A tree is watched as far as a copy
of it would go (images/tree.py): beyond that many entries or levels the rest is left out, and `too_large()` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
from itertools import islice

from watcher.model import DEPTH_MAX, ENTRIES_MAX
from watcher.watch.watched_directories import (
    FORETOLD,
    OPEN,
    TREE,
    Node,
    OpenDirectories,
    Route,
    WatchedDirectories,
)

LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class WatchedTrees:
    """All trees, and the directories of them that are left out."""

    def __init__(self, directories: WatchedDirectories) -> None:
        self._directories = directories
        self._watches_max = watches_max() // 2  # the rest is for drop directories
        self._unseen: dict[Node, int] = {}
        """Directories that could not be listed, or not all of whose subdirectories can be watched; the errno why."""
        self._entries: dict[Node, int] = {}
        """For the top of each tree: how many entries its watched directories have."""
        self._left_out: dict[Node, dict[Node, None]] = {}
        """For the top of each tree: directories whose entries would be too many."""
        self._too_deep: set[Node] = set()
        """Directories whose subdirectories lie too deep in a tree."""

    def gaps(self) -> dict[Route, int]:
        """Trees of which a part cannot be watched, and the errno why."""
        return {route: reason for node, reason in self._unseen.items() for route in node.trees()}

    def too_large(self) -> dict[Route, str]:
        """Trees that are watched in part only, and what is too large in them."""
        too_large: dict[Route, str] = {}
        for top in self._left_out:
            too_large |= dict.fromkeys(top.trees(), f"more than {ENTRIES_MAX} entries in it")
        for node in self._too_deep:
            too_large |= dict.fromkeys(node.trees(), f"more than {DEPTH_MAX} levels in it")
        return too_large

    def retry(self) -> None:
        """See whether what could not be watched can be now."""
        self._directories.relist.update(self._unseen)

    def begin(self, top: Node) -> None:
        """A route with Scope.TREE leads to `top`."""
        if not top.in_tree:
            top.in_tree = True
            self._directories.relist.add(top)

    def end(self, node: Node) -> None:
        """A route does not lead to `node` any more, which may be in the tree of another one."""
        if node.in_tree and not (node.parent and node.parent.in_tree):
            self._leave(node)

    def watch_below(self, node: Node, opened: OpenDirectories) -> None:
        """Watch all subdirectories of a directory in a tree."""
        if not node.in_tree:
            return
        try:
            directory = opened[node]
            self._directories.step(node)
            fd = os.open(".", LIST, dir_fd=directory)
        except OSError as error:
            self._not_seen(node, error.errno)
            return
        self._unseen.pop(node, None)
        try:
            self._watch_subdirectories(node, fd, self._subdirectories(node, fd))
        except OSError as error:
            self._not_seen(node, error.errno)
        finally:
            os.close(fd)

    def _subdirectories(self, node: Node, fd: int) -> set[str]:
        """Names of the subdirectories to watch; none where the tree is too large for that."""
        top = node.nearest_top()
        self._uncount(node)
        left = ENTRIES_MAX - self._entries.get(top, 0)
        self._directories.step(node)
        with os.scandir(fd) as entries:  # which may be ten million
            some = list(islice(entries, left + 1))
        if len(some) > left:
            node.counted = (top, 0)
            self._left_out.setdefault(top, {})[node] = None
            return set()
        node.counted = (top, len(some))
        self._entries[top] = self._entries.get(top, 0) + len(some)
        self._try_one_left_out(top)
        names = {entry.name for entry in some if self._is_directory(node, entry)}
        if names and node.level - top.level + 1 >= DEPTH_MAX:
            self._too_deep.add(node)
            return set()
        return names

    def _is_directory(self, node: Node, entry: os.DirEntry[str]) -> bool:
        self._directories.step(node)  # some file systems do not say it with the name
        return entry.is_dir(follow_symlinks=False)

    def _watch_subdirectories(self, node: Node, fd: int, names: set[str]) -> None:
        """`fd` is a readable descriptor of the directory of `node`."""
        for name, child in list(node.children.items()):
            if child.in_tree and name not in names:
                self._leave(child)
        for name in names:
            child = node.child(name)
            try:
                self._directories.step(child)
                child_fd = os.open(name, OPEN, dir_fd=fd)
            except OSError as error:
                self._not_seen(node, error.errno)
                self._directories.prune(child)
                continue
            try:
                self._watch_subdirectory(child, child_fd)
            finally:
                os.close(child_fd)

    def _watch_subdirectory(self, node: Node, fd: int) -> None:
        known = node.wd if node.in_tree else None
        node.in_tree = True
        if node.wd is None and len(self._directories) >= self._watches_max:
            refused = errno.ENOSPC
        else:
            refused = self._directories.watch(node, fd, TREE)
        if refused:
            self._not_seen(node, refused)
        elif node.wd != known:
            self._directories.relist.add(node)
            self._directories.changed.update(node.trees())

    def _not_seen(self, node: Node, reason: int | None) -> None:
        """A part of this directory cannot be listed or watched. If that is foretold, an event in its parent ends it."""
        if reason not in FORETOLD:
            self._unseen[node] = reason or errno.EIO

    def _leave(self, node: Node) -> None:
        """Neither is `node` in the tree of its parent any more, nor what lies below it; other tops are kept."""
        left = []
        todo = [node]
        while todo:
            at = todo.pop()
            if not at.in_tree or at.is_top:
                continue
            at.in_tree = False
            self._unseen.pop(at, None)
            left.append(at)
            todo.extend(at.children.values())
        for at in reversed(left):  # from below, so that each is pruned when it has no children left
            self._uncount(at)
            self._directories.prune(at)

    # How large trees are

    def _uncount(self, node: Node) -> None:
        """`node` is not in a tree any more, or about to be listed anew."""
        self._too_deep.discard(node)
        if node.counted is None:
            return
        top, number = node.counted
        node.counted = None
        self._not_left_out(top, node)
        if number:
            self._entries[top] -= number
            if not self._entries[top]:
                del self._entries[top]
            self._try_one_left_out(top)

    def _try_one_left_out(self, top: Node) -> None:
        """There may be room for a directory of this tree that was left out.

        One by one: the first that is too large ends it. So a small change does not cost a look at all of them.
        """
        if top in self._left_out:
            node = next(iter(self._left_out[top]))
            self._not_left_out(top, node)
            self._directories.relist.add(node)

    def _not_left_out(self, top: Node, node: Node) -> None:
        waiting = self._left_out.get(top, {})
        waiting.pop(node, None)
        if not waiting:
            self._left_out.pop(top, None)


def watches_max() -> int:
    """How many watches the kernel grants us, inotify(7); in a user namespace there is a limit of its own."""
    found = [2**31]
    for path in ("/proc/sys/fs/inotify/max_user_watches", "/proc/sys/user/max_inotify_watches"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            found.append(int(file.read()))
    return min(found)
