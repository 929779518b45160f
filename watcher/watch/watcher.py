# SPDX-License-Identifier: LGPL-2.1-or-later
"""Something happened in a directory that somebody cares about.

Keys (services) say which directories they care about (`Interest`), and are told when to look again. What happened is
not told: an event may be late, doubled or lost, what is on disk cannot be. `chase.py` keeps the right directories
watched; here the kernel's events become keys.

One epoll instance is what trio waits for. In it are the inotify instance and an eventfd: by that the loop hears of
changes in the mount table, and of what `set()` comes upon before its event was read. While nothing changes nothing
wakes up; only what cannot be watched (the watch limit, a directory that one may neither read nor ask its parent about)
is looked at every RETRY_SEC, which `remarks()` says.

Not seen, because the kernel does not tell: a file changed through a hard link in another directory, a network file
system changed elsewhere, and truncate(2) by path of an image.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import select
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

import trio
from inotify_simple import INotify, flags

from watcher.model import Interest, Remark
from watcher.watch.chase import CHILDREN, NAMED, ROUNDS, UNANSWERED, Chase
from watcher.watch.nodes import Bound, Node

RETRY_SEC = 30.0
"""What cannot be watched is looked at this often, in seconds."""

MOUNTINFO = "/proc/self/mountinfo"


class Watcher:
    """Says whose directories changed. A context manager, which releases everything at its end.

    Raises:
        OSError: no inotify instance (EMFILE: fs.inotify.max_user_instances), no /proc.
    """

    def __init__(self) -> None:
        self._inotify = new_inotify()
        self._chase = Chase(self._inotify)
        self._bounds: dict[Interest, Bound] = {}
        self._keys: dict[str, set[Bound]] = {}
        self._retry_at = math.inf
        # Renames of our own whose events are still to come, with the key that made them.
        self._renames: dict[tuple[int, int, str], str] = {}
        self._others: set[str] = set()  # to be told of such a rename
        self._poke = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._mounts = _Mounts(self._poke)
        self._epoll = select.epoll()
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
        self._epoll.register(self._poke, select.EPOLLIN)

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
        bounds = {self._bound(interest) for interest in interests}
        before = self._keys.get(key, set())
        new = bounds - before
        self._keys[key] = bounds
        for bound in new:
            bound.keys.add(key)
        fresh = {bound for bound in new if bound.state == 0}
        self._chase.dirty |= fresh
        if self._follow_all(self._chase):
            self._chase.changed -= fresh
        self._leave(key, before - bounds)
        self._wake_if_needed()
        return bool(new)

    def drop(self, key: str) -> None:
        """`key` is concerned by nothing any more. An unknown one does no harm."""
        self._leave(key, self._keys.pop(key, set()))

    @contextlib.contextmanager
    def renaming(self, key: str, old: str, new: str) -> Iterator[None]:
        """While a file is renamed in its directory on behalf of `key`, which knows of that already: of the two events
        of this rename it is not told, the others are.

        A directory tree's path is followed all the same: that it is another one now does concern its key.
        """
        directory, name = os.path.split(old)
        both = (flags.MOVED_FROM | flags.MOVED_TO) | flags.MASK_ADD | flags.ONLYDIR
        wd = self._inotify.add_watch(directory, both)
        if not self._chase.nodes(wd):
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
        """Watch now what could not be watched, rather than within RETRY_SEC: somebody may have raised the limit."""
        self._retry()
        self._wake_if_needed()

    def remarks(self) -> tuple[Remark, ...]:
        """What cannot be watched at the moment, and why; the caller remembers what it has said."""
        gaps = sorted(((bound.interest.path, reason) for bound, reason in self._chase.gaps().items()))
        cut = sorted((bound.interest.path, what) for bound, what in self._chase.cut().items())
        return (
            *(Remark("warning", path, _reason(reason)) for path, reason in dict.fromkeys(gaps)),
            *(Remark("warning", path, f"watched only in part: {what}") for path, what in dict.fromkeys(cut)),
        )

    async def changes(self) -> AsyncIterator[frozenset[str]]:
        """Keys to look at again, those that one burst of events concerns together. It does not end by itself."""
        while True:
            keys = self._collect()
            if keys:
                yield keys
            with trio.move_on_at(self._next_retry(trio.current_time())) as patience:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            if patience.cancelled_caught:
                self._retry()

    def _next_retry(self, now: float) -> float:
        if not self._chase.polled():
            self._retry_at = math.inf
        elif self._retry_at == math.inf:
            self._retry_at = now + RETRY_SEC
        return self._retry_at

    def _collect(self) -> frozenset[str]:
        """Read all that is there; the keys it concerns."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._poke)
        for wd, mask, _, name in self._inotify.read(timeout=0):
            self._event(wd, mask, name)
        self._follow_all(self._chase)
        return self._take()

    def _take(self) -> frozenset[str]:
        """The keys that are to be told."""
        changed, self._chase.changed = self._chase.changed, set()
        others, self._others = self._others, set()
        self._wake_if_needed()
        return frozenset(others).union(*(bound.keys for bound in changed))

    def _follow_all(self, chase: Chase) -> bool:
        """Bring all watches up to date; False: not done yet, somebody keeps changing things under our hands."""
        if not chase.abandoned:
            self._read_mounts()
        for _ in range(ROUNDS):
            done = chase.run()
            if chase.abandoned or not self._read_mounts():
                return done
            # What was mounted only while paths were chased is in neither table: where do they lead really?
            chase.lost_events()
        return False

    def _read_mounts(self) -> bool:
        """Take note of what changed in the mount table; whether anything did."""
        paths = self._mounts.changed()
        if paths is None:
            return False
        for path in paths:
            self._mount_changed(path)
        if not paths:  # mounted and unmounted again; who has looked in between has seen what is not there
            self._lost_events()
        return True

    def _event(self, wd: int, mask: int, name: str) -> None:
        if mask & flags.Q_OVERFLOW:
            self._lost_events()
            return
        nodes = self._chase.nodes(wd)
        if mask & flags.IGNORED:
            self._chase.lost(wd)
        spared = self._renames.pop((wd, mask & (flags.MOVED_FROM | flags.MOVED_TO), name), None)
        for node in nodes:
            if name:
                self._entry_changed(node, name, mask, None if mask & flags.ISDIR else spared)
            else:
                self._node_changed(node, mask)

    def _entry_changed(self, node: Node, name: str, mask: int, spared: str | None = None) -> None:
        """Something happened to `name` in the directory of `node`, which need not be told to the key `spared`."""
        if mask & NAMED and (child := node.children.get(name)):
            self._chase.dirty |= child.users_below()
        if mask & CHILDREN:
            concerned = [bound for bound in node.ends if bound.matches(name)]
            if spared is None:
                self._chase.changed.update(concerned)
            else:
                self._others.update(*(bound.keys - {spared} for bound in concerned))
        if node.deep:
            self._chase.changed.update(node.trees())
            if mask & flags.ISDIR:
                self._chase.relist.add(node)

    def _node_changed(self, node: Node, mask: int) -> None:
        """The directory of `node` itself was moved, deleted or unmounted, or its mode or owner changed."""
        self._chase.dirty |= node.users_below()
        self._chase.changed.update(node.trees())  # of the top of a mount nothing is told to its parent
        if mask & flags.ATTRIB:
            self._chase.changed.update(node.ends)

    def _mount_changed(self, path: str) -> None:
        """Something was mounted on `path`, or is not any more."""
        node = self._chase.root
        names = [name for name in path.split("/") if name]
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
        self._chase.lost_events()
        self._chase.changed.update(tuple(self._bounds.values()))

    def _retry(self) -> None:
        """Look at what could not be watched, as if it had changed, and try to watch it."""
        self._retry_at = math.inf
        self._chase.changed.update(self._chase.polled())
        self._chase.retry()

    def _wake_if_needed(self) -> None:
        """Something is left to do, or somebody to be told, for which no event will come."""
        chase = self._chase
        if chase.dirty or chase.relist or chase.changed or (chase.polled() and self._retry_at == math.inf):
            os.eventfd_write(self._poke, 1)

    def _bound(self, interest: Interest) -> Bound:
        if not interest.path.startswith("/") or "\0" in interest.path:
            raise ValueError(f"not an absolute path: {interest.path!r}")
        bound = self._bounds.get(interest)
        if bound is None:
            bound = self._bounds[interest] = Bound(interest)
        return bound

    def _leave(self, key: str, bounds: Iterable[Bound]) -> None:
        for bound in bounds:
            bound.keys.discard(key)
            if not bound.keys:
                del self._bounds[bound.interest]
                self._forget(bound)

    def _forget(self, bound: Bound) -> None:
        self._chase.forget(bound)


class _Mounts:
    """Changes of the mount table.

    /proc/self/mountinfo is always readable, and says POLLPRI when the table has changed, to the first poll of each open
    descriptor and to no other (proc_pid_mounts(5)). That can neither be asked of trio, nor of an epoll instance inside
    trio's, which polls what it contains already when it is registered, and then waits for what it has taken. So a
    thread waits, on a descriptor of its own.
    """

    def __init__(self, wake: int) -> None:
        """`wake` is an eventfd that is written to when the table has changed."""
        self._wake = wake
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._waiting = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._table = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._table, select.POLLPRI)
        self._lines = self._read()
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
        points = mount_points(b"\n".join(self._lines))
        while path != "/" and path not in points:
            path = os.path.dirname(path)
        return path

    def changed(self) -> frozenset[str] | None:
        """Mount points of what came, went, or became something else since the last call; None: the table is the same.

        They may be none: something came and went again.
        """
        if not self._poll.poll(0):
            return None
        before, self._lines = self._lines, self._read()
        return mount_points(b"\n".join(before ^ self._lines))

    def _read(self) -> frozenset[bytes]:
        with open(self._table, "rb", closefd=False) as table:
            table.seek(0)
            # Not splitlines(): anybody who may mount may have a "\r" in a path, and the kernel does not escape it.
            return frozenset(table.read().split(b"\n"))


def mount_points(table: bytes) -> frozenset[str]:
    """The mount points in rows of mountinfo (proc_pid_mountinfo(5)); what is no row is passed over."""
    rows = (line.split(b" ", 5) for line in table.split(b"\n"))
    return frozenset(_unescape(row[4]) for row in rows if len(row) > 5)


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


def _unescape(field: bytes) -> str:
    r"""A field of mountinfo, in which blanks and backslashes are written like `\040`."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field))
