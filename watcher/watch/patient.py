# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `Watcher` for paths that may hang: the event loop never follows one.

The event loop reads the kernel's events, and tells whom they concern. A thread follows paths where they have to be
followed anew, and works on the nodes alone meanwhile. The loop then only reads the nodes, to tell whom an event
concerns, and keeps the event for the time when the thread is done. A drop, for which nothing has to be followed, costs
no thread.

A step that does not end (a dead network mount, a FUSE file system whose author has stopped it) is left alone. Another
thread begins anew, with an inotify instance of its own, and with a bar at the mount point behind which the first one
hangs: no path is followed beyond it. Until all else is watched again the old instance goes on telling. When the hung
step comes back, well or not, the bar is lifted, and all that wait behind it are told. Nothing polls.

A file system that answers, but slowly, is left alone for a while in the same way, and for longer each time.

So a file system that hangs costs one thread and one inotify instance, however many services are on it.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterable

import trio
from inotify_simple import INotify, flags

from watcher.model import Interest, Remark, problem
from watcher.watch.follow_links import Follower
from watcher.watch.watched_directories import CHILDREN, Abandoned, Route, WatchedDirectories
from watcher.watch.watcher import RETRY_SEC, Watcher, new_inotify

STEP_HANGS_SEC = 5.0
"""A step that takes longer hangs. A step is one system call; to follow paths takes thousands of them."""

LATE_SEC = 2 * STEP_HANGS_SEC
"""After so long `watch()` returns, whatever is watched by then; the key is told when the rest is."""

SLOW_SEC = 10.0
"""A file system that answers, but takes longer than this for all that is to be followed, is left alone for a while."""

EVENTS_MAX = 10_000
"""So many different events are kept while paths are followed."""

LIFT_MAX_SEC = 3600.0
"""What hangs again and again is tried after this long at the latest."""


class _Run:
    """One thread that follows paths, and what it works on.

    Attributes:
        since: when it was first seen at the step that is under way.
        steps: how many it had made then.
        look_at: when to look whether it is too slow.
        spent: seconds, by mount point.
        place: where it hangs.
    """

    def __init__(self, inotify: INotify, follower: Follower, now: float) -> None:
        self.inotify = inotify
        self.follower = follower
        self.directories = follower.directories
        self.since = now
        self.steps = self.directories.steps
        self.look_at = now + SLOW_SEC / 10
        self.spent: dict[str, float] = {}
        self.place = ""


class PatientWatcher(Watcher):
    """Says whose directories changed, whatever hangs. Use `watch()` instead of `set()`.

    Raises:
        OSError: as `Watcher`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run: _Run | None = None
        self._before: _Run | None = None  # goes on telling until the first run after it is done
        # Kept while a thread has the nodes: what is to be done with them, and events.
        self._backlog: list[Callable[[], None]] = []
        self._events: dict[tuple[int, int, str], None] = {}
        self._fresh: set[Route] = set()  # not followed yet: `watch()` tells of them itself
        self._late: set[Route] = set()  # for which `watch()` has not waited to the end
        self._ran = trio.Event()  # set when a thread has ended
        self._failed: BaseException | None = None
        self._hung: list[_Run] = []
        # By place: how often in a row it hung, and when last; when to try it again.
        self._hangs: dict[str, tuple[int, float]] = {}
        self._lift_at: dict[str, float] = {}
        self._said: tuple[Remark, ...] = ()
        self._closed = False

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        if self._run is not None:
            self._run.directories.abandoned = True
        super().__exit__(*exc)

    def _close_inotify(self) -> None:
        """Close all but those that threads still use: they end with the program."""
        if self._run is None:
            self._inotify.close()
        if self._before is not None and self._before not in self._hung:
            self._before.inotify.close()

    async def watch(self, key: str, interests: Iterable[Interest]) -> bool:
        """As `set()`, but this returns after LATE_SEC at the latest."""
        new, old = self._replace(key, interests)
        if fresh := {route for route in new if route.state == 0}:
            self._when_free(lambda: self._follow(fresh))
        self._leave(key, old)
        with trio.move_on_after(LATE_SEC) as patience:
            while any(route.state == 0 for route in self._keys.get(key, ())):
                self._go_on()
                await self._ran.wait()
        if patience.cancelled_caught:
            self._late |= {route for route in self._keys.get(key, ()) if route.state == 0}
        return bool(new)

    def retry(self) -> None:
        self._when_free(self._retry_all)

    def _retry_all(self) -> None:
        super()._retry()
        os.eventfd_write(self._poke, 1)

    def remarks(self) -> tuple[Remark, ...]:
        if self._run is None:
            self._said = super().remarks()
        return self._said

    def _forget(self, route: Route) -> None:
        follower = self._follower
        self._when_free(lambda: follower.forget(route))

    def _follow(self, fresh: set[Route]) -> None:
        wanted = {route for route in fresh if self._routes.get(route.interest) is route}
        self._fresh |= wanted
        self._directories.dirty |= wanted

    def _when_free(self, what: Callable[[], None]) -> None:
        """Do something with the nodes: now, or when the thread that works on them is done."""
        if self._run is None:
            what()
        else:
            self._backlog.append(what)

    # What the base class asks for in `changes()`

    def _collect(self) -> frozenset[str]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._poke)
        if self._failed is not None:
            raise self._failed
        told: set[str] = set()
        if self._before is not None:
            for wd, mask, _, name in self._before.inotify.read(timeout=0):
                self._note(self._before.directories, wd, mask, name)
                told |= self._concerned(self._before.directories, wd, mask, name)
        for wd, mask, _, name in self._inotify.read(timeout=0):
            self._note(self._directories, wd, mask, name)
            if self._run is None:
                self._event(wd, mask, name)
            else:
                told |= self._concerned(self._directories, wd, mask, name)
                self._keep(wd, mask, name)
        if self._run is None:
            self._read_mounts()
            told |= self._take()  # what is known already does not wait for the rest
            self._go_on()
        else:
            self._watch_the_thread()
        return frozenset(told)

    def _keep(self, wd: int, mask: int, name: str) -> None:
        """Keep an event until its paths can be followed; of too many keep, as the kernel does, that some are lost."""
        kept = len(self._events) < EVENTS_MAX
        self._events[(wd, mask, name) if kept else (-1, int(flags.Q_OVERFLOW), "")] = None

    def _wake_if_needed(self) -> None:
        if self._run is None:
            super()._wake_if_needed()

    def _next_retry(self, now: float) -> float:
        if self._run is not None:
            return min(self._run.since + STEP_HANGS_SEC, self._run.look_at)
        return min((super()._next_retry(now), *self._lift_at.values()))

    def _retry(self) -> None:
        if self._run is not None:
            self._watch_the_thread()
            return
        now = trio.current_time()
        for place in [place for place, when in self._lift_at.items() if when <= now]:
            del self._lift_at[place]
            self._directories.unbar(place)
        if now >= self._retry_at:
            super()._retry()

    @staticmethod
    def _concerned(directories: WatchedDirectories, wd: int, mask: int, name: str) -> set[str]:
        """Whom an event concerns. Another thread may be working on the nodes, so they are only read."""
        keys: set[str] = set()
        for node in directories.nodes(wd):
            for route in node.ends:
                if (mask & CHILDREN and route.matches(name)) if name else (mask & flags.ATTRIB):
                    keys |= route.keys
            for route in node.trees():
                keys |= route.keys
        return keys

    # The thread

    def _go_on(self) -> None:
        """Start a thread if there is anything to follow, and none at work."""
        if self._run is not None or not (self._directories.dirty or self._directories.relist):
            return
        run = self._run = _Run(self._inotify, self._follower, trio.current_time())
        token = trio.lowlevel.current_trio_token()

        def follow() -> None:
            try:
                self._follow_all(run.follower)
            except Abandoned:
                pass
            except BaseException as error:  # noqa: BLE001 -- `_collect()` raises it again
                self._failed = error

        def done(_: object) -> None:
            try:
                token.run_sync_soon(self._done, run)
            except trio.RunFinishedError:
                run.inotify.close()

        trio.lowlevel.start_thread_soon(follow, done, "confext-paths")

    def _done(self, run: _Run) -> None:
        """A thread has ended."""
        if self._closed:
            run.inotify.close()
            return
        if run is self._run:
            self._take_back(run)
        else:
            self._came_back(run)
        self._ran.set()
        self._ran = trio.Event()
        os.eventfd_write(self._poke, 1)

    def _take_back(self, run: _Run) -> None:
        """The nodes are the event loop's again."""
        self._run = None
        todo = run.directories
        if not todo.dirty and not todo.relist:
            if self._before is not None:
                # What happened before everything was watched again is not known.
                todo.changed.update(self._routes.values())
                self._silence(self._before)
            else:
                todo.changed -= self._fresh
            self._fresh.clear()
        self._said = super().remarks()
        late = {route for route in self._late if route.state != 0}
        self._late -= late
        todo.changed |= late
        backlog, self._backlog = self._backlog, []
        for what in backlog:
            what()
        events, self._events = self._events, {}
        for event in events:
            self._event(*event)

    def _watch_the_thread(self) -> None:
        run, now = self._run, trio.current_time()
        if run is None:
            return
        if run.directories.steps != run.steps:
            run.steps, run.since = run.directories.steps, now
        if now >= run.since + STEP_HANGS_SEC or (now >= run.look_at and self._is_too_slow(run, now)):
            self._take_over(run)

    def _is_too_slow(self, run: _Run, now: float) -> bool:
        """Whether one file system took so much time that the others must not wait for it any longer."""
        passed, run.look_at = now - run.look_at + SLOW_SEC / 10, now + SLOW_SEC / 10
        point = self._mounts.point(run.directories.at.path)
        run.spent[point] = run.spent.get(point, 0.0) + passed
        return point != "/" and run.spent[point] >= SLOW_SEC

    def _take_over(self, hung: _Run) -> None:
        """Begin anew, without what is behind the place where a thread hangs."""
        try:
            inotify = new_inotify()
        except OSError as error:
            hung.since = trio.current_time()  # no instance is left: try again after STEP_HANGS_SEC
            text = f"does not answer, and until it does nothing new is watched: {problem(error)}"
            self._said = (Remark("warning", hung.directories.at.path, text),)
            return
        now = trio.current_time()
        hung.directories.abandoned = True
        path = hung.directories.at.path
        point = self._mounts.point(path)
        hung.place = path if point == "/" else point
        self._hung.append(hung)
        self._hangs = {place: one for place, one in self._hangs.items() if one[1] > now - LIFT_MAX_SEC}
        self._hangs[hung.place] = (self._hangs.get(hung.place, (0, now))[0] + 1, now)
        self._lift_at.pop(hung.place, None)
        if self._before is None:
            self._before = hung
        else:
            self._epoll.unregister(hung.inotify.fileno())
        self._inotify = inotify
        self._epoll.register(inotify.fileno(), select.EPOLLIN)
        self._follower = Follower(inotify)
        for place in {*self._lift_at, *(one.place for one in self._hung)}:
            self._directories.bar(place)
        self._renew_routes()
        self._run = None
        self._go_on()

    def _renew_routes(self) -> None:
        """Make new ones: the thread that hangs may still change the old ones."""
        before, self._routes = self._routes, {interest: Route(interest) for interest in self._routes}
        for interest, route in self._routes.items():
            route.keys = before[interest].keys
        self._keys = {
            key: frozenset(self._routes[route.interest] for route in routes)
            for key, routes in self._keys.items()
        }
        self._late = {self._routes[route.interest] for route in self._late if route.interest in self._routes}
        self._fresh.clear()
        self._backlog.clear()  # about nodes that are no more
        self._events.clear()
        self._renames.clear()
        self._directories.dirty.update(self._routes.values())

    def _silence(self, run: _Run) -> None:
        """Read no more events of its inotify instance: another one tells all of them now."""
        self._before = None
        self._epoll.unregister(run.inotify.fileno())
        if run not in self._hung:
            run.inotify.close()

    def _came_back(self, run: _Run) -> None:
        """A step that hung has ended after all, well or not. Try its place again, but not at once if that was slow."""
        self._hung.remove(run)
        if run is not self._before:
            run.inotify.close()
        if any(one.place == run.place for one in self._hung):
            return
        slow = run.spent.get(run.place, 0.0) >= SLOW_SEC
        again = self._hangs.get(run.place, (1, 0.0))[0] - (0 if slow else 1)
        if again:
            self._lift_at[run.place] = trio.current_time() + min(RETRY_SEC * 2 ** (again - 1), LIFT_MAX_SEC)
        else:
            self._when_free(lambda: self._directories.unbar(run.place))
