# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells for which services something changed in a directory that they depend on.

Keys (services) say which directories they depend on (`Interest`). The watcher tells them when to look again, and never
what happened: an event may be late, doubled or lost, but a look finds what is on disk. `follow_links.py` keeps the
right directories watched; here the kernel's events become keys.

trio waits for one epoll instance. In it are the inotify instance and an eventfd. The eventfd wakes the loop after a
change of the mount table, and when `set()` finds a change before its event is read. While nothing changes nothing wakes
up. Only what cannot be watched (the watch limit; a directory that we may neither read nor ask its parent about) is
looked at every RETRY_SEC, and `remarks()` says so.

Not seen, because the kernel does not tell: a file changed through a hard link in another directory, a network file
system changed elsewhere, and truncate(2) by path of an image.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

import trio
from inotify_simple import INotify, flags

from watcher.model import Interest, Remark
from watcher.mounts import mountinfo
from watcher.resolve.strict_modes import components
from watcher.watch.follow_links import ROUNDS, Follower
from watcher.watch.uploads import Uploads
from watcher.watch.watched_directories import CHILDREN, NAMED, UNANSWERED, Node, Route, WatchedDirectories

RETRY_SEC = 30.0
"""What cannot be watched is looked at this often, in seconds."""

MOUNTINFO = "/proc/self/mountinfo"


class Watcher:
    """Says whose directories changed. A context manager, which releases everything at its end.

    Attributes:
        uploads: what was seen of uploads.

    Raises:
        OSError: no inotify instance (EMFILE: fs.inotify.max_user_instances), no /proc.
    """

    def __init__(self) -> None:
        self.uploads = Uploads()
        self._inotify = new_inotify()
        self._follower = Follower(self._inotify)
        self._routes: dict[Interest, Route] = {}
        self._keys: dict[str, frozenset[Route]] = {}
        self._retry_at = math.inf
        # Renames of our own whose events are still to come, with the key that made them.
        self._renames: dict[tuple[int, int, str], str] = {}
        self._others: set[str] = set()  # to be told of such a rename
        self._poke = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._mounts = _MountTable(self._poke)
        self._epoll = select.epoll()
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
        self._epoll.register(self._poke, select.EPOLLIN)

    @property
    def _directories(self) -> WatchedDirectories:
        return self._follower.directories

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._epoll.close()
        self._mounts.close()
        os.close(self._poke)
        self._close_inotify()

    def _close_inotify(self) -> None:
        self._inotify.close()

    def set(self, key: str, interests: Iterable[Interest]) -> bool:
        """From now on `key` is concerned by changes in `interests`, and by nothing else.

        Returns:
            True if one of them is new to the key: what changed there before this call went unnoticed, look again.

        Raises:
            ValueError: a path that is not absolute.
        """
        new, old = self._replace(key, interests)
        fresh = {route for route in new if route.state == 0}
        self._directories.dirty |= fresh
        if self._follow_all(self._follower):
            self._directories.changed -= fresh
        self._leave(key, old)
        self._wake_if_needed()
        return bool(new)

    def _replace(self, key: str, interests: Iterable[Interest]) -> tuple[frozenset[Route], frozenset[Route]]:
        """Give `key` other interests. Returns the routes that are new to it, and those that it is to leave."""
        routes = frozenset(map(self._route, interests))
        before = self._keys.get(key, frozenset())
        self._keys[key] = routes
        for route in routes - before:
            route.keys.add(key)
        return routes - before, before - routes

    def drop(self, key: str) -> None:
        """`key` is concerned by nothing any more. It may be unknown."""
        self._leave(key, self._keys.pop(key, frozenset()))

    @contextlib.contextmanager
    def renaming(self, key: str, old: str, new: str) -> Iterator[None]:
        """A block in which we rename an entry of a directory on behalf of `key`.

        The key knows of it, and is not told of its two events; all other keys are. A directory tree's path is followed
        all the same: that it is another path now does concern the key.
        """
        directory, name = os.path.split(old)
        both = (flags.MOVED_FROM | flags.MOVED_TO) | flags.MASK_ADD | flags.ONLYDIR
        wd = self._inotify.add_watch(directory, both)
        if not self._directories.nodes(wd):
            self._inotify.rm_watch(wd)
            yield
            return
        expected = [(wd, int(flags.MOVED_FROM), name), (wd, int(flags.MOVED_TO), os.path.basename(new))]
        self._renames.update(dict.fromkeys(expected, key))
        try:
            yield
        except BaseException:
            for event in expected:
                self._renames.pop(event, None)
            raise

    def retry(self) -> None:
        """Try at once, and not after RETRY_SEC, to watch what could not be watched: the limit may be higher now."""
        self._retry()
        self._wake_if_needed()

    def remarks(self) -> tuple[Remark, ...]:
        """What cannot be watched at the moment, and why; the caller remembers what it has said."""
        gaps = {(route.interest.path, reason) for route, reason in self._follower.gaps().items()}
        large = {(route.interest.path, what) for route, what in self._follower.trees.too_large().items()}
        return (
            *(Remark("warning", path, _reason(reason)) for path, reason in sorted(gaps)),
            *(Remark("warning", path, f"watched only in part: {what}") for path, what in sorted(large)),
        )

    async def changes(self) -> AsyncIterator[frozenset[str]]:
        """Keys to look at again, together those that one read of events concerns. It does not end by itself."""
        while True:
            keys = self._collect()
            if keys:
                yield keys
            with trio.move_on_at(self._next_retry(trio.current_time())) as patience:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            if patience.cancelled_caught:
                self._retry()

    def _next_retry(self, now: float) -> float:
        if not self._follower.polled():
            self._retry_at = math.inf
        elif self._retry_at == math.inf:
            self._retry_at = now + RETRY_SEC
        return self._retry_at

    def _collect(self) -> frozenset[str]:
        """Read all events that are there. Returns the keys that they concern."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._poke)
        for wd, mask, _, name in self._inotify.read(timeout=0):
            self._note(self._directories, wd, mask, name)
            self._event(wd, mask, name)
        self._follow_all(self._follower)
        return self._take()

    def _note(self, directories: WatchedDirectories, wd: int, mask: int, name: str) -> None:
        """Note what an event tells of uploads, at once: a look may follow before its paths are followed."""
        for node in directories.nodes(wd):
            if name and node.ends:
                self.uploads.note(node.path, name, mask)
            elif not name and mask & (flags.MOVE_SELF | flags.DELETE_SELF):
                self.uploads.forget(node.path)

    def _take(self) -> frozenset[str]:
        """The keys that are to be told."""
        changed, self._directories.changed = self._directories.changed, set()
        others, self._others = self._others, set()
        self._wake_if_needed()
        return frozenset(others).union(*(route.keys for route in changed))

    def _follow_all(self, follower: Follower) -> bool:
        """Bring all watches up to date. False: not done yet, because paths change all the time."""
        directories = follower.directories
        if not directories.abandoned:
            self._read_mounts()
        for _ in range(ROUNDS):
            done = follower.run()
            if directories.abandoned or not self._read_mounts():
                return done
            # What was mounted only while paths were followed is in neither table: where do they lead really?
            directories.lost_events()
        return False

    def _read_mounts(self) -> bool:
        """Note what changed in the mount table; whether anything did."""
        paths = self._mounts.changed()
        if paths is None:
            return False
        for path in paths:
            self._mount_changed(path)
        if not paths:  # mounted and unmounted again: a look in between has seen what is not there now
            self._lost_events()
        return True

    def _event(self, wd: int, mask: int, name: str) -> None:
        if mask & flags.Q_OVERFLOW:
            self._lost_events()
            return
        nodes = self._directories.nodes(wd)
        if mask & flags.IGNORED:
            self._directories.lost(wd)
        spared = self._renames.pop((wd, mask & (flags.MOVED_FROM | flags.MOVED_TO), name), None)
        for node in nodes:
            if name:
                self._entry_changed(node, name, mask, None if mask & flags.ISDIR else spared)
            else:
                self._node_changed(node, mask)

    def _entry_changed(self, node: Node, name: str, mask: int, spared: str | None = None) -> None:
        """Something happened to `name` in the directory of `node`. The key `spared` is not told."""
        if mask & NAMED and (child := node.children.get(name)):
            self._directories.dirty |= child.routes_below()
        if mask & CHILDREN:
            concerned = [route for route in node.ends if route.matches(name)]
            if spared is None:
                self._directories.changed.update(concerned)
            else:
                self._others.update(*(route.keys - {spared} for route in concerned))
        if node.in_tree:
            self._directories.changed.update(node.trees())
            if mask & flags.ISDIR:
                self._directories.relist.add(node)

    def _node_changed(self, node: Node, mask: int) -> None:
        """The directory of `node` itself was moved, deleted or unmounted, or its mode or owner changed."""
        self._directories.dirty |= node.routes_below()
        self._directories.changed.update(node.trees())  # of the top of a mount nothing is told to its parent
        if mask & flags.ATTRIB:
            self._directories.changed.update(node.ends)

    def _mount_changed(self, path: str) -> None:
        """Something was mounted on `path`, or is not any more."""
        node = self._directories.root
        names = components(path)
        if not names:
            self._lost_events()
            return
        for name in names[:-1]:
            if name not in node.children:
                return
            node = node.children[name]
        self._entry_changed(node, names[-1], flags.CREATE | flags.ISDIR)

    def _lost_events(self) -> None:
        """Anything may have happened."""
        self._renames.clear()
        self._directories.lost_events()
        self._directories.changed.update(tuple(self._routes.values()))

    def _retry(self) -> None:
        """Look at what could not be watched, as if it had changed, and try to watch it."""
        self._retry_at = math.inf
        self._directories.changed.update(self._follower.polled())
        self._follower.retry()

    def _wake_if_needed(self) -> None:
        """Wake the loop where something is left to do or to tell for which no event will come."""
        todo = self._directories
        if (
            todo.dirty
            or todo.relist
            or todo.changed
            or (self._follower.polled() and self._retry_at == math.inf)
        ):
            os.eventfd_write(self._poke, 1)

    def _route(self, interest: Interest) -> Route:
        if not interest.path.startswith("/") or "\0" in interest.path:
            raise ValueError(f"not an absolute path: {interest.path!r}")
        route = self._routes.get(interest)
        if route is None:
            route = self._routes[interest] = Route(interest)
        return route

    def _leave(self, key: str, routes: Iterable[Route]) -> None:
        for route in routes:
            route.keys.discard(key)
            if not route.keys:
                del self._routes[route.interest]
                self._forget(route)

    def _forget(self, route: Route) -> None:
        self._follower.forget(route)


class _MountTable:
    """Changes of the mount table.

    /proc/self/mountinfo is always readable. When the table has changed it says POLLPRI, once for each open descriptor:
    only the first poll hears of it (proc_pid_mounts(5)). trio cannot wait for that. Nor can an epoll instance inside
    trio's: when trio registers that, the kernel polls what is in it, and so takes the event that it should wait for.
    So a thread waits, on a descriptor of its own.
    """

    def __init__(self, wake: int) -> None:
        """`wake` is an eventfd that is written to when the table has changed."""
        self._wake = wake
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._waiting = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._table = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._table, select.POLLPRI)
        self._rows = self._read()
        self._thread = threading.Thread(target=self._wait, name="mountinfo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (self._table, self._waiting, self._stop):
            os.close(fd)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._waiting, select.POLLPRI)
        poll.register(self._stop, select.POLLIN)
        while self._stop not in dict(poll.poll()):
            os.eventfd_write(self._wake, 1)

    def point(self, path: str) -> str:
        """Where the file system is mounted that has `path`, as of the last look at the table."""
        points = _mount_points(self._rows)
        while path != "/" and path not in points:
            path = os.path.dirname(path)
        return path

    def changed(self) -> frozenset[str] | None:
        """Mount points of what came, went, or became something else since the last call; None: the table is the same.

        They may be none: something came and went again.
        """
        if not self._poll.poll(0):
            return None
        before, self._rows = self._rows, self._read()
        return _mount_points(before ^ self._rows)

    def _read(self) -> frozenset[str]:
        with open(self._table, "rb", closefd=False) as file:
            file.seek(0)
            # Not splitlines(): a user who may mount may have a "\r" in a path, and the kernel does not escape it.
            return frozenset(os.fsdecode(file.read()).split("\n"))


def _mount_points(rows: Iterable[str]) -> frozenset[str]:
    return frozenset(mount.point for mount in mountinfo.mounts(rows))


def new_inotify() -> INotify:
    try:
        return INotify(nonblocking=True)
    except OSError as error:
        if error.errno == errno.EMFILE:
            hint = "no inotify instance left: raise fs.inotify.max_user_instances with sysctl"
            raise OSError(errno.EMFILE, hint) from error
        raise


def _reason(error: int) -> str:
    """What to tell the administrator about something that cannot be watched."""
    if error == UNANSWERED:
        return "does not answer, so it is left alone; it is watched again when it does"
    reason = os.strerror(error)
    if error == errno.ENOSPC:
        reason = "the limit fs.inotify.max_user_watches is reached, raise it with sysctl"
    return f"cannot be watched: {reason}. Until then it is looked at every {RETRY_SEC:.0f} s"
