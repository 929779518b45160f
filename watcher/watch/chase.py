# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a path leads, and what to watch so as to know when it leads elsewhere.

inotify watches inodes, people mean paths. A path changes its meaning when a link on the way is pointed elsewhere, when
an ancestor is renamed, when something is mounted over it, when it is removed and made anew. The alternatives:

- Watch the parent of everything, all the way up, by name. Right, but every file made in `/tmp` wakes the daemon.
- fanotify with FAN_MARK_FILESYSTEM: needs CAP_SYS_ADMIN, and one sees the events of the whole file system.
- Poll. The design has a number for that: 0 wake-ups.

So: paths are chased component by component, through O_PATH descriptors, and the directories on the way form one tree
of nodes, shared by all interests, each with one inotify watch that asks for as little as will do:

- A directory one passes through: that itself is moved or deleted (MOVE_SELF, DELETE_SELF), its mode (ATTRIB), and
  DELETE of a name in it, since DELETE_SELF only comes with the inode's end, and a shell whose cwd it is keeps it.
- The directory that holds a link of the way, or lacks the next component: the coming and going of names in it.
- The end of the way: all of its entries, for Scope.TREE also those of all directories below it.

No descriptor stays open (it would keep file systems from being unmounted). The identity of a directory is its watch
descriptor: the kernel gives the same number for an inode as long as that lives and is watched, and a new one after,
while inode numbers are used again at once. A path is chased again until nothing new had to be watched on the way: then
all of it was watched before the last look, and no change can have slipped through in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from itertools import islice

from inotify_simple import INotify, flags

from watcher.model import DEPTH_MAX, ENTRIES_MAX
from watcher.watch.nodes import Bound, Node

MAX_LINKS = 40
"""Symbolic links followed in one path, path_resolution(7)."""

LEVELS_MAX = 2048
"""No directory further down has a path that a system call takes: PATH_MAX is 4096 bytes. With links one gets there."""

PASSED: int = flags.DELETE_SELF | flags.MOVE_SELF | flags.ATTRIB | flags.DELETE
NAMED: int = PASSED | flags.CREATE | flags.MOVED_FROM | flags.MOVED_TO
CHILDREN: int = NAMED | flags.CLOSE_WRITE
# truncate(2) by path says no more than IN_MODIFY. For images that is not worth a wake-up for each write of an upload.
TREE: int = CHILDREN | flags.MODIFY

OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# When a path ends in one of these, its end comes as an event. About anything else nobody will tell.
FORETOLD = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG))

UNANSWERED = errno.ENOTRECOVERABLE
"""For what is left alone because it does not answer: an errno that no file system has."""

ROUNDS = 16
"""After so many chases in a row something else may run, though paths still change under our hands."""


class Abandoned(Exception):
    """Another thread chases in place of this one, which has hung."""


class _Watch:
    """One inotify watch. Several nodes share it where a directory is mounted at several places."""

    __slots__ = ("mask", "nodes")

    def __init__(self) -> None:
        self.mask = 0
        self.nodes: list[Node] = []


class _Opened:
    """The directories opened in one round of chases, so that paths side by side open their ancestors once.

    The least recently used is closed, so that no path, however deep somebody makes it, takes all descriptors.

    Attributes:
        errors: 0, or the errno for which it is not watched, for each of them.
    """

    MAX = 64

    def __init__(self, step: Callable[[Node], None]) -> None:
        self._step = step
        self._fds: dict[Node, int] = {}  # the least recently used first
        self.errors: dict[Node, int] = {}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __getitem__(self, node: Node) -> int:
        """Descriptor of the directory of `node`, good until the next call; raises OSError as openat(2), ENOTDIR for a
        link too."""
        missing = []
        at: Node | None = node
        while at is not None and at not in self._fds:
            missing.append(at)
            at = at.parent
        fd = None
        if at is not None:
            fd = self._fds[at] = self._fds.pop(at)
        for part in reversed(missing):
            self._step(part)
            fd = self._fds[part] = os.open(part.name, OPEN, dir_fd=fd)
            if len(self._fds) > self.MAX:
                os.close(self._fds.pop(next(iter(self._fds))))
        return self._fds[node]


def _watches_max() -> int:
    """How many watches the kernel grants us, inotify(7); in a user namespace there is a limit of its own."""
    found = [2**31]
    for path in ("/proc/sys/fs/inotify/max_user_watches", "/proc/sys/user/max_inotify_watches"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            found.append(int(file.read()))
    return min(found)


class Chase:
    """The tree of nodes and their inotify watches.

    Attributes:
        dirty: interests whose path must be chased again.
        relist: directories of trees whose subdirectories may be others now.
        changed: interests that show something else now, for the caller to take away.
        steps: how many steps on paths were made: one that hangs is the last.
        at: where the last one was made.
        abandoned: set by another thread; no further step is made.
    """

    def __init__(self, inotify: INotify) -> None:
        self._inotify = inotify
        self._tree_watches_max = _watches_max() // 2  # the rest is for the directories that one drops into
        self._watches: dict[int, _Watch] = {}
        self._armed = False
        self._gaps: dict[Bound, int] = {}
        self._blind: dict[Node, int] = {}
        """Directories of trees that could not be listed, or not all of whose subdirectories can be watched."""
        self._entries: dict[Node, int] = {}
        """How many entries the directories have that are watched, for each top of a tree."""
        self._cut: dict[Node, dict[Node, None]] = {}
        """Directories whose entries would be too many, for each top."""
        self._too_deep: set[Node] = set()
        """Directories whose subdirectories lie too deep in a tree."""
        self.root = self.at = Node(None, "/")
        self.steps = 0
        self.abandoned = False
        self.dirty: set[Bound] = set()
        self.relist: set[Node] = set()
        self.changed: set[Bound] = set()

    def nodes(self, wd: int) -> Iterable[Node]:
        """Whose directory it is that the kernel has an event for; none if the watch was given up meanwhile."""
        watch = self._watches.get(wd)
        return tuple(watch.nodes) if watch else ()

    def gaps(self) -> dict[Bound, int]:
        """Interests of which a part cannot be watched, and no event will tell when it can; the errno why."""
        trees = {bound: reason for node, reason in self._blind.items() for bound in node.trees()}
        return trees | self._gaps

    def polled(self) -> set[Bound]:
        """Those of the gaps that have to be looked at from time to time; what does not answer tells when it does."""
        return {bound for bound, reason in self.gaps().items() if reason != UNANSWERED}

    def cut(self) -> dict[Bound, str]:
        """Trees that are larger than what may be copied, and of which no more is watched; how they are too large."""
        many = {bound: f"more than {ENTRIES_MAX} entries in it" for top in self._cut for bound in top.trees()}
        deep = {
            bound: f"more than {DEPTH_MAX} levels in it" for node in self._too_deep for bound in node.trees()
        }
        return many | deep

    def run(self) -> bool:
        """Chase what is dirty until nothing new had to be watched on the way; False: not done yet, call again."""
        for _ in range(ROUNDS):
            if not self.dirty and not self.relist:
                return True
            dirty, self.dirty = self.dirty, set()
            with _Opened(self._step) as opened:
                for bound in dirty:
                    self._chase(bound, opened)
                relist, self.relist = self.relist, set()
                for node in relist:
                    self._list(node, opened)
        return False

    def bar(self, path: str) -> None:
        """From now on what is at `path` and below it is left alone. Before the first chase."""
        node = self.root
        for name in reversed(_parts(path)):
            node = node.child(name)
        node.dead = True

    def unbar(self, path: str) -> None:
        """It may answer again."""
        node = self.root
        for name in reversed(_parts(path)):
            node = node.child(name)
        node.dead = False
        self.dirty |= node.users_below()
        if node.parent is not None and node.parent.deep:
            self.relist.add(node.parent)
        self._prune(node)

    def _step(self, node: Node) -> None:
        """The next system call looks up the path of `node`."""
        if self.abandoned:
            raise Abandoned
        if node.dead:
            raise OSError(UNANSWERED, os.strerror(UNANSWERED))
        self.at = node
        self.steps += 1

    def retry(self) -> None:
        """See whether what could not be watched can be now."""
        self.dirty.update(self.gaps())
        self.relist.update(self._blind)

    def lost(self, wd: int) -> None:
        """The kernel has dropped this watch."""
        watch = self._watches.pop(wd, None)
        for node in watch.nodes if watch else ():
            node.wd = None

    def lost_events(self) -> None:
        """Anything may have happened to any node, unseen."""
        for node in self.root.below():
            self.dirty |= node.users
            if node.deep:
                self.relist.add(node)

    def forget(self, bound: Bound) -> None:
        """Nobody has this interest any more."""
        self.dirty.discard(bound)
        self.changed.discard(bound)
        self._gaps.pop(bound, None)
        for node in bound.nodes:
            self._leave(bound, node)
            node.users.discard(bound)
            self._prune(node)

    def _chase(self, bound: Bound, opened: _Opened) -> None:
        """Follow the path of `bound` and watch all that it depends on."""
        self._armed = False
        self._gaps.pop(bound, None)
        before, state = bound.nodes, bound.state
        bound.nodes, bound.state = self._follow(bound, opened)
        end = bound.nodes[-1] if bound.state > 0 else None
        for node in bound.nodes:
            node.users.add(bound)
        if end is not None:
            self._arrive(bound, end)
        for node in before:
            if node is not end:
                self._leave(bound, node)
            if node not in bound.nodes:
                node.users.discard(bound)
                self._prune(node)
        if bound.state != state and state != 0:
            self.changed.add(bound)
        if self._armed:
            self.dirty.add(bound)

    def _follow(self, bound: Bound, opened: _Opened) -> tuple[tuple[Node, ...], int]:
        """The nodes that `bound` depends on, the one where its path ends as the last, and its state."""
        turns: list[Node] = []
        try:
            state = self._follow_to(bound, opened, turns)
        except OSError as error:
            # No descriptors are left, or a directory on the way fails: no event tells when that is over.
            state = -(error.errno or errno.EIO)
            self._gaps[bound] = -state
        return tuple(turns), state

    def _follow_to(self, bound: Bound, opened: _Opened, turns: list[Node]) -> int:
        """The state in which the way of `bound` ends; `turns` gets the nodes."""
        todo = _parts(bound.interest.path)
        node = self.root
        self._pass(bound, node, opened)
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                turns.append(node)
                self._step(node)
                if reason := _no_way_back(opened[node]):
                    return -reason
                node = node.parent or node
                continue
            if node.level == LEVELS_MAX:
                turns.append(node)
                return -errno.ENAMETOOLONG
            child = node.child(name)
            try:
                self._pass(bound, child, opened)
                node = child
                continue
            except OSError as error:
                reason = error.errno or errno.EIO
            turns.append(child)
            target = self._stopped(bound, child, opened, reason)
            if target is None or links == MAX_LINKS:
                return -(errno.ELOOP if target else reason)
            links += 1
            todo += _parts(target)
            node = self.root if target.startswith("/") else node
        turns.append(node)
        refused = self._arm(node, opened[node], TREE if bound.deep else CHILDREN)
        return -refused or node.wd or 0

    def _pass(self, bound: Bound, node: Node, opened: _Opened) -> None:
        """Open a directory on the way and watch it, for what can happen to itself; raises OSError as openat(2)."""
        if node not in opened.errors:
            opened.errors[node] = self._arm(node, opened[node], PASSED)
        refused = opened.errors[node]
        if refused == errno.EACCES and node.parent:
            # One may not read it: what happens to it is also an event of its name in its parent.
            refused = self._arm(node.parent, opened[node.parent], NAMED)
        if refused:
            self._gaps[bound] = refused

    def _stopped(self, bound: Bound, node: Node, opened: _Opened, reason: int) -> str | None:
        """`node` is no directory: watch for its name. Where it leads if it is a link."""
        self._disarm(node)
        assert node.parent is not None
        parent = opened[node.parent]
        refused = self._arm(node.parent, parent, NAMED) if reason != errno.EACCES else 0
        if refused or reason not in FORETOLD:
            self._gaps[bound] = refused or reason
        if reason != errno.ENOTDIR:
            return None
        self._step(node)
        return _link(parent, node.name)

    # Trees: a directory is watched before it is listed, so that what appears in it later is an event.

    def _arrive(self, bound: Bound, node: Node) -> None:
        """The path of `bound` leads to `node`."""
        if bound not in node.ends:
            node.ends += (bound,)
        if bound.deep and not node.deep:
            node.deep = True
            self.relist.add(node)

    def _leave(self, bound: Bound, node: Node) -> None:
        """The path of `bound` does not lead to `node`, or not any more."""
        node.ends = tuple(end for end in node.ends if end is not bound)
        if node.deep and not (node.parent and node.parent.deep):
            self._leave_tree(node)

    def _list(self, node: Node, opened: _Opened) -> None:
        """Watch all subdirectories of a directory in a tree, as far as a copy of it would go (tree.py)."""
        if not node.deep:
            return
        try:
            directory = opened[node]
            self._step(node)
            fd = os.open(".", LIST, dir_fd=directory)
        except OSError as error:
            self._skipped(node, error.errno)
            return
        self._blind.pop(node, None)
        try:
            self._watch_subdirectories(node, fd, self._subdirectories(node, fd))
        except OSError as error:
            self._skipped(node, error.errno)
        finally:
            os.close(fd)

    def _subdirectories(self, node: Node, fd: int) -> set[str]:
        """Names of the subdirectories to watch; none where the tree is too large for that."""
        top = node.nearest_top()
        self._uncount(node)
        left = ENTRIES_MAX - self._entries.get(top, 0)
        self._step(node)
        with os.scandir(fd) as entries:  # which may be ten million
            some = list(islice(entries, left + 1))
        if len(some) > left:
            node.counted = (top, 0)
            self._cut.setdefault(top, {})[node] = None
            return set()
        node.counted = (top, len(some))
        self._entries[top] = self._entries.get(top, 0) + len(some)
        self._go_on(top)
        names = {entry.name for entry in some if self._is_directory(node, entry)}
        if names and node.level - top.level + 1 >= DEPTH_MAX:
            self._too_deep.add(node)
            return set()
        return names

    def _is_directory(self, node: Node, entry: os.DirEntry[str]) -> bool:
        self._step(node)  # some file systems do not say it with the name
        return entry.is_dir(follow_symlinks=False)

    def _watch_subdirectories(self, node: Node, fd: int, names: set[str]) -> None:
        """`fd` is a readable descriptor of the directory of `node`."""
        for name, child in list(node.children.items()):
            if child.deep and name not in names:
                self._leave_tree(child)
        for name in names:
            child = node.child(name)
            try:
                self._step(child)
                child_fd = os.open(name, OPEN, dir_fd=fd)
            except OSError as error:
                self._skipped(node, error.errno)
                self._prune(child)
                continue
            try:
                self._watch_subdirectory(child, child_fd)
            finally:
                os.close(child_fd)

    def _watch_subdirectory(self, node: Node, fd: int) -> None:
        known = node.wd if node.deep else None
        node.deep = True
        if node.wd is None and len(self._watches) >= self._tree_watches_max:
            refused = errno.ENOSPC
        else:
            refused = self._arm(node, fd, TREE)
        if refused:
            self._skipped(node, refused)
        elif node.wd != known:
            self.relist.add(node)
            self.changed.update(node.trees())

    def _uncount(self, node: Node) -> None:
        """`node` is no more listed for any tree, or about to be listed anew."""
        self._too_deep.discard(node)
        if node.counted is None:
            return
        top, number = node.counted
        node.counted = None
        self._stop_waiting(top, node)
        if number:
            self._entries[top] -= number
            if not self._entries[top]:
                del self._entries[top]
            self._go_on(top)

    def _go_on(self, top: Node) -> None:
        """There may be room for a directory of this tree that was not listed. One by one: the first that is too much
        ends it, so that no change, however small, costs a look at all of them."""
        if top in self._cut:
            node = next(iter(self._cut[top]))
            self._stop_waiting(top, node)
            self.relist.add(node)

    def _stop_waiting(self, top: Node, node: Node) -> None:
        waiting = self._cut.get(top, {})
        waiting.pop(node, None)
        if not waiting:
            self._cut.pop(top, None)

    def _skipped(self, node: Node, reason: int | None) -> None:
        """Part of a tree cannot be listed or watched. Where that is foretold, its parent will tell of the end of it."""
        if reason not in FORETOLD:
            self._blind[node] = reason or errno.EIO

    def _leave_tree(self, node: Node) -> None:
        """`node` is not in the tree of its parent, or not the top of one, any more; nor is what lies below it."""
        left = []
        todo = [node]
        while todo:
            at = todo.pop()
            if not at.deep or at.top:
                continue
            at.deep = False
            self._blind.pop(at, None)
            left.append(at)
            todo.extend(at.children.values())
        for at in reversed(left):  # from below, so that each is pruned when it has no children left
            self._uncount(at)
            self._prune(at)

    # What the kernel holds for us

    def _arm(self, node: Node, fd: int, mask: int) -> int:
        """Watch the directory of `node`, open as `fd`, at least for `mask`. Returns 0 or the errno."""
        try:
            self._step(node)
            wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", mask | flags.MASK_ADD | flags.ONLYDIR)
        except OSError as error:
            self._disarm(node)
            return error.errno or errno.EIO
        watch = self._watches.get(wd)
        if watch is None:
            watch = self._watches[wd] = _Watch()
        if mask & ~watch.mask:
            watch.mask |= mask
            self._armed = True
        if node.wd != wd:
            self._disarm(node)
            node.wd = wd
            watch.nodes.append(node)
            self._armed = True
            if node.deep:
                self.relist.add(node)  # it is another directory now, with others in it
        return 0

    def _disarm(self, node: Node) -> None:
        """What was found at `node` and below it is not true any more."""
        if node.wd is not None:
            self.dirty |= node.users_below()
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

    def _prune(self, node: Node) -> None:
        """Forget nodes that nobody needs, from here upwards."""
        while node.parent is not None and not (node.users or node.children or node.deep or node.dead):
            self._release(node)
            if node.parent.children.get(node.name) is node:
                del node.parent.children[node.name]
            node = node.parent


def _parts(path: str) -> list[str]:
    """Components, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _no_way_back(fd: int) -> int:
    """0, or the errno for which `..` cannot be followed from here: it takes the right to pass."""
    try:
        os.stat("..", dir_fd=fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _link(fd: int, name: str) -> str | None:
    """Where a link leads; None if it is none, or not any more."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError:
        return None
