# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the services that run on stacks up to date with the host's own `/etc`.

One thread waits for the kernel's events, and refreshes what they concern (mounts/refresh.py). It is not the event
loop: there it would wait for the rounds of services, and each wake-up costs more than most changes do. It holds
descriptors that were opened once, looks at local file systems only, and never waits for a process. Where nothing
changes, it sleeps.

Changes are read PACE_SEC apart. A long burst of them (a package is upgraded) is read with pauses of PAUSE times what
the work took, but no longer ones than PAUSE_MAX_SEC: so it takes about a fiftieth of one processor.

A name that a process holds open stays old. It may be held for an instant only: it is tried again a few times. Then
`held` is told, and the stack is mounted anew. Of a name that changes meanwhile nothing is told: a look takes time, and
what it has found of that name is not true any more.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from inotify_simple import INotify

from watcher.model import Remark
from watcher.mounts.refresh import BaseNow, Changes, View, is_concerned, listed_wrongly, still_old
from watcher.records import journal
from watcher.watch.base import Base, BaseWatches, gap_remark, reason
from watcher.watch.watcher import RETRY_SEC, new_inotify

PACE_SEC = 0.010
"""Changes are read this far apart."""

SHORT = 20
QUIET_SEC = 0.5
"""A burst of so few reads has no longer pauses: a certificate is renewed, and nginx reloaded in the next line. A burst
ends when nothing has changed for so long."""

PAUSE = 50
PAUSE_MAX_SEC = 0.050

_RECHECK_SEC = 0.050
"""After so long the kernel is asked a second time, see mounts/refresh.py."""

_PAUSES_SEC = (0.0, 0.0, 0.0, 0.001, 0.002, 0.004, 0.008)
"""After each of these a name that is held is tried again."""

_OLDER_MAX = 4


@dataclass(frozen=True, slots=True)
class Held:
    """Names of a service's overlays that stay old, because processes hold them (or a layer has them).

    Attributes:
        service: its name.
        paths: below `/etc`.
        devices: of the overlays, `View.device`.
    """

    service: str
    paths: tuple[str, ...]
    devices: frozenset[int]


@dataclass(slots=True)
class _Followed:
    """
    Attributes:
        key: changes with its start, and with its stack.
        views: what its namespaces show.
        older: overlays of the same stack that were replaced: a process may still hold a directory of them.
        tells: a change is told.
        failed: what was said last of a refresh that failed.
    """

    key: object = None
    views: list[View] = field(default_factory=list)
    older: list[View] = field(default_factory=list)
    tells: bool = False
    failed: str = ""


@dataclass(slots=True)
class _Again:
    """Names that were held when their view was refreshed: how often each was tried since it changed, and when next."""

    service: str
    tries: dict[str, int] = field(default_factory=dict)
    at: float = 0.0


class Freshness:
    """Follows the bases of services. `close()` it at the end.

    Args:
        held: called when names stay old; by the thread.
        changed: called with a service on a base that has changed, and whether it is to be told; by the thread.
        remarked: called when `remarks()` are others than before; by the thread.
        begin: called first; by the thread. fspick(2) asks for the right to mount where the thread is.
    """

    def __init__(
        self,
        held: Callable[[Held], None],
        changed: Callable[[str, bool], None] = lambda name, tells: None,
        remarked: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._held, self._changed, self._remarked, self._begin = held, changed, remarked, begin
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._followed: dict[str, _Followed] = {}
        self._bases: dict[tuple[int, int], Base] = {}
        self._users: dict[Base, set[str]] = {}
        self._again: dict[View, _Again] = {}
        self._read_at = 0.0
        self._reads = 0  # of this burst
        self._changes: dict[Base, Changes] = {}
        self._burst: dict[Base, Changes] = {}  # all of it
        self._recheck_at = math.inf
        self._inotify: INotify | None = None
        self._watches: BaseWatches | None = None
        self._look_at = math.inf
        self._remarks: tuple[Remark, ...] = ()

    def follow(self, name: str, key: object, views: list[View], *, tells: bool) -> None:
        """From now on keep these fresh, and nothing else of this service; they are ours to close.

        Args:
            key: what a view that is not among `views` any more was of; while it is the same, that stays fresh too.
            tells: whether `changed` is to tell this service.
        """
        if self._stopped or (not views and self._thread is None):
            for view in views:  # a look was under way when we were closed
                view.close()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="confext-fresh", daemon=True)
            self._thread.start()
        self._order(lambda: self._set(name, key, views, tells))

    def drop(self, name: str) -> None:
        """Let go of a service; it may be unknown."""
        self.follow(name, None, [], tells=False)

    def retry(self) -> None:
        """Try at once to watch what could not be watched: the limit may be higher now."""
        if self._thread is not None and not self._stopped:
            self._order(self._look_by_time)

    def remarks(self) -> tuple[Remark, ...]:
        """What cannot be watched, and why; the caller remembers what it has said."""
        return self._remarks

    def close(self) -> None:
        """End the thread."""
        self._stopped = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join(1.0)
            if self._thread.is_alive():  # it ends with the program, and so do its descriptors
                return
        os.close(self._wake)

    def _order(self, what: Callable[[], None]) -> None:
        self._orders.put(what)
        os.eventfd_write(self._wake, 1)

    # The thread

    def _run(self) -> None:
        self._begin()
        try:
            self._inotify = new_inotify()
        except OSError as error:
            self._say([gap_remark(str(error.strerror))])
        else:
            self._watches = BaseWatches(self._inotify)
        while not self._stopped:
            self._wait()
            try:
                self._look()
            except Exception:  # noqa: BLE001 -- a bug that one change brings out must not end the thread
                journal.log.exception(
                    "a bug in confext-watcher: what the host changed in /etc may not be seen"
                )
        self._end()

    def _wait(self) -> None:
        """Until there is something to do."""
        until = min([self._look_at, self._recheck_at, *(again.at for again in self._again.values())])
        if self._inotify is not None and self._poll(until, self._inotify.fileno()):
            # Events gather until then: one look for all of them.
            self._poll(min(until, self._read_at))

    def _poll(self, until: float, *fds: int) -> bool:
        """Whether there are events; whoever gives an order ends the wait."""
        poll = select.poll()
        for fd in (self._wake, *fds):
            poll.register(fd, select.POLLIN)
        left = until - time.monotonic()
        ready = poll.poll(None if left == math.inf else max(0, math.ceil(left * 1000)))
        return any(fd != self._wake for fd, _ in ready)

    def _end(self) -> None:
        for followed in self._followed.values():
            for view in (*followed.views, *followed.older):
                view.close()
        if self._inotify is not None:
            self._inotify.close()

    def _look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._orders.empty():
            self._orders.get()()
        now = time.monotonic()
        if now >= self._read_at:
            self._read()
        if now >= self._recheck_at:
            self._recheck_at = math.inf
            recheck, self._changes = self._changes, {}
            for base, changes in recheck.items():
                self._tell(base, changes)
                self._check_lists(base, changes)
        if now >= self._look_at:
            self._look_by_time()
        bases: dict[Base, BaseNow] = {}
        for view in [view for view, again in self._again.items() if again.at <= now]:
            base = self._bases[view.base_id]
            self._try_again(view, bases.setdefault(base, BaseNow(base.fd)))
        self._note_gaps()

    def _read(self) -> None:
        begun = time.thread_time()
        found = self._watches.read() if self._watches is not None else None
        if not found:
            return
        if time.monotonic() - self._read_at > QUIET_SEC:
            self._reads = 0
            self._burst.clear()
        for base, changes in found.items():
            for name, followed in self._on(base):
                self._changed(name, followed.tells)
            self._tell(base, changes)
            self._changes.setdefault(base, Changes()).merge(changes)
            self._burst.setdefault(base, Changes()).merge(changes)
            self._recheck_at = min(self._recheck_at, time.monotonic() + _RECHECK_SEC)
        self._reads += 1
        spent = time.thread_time() - begun
        # A service may be able to fill a root of its own with changes: then it takes a fifth at most.
        pause = min(spent * PAUSE, max(PAUSE_MAX_SEC, spent * 4)) if self._reads > SHORT else 0.0
        self._read_at = time.monotonic() + max(pause, PACE_SEC)

    def _tell(self, base: Base, changes: Changes) -> None:
        """Refresh each service on this base that remembers something of what has changed."""
        now = BaseNow(base.fd)
        replaced = {path: 0 for path, replaced in changes.paths() if replaced}
        for name, followed in self._on(base):
            views = [view for view in (*followed.views, *followed.older) if self._bases[view.base_id] is base]
            concerned = [view for view in views if is_concerned(view, changes, now)]
            for view in concerned:
                self._refresh(name, view)
                if replaced:
                    self._again.setdefault(view, _Again(name))
            for again in filter(None, map(self._again.get, views if replaced else ())):
                again.tries |= replaced
                again.at = 0.0
            if concerned:
                journal.log.debug(f"{name}: the host's own /etc has changed: {changes}", service=name)

    def _check_lists(self, base: Base, changes: Changes) -> None:
        """Tell of directories that do not list what has changed."""
        for name, followed in self._on(base):
            for view in followed.views:
                if self._bases[view.base_id] is base and (wrong := listed_wrongly(view, changes)):
                    self._read()
                    since = dict(self._changes[base].paths()) if base in self._changes else {}
                    self._tell_held(name, view, [path for path in wrong if path not in since])

    def _on(self, base: Base) -> list[tuple[str, _Followed]]:
        return [(name, self._followed[name]) for name in self._users.get(base, ())]

    def _refresh(self, service: str, view: View) -> None:
        followed = self._followed[service]
        try:
            view.drop_unused()
        except OSError as error:
            if str(error) != followed.failed:
                followed.failed = str(error)
                text = f"{service}: files that the host replaced in /etc may stay old: {error}"
                journal.log.warning(text, service=service)

    def _try_again(self, view: View, now: BaseNow) -> None:
        """Refresh a view with names that were held, if they still are; tell if that does not help."""
        again = self._again[view]
        old = still_old(view, again.tries, now)
        if old:
            self._refresh(again.service, view)
        again.tries = {path: again.tries[path] + 1 for path in old}
        if len(_PAUSES_SEC) in again.tries.values():
            self._read()  # a name that has changed meanwhile starts anew
        held = [path for path, tries in again.tries.items() if tries == len(_PAUSES_SEC)]
        for path in held:
            del again.tries[path]
        if again.tries:
            again.at = time.monotonic() + _PAUSES_SEC[min(again.tries.values())]
        else:
            del self._again[view]
        self._tell_held(again.service, view, held)

    def _tell_held(self, service: str, view: View, paths: Iterable[str]) -> None:
        if paths and view in self._followed[service].views:
            self._held(Held(service, tuple(sorted(paths)), frozenset((view.device,))))

    def _look_by_time(self) -> None:
        """For what cannot be watched: refresh it, and try to watch it."""
        self._look_at = math.inf
        for base in [base for base in self._bases.values() if self._is_gap(base)]:
            self._tell(base, Changes(anything=True))
            if self._watches is not None:
                self._watches.add(base)

    def _is_gap(self, base: Base) -> bool:
        return (bool(base.gap) or self._watches is None) and not base.fixed

    def _note_gaps(self) -> None:
        gaps = [base for base in self._bases.values() if self._is_gap(base)]
        if not gaps:
            self._look_at = math.inf
        elif self._look_at == math.inf:
            self._look_at = time.monotonic() + RETRY_SEC
        if self._watches is not None:
            self._say(sorted({gap_remark(reason(base.gap)) for base in gaps}, key=str))

    def _say(self, remarks: Iterable[Remark]) -> None:
        remarks = tuple(remarks)
        if remarks != self._remarks:
            self._remarks = remarks
            self._remarked()

    # What is followed

    def _set(self, name: str, key: object, views: list[View], tells: bool) -> None:
        before = self._followed.pop(name, None) or _Followed()
        new = {view.device for view in views}
        gone = [view for view in (*before.views, *before.older) if view.device not in new]
        again = [view for view in (*before.views, *before.older) if view.device in new]
        kept = gone[:_OLDER_MAX] if views and before.key == key else []
        for view in views:
            self._enter(name, view)
        if views:
            self._followed[name] = _Followed(key, views, kept, tells)
        for view in (*again, *gone[len(kept) :]):
            self._leave(name, view)
        for view in views:
            # What changed before it was followed; a process may hold that just now.
            self._refresh(name, view)
            if burst := self._burst.get(self._bases[view.base_id]):
                self._again[view] = _Again(
                    name, dict.fromkeys((path for path, new in burst.paths() if new), 0)
                )

    def _enter(self, name: str, view: View) -> None:
        base = self._bases.get(view.base_id)
        if base is None:
            base = self._bases[view.base_id] = Base(view.take_base(), view.fstype)
            if self._watches is not None:
                self._watches.add(base)
        else:
            os.close(view.take_base())
        self._users.setdefault(base, set()).add(name)

    def _leave(self, name: str, view: View) -> None:
        base_id = view.base_id
        view.close()
        self._again.pop(view, None)
        followed = self._followed.get(name)
        if followed is not None and any(v.base_id == base_id for v in (*followed.views, *followed.older)):
            return
        if (base := self._bases.get(base_id)) is None:
            return
        self._users[base].discard(name)
        if not self._users[base]:
            del self._users[base], self._bases[base_id]
            self._changes.pop(base, None)
            self._burst.pop(base, None)
            if self._watches is not None:
                self._watches.remove(base)
            os.close(base.fd)
