# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs what works on a service's paths in threads. Any of them may hang, and then only that service waits.

A path may lead to a network file system whose server is gone, or to a FUSE file system whose author has stopped it.
A look-up there waits in the kernel, and cannot be called back. So the event loop never works on such paths. The
alternatives for a thread:

- trio's own limiter: 40 threads for all. Forty services on one dead mount take them all, and the others wait.
- A process for each service: could be killed, costs 10 MiB each, and the leases, locks and descriptors of a copy would
  have to go with it. A thread that waits for a FUSE server which has taken its request cannot be killed either.

So each service has one job at a time. When that does not end, we leave it alone, and the next job of that service is
refused at once. When the first one comes back, the service is looked at again. Nothing polls.

**One worker is active**: it takes job after job from one queue. Several would fight for the interpreter, which costs
more than the work (a hundred services with eight threads: four times the processor time). A job that takes longer than
SLOW_SEC costs its worker that place: another one goes on with the queue, and the first one ends after its job. So many
services that hang, or a large copy, keep nobody waiting for longer than that.

**What costs the same for many as for one is done for many** (`records/together.py`): a job that is a generator gives up
its worker where it needs such a thing. The first job gets it at once, so that the first service is not kept waiting for
the last one; then four of them together, then sixteen, or as many as there are.

Before a program is started by execve(2), a process tries the paths instead: see `watch/comes_back.py`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import trio

from watcher.mounts.whereabouts import is_lost
from watcher.records.together import Gathering
from watcher.watch.jobs import Job, Turn, get_needs

P = ParamSpec("P")
T = TypeVar("T")

_UNANSWERED = (
    "a file system that its configuration comes from, or its root, does not answer;"
    " it goes on by itself when that answers, or is unmounted (umount -f)"
)

HANGS_SEC = 30.0
"""Seconds after which a job counts as hanging."""

SLOW_SEC = 0.01
"""Seconds after which another worker takes over the queue."""

# In a burst, so many times as many jobs as the last time are gathered, up to the second: each holds descriptors.
_MORE = 4
_GATHERED_MAX = 32
# Of what nobody waits for; and the seconds that it waits while there is always something else to do.
_LAST_MAX = 64
_LAST_SEC = 0.25
# For what has happened, and is just being written down, when the program ends.
_GRACE_SEC = 5.0


class Unanswered(Exception):
    """The files of a service do not answer.

    Attributes:
        returns: `Offload.returned` is called when they do.
    """

    def __init__(self, *, returns: bool = True) -> None:
        super().__init__(_UNANSWERED)
        self.returns = returns


def _start_thread(work: Callable[[], None]) -> None:
    trio.lowlevel.start_thread_soon(work, lambda _: None, "confext-worker")


class Offload:
    """Runs functions in threads, one at a time for each key. For one event loop.

    Args:
        returned: called with the key, when a job that was given up has come to an end.
        start: runs a function in a thread, and returns; may raise OSError or RuntimeError.
    """

    def __init__(
        self,
        returned: Callable[[str], None] = lambda key: None,
        start: Callable[[Callable[[], None]], None] = _start_thread,
    ) -> None:
        self.returned = returned
        self._start = start
        self._keys: dict[str, Turn] = {}
        # What follows is shared with the workers.
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._ended: deque[Job] = deque()
        # Jobs that need something, those whose need nobody waits for, and those that have got it.
        self._gathered: list[Job] = []
        self._last: list[Job] = []
        self._last_by = math.inf
        self._resumed: deque[Job] = deque()
        self._most = 1
        self._active: _Worker | None = None
        self._supervised = False
        self._lull = trio.Event()

    async def run(self, key: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function, in its turn. If the caller is cancelled, the function goes on alone.

        A large image on a slow disk may take longer than HANGS_SEC. Its copy goes on, and the next look finds it.

        Raises:
            Unanswered: it does not end within HANGS_SEC, or one before it has not.
        """
        return await self.run_within(HANGS_SEC, key, lambda: function(*args, **kwargs))

    async def run_within(self, seconds: float, key: str, function: Callable[[], T]) -> T:
        """`run()` for a caller that waits so many seconds at most."""
        result: T = await self._run(seconds, key, function)
        return result

    async def run_gathering(
        self,
        key: str,
        function: Callable[[], Gathering[T]],
        dropped: Callable[[], None] = lambda: None,
        finishes: Callable[[], bool] = lambda: False,
    ) -> T:
        """`run()` for a function for which something is done together with others (`records/together.py`).

        Args:
            dropped: called if the function never begins.
            finishes: whether a caller that is cancelled waits a moment for its end, all the same.
        """
        result: T = await self._run(HANGS_SEC, key, function, dropped, finishes)
        return result

    async def _run(
        self,
        seconds: float,
        key: str,
        function: Callable[[], Any],
        dropped: Callable[[], None] = lambda: None,
        finishes: Callable[[], bool] = lambda: False,
    ) -> Any:
        job = Job(key, function)
        state = self._keys.setdefault(key, Turn())
        try:
            if state.given_up:
                raise Unanswered
            state.jobs.append(job)
            if state.jobs[0] is job:
                self._submit(job)
            with trio.move_on_after(min(seconds, HANGS_SEC)):
                await job.done.wait()
        except trio.Cancelled:
            if finishes():
                with trio.move_on_after(_GRACE_SEC, shield=True):
                    await job.done.wait()
            raise
        finally:
            if not job.done.is_set() and self._withdraw(job):
                dropped()
        if job.done.is_set():
            return job.result()
        if seconds >= HANGS_SEC and state.jobs:
            state.given_up = state.jobs[0].begun
        raise Unanswered(returns=state.given_up)

    async def run_alone(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that works on our own files alone, however long that takes: in nobody's turn.

        It may be a generator, see `run_gathering()`.
        """
        job = Job(None, lambda: function(*args, **kwargs))
        try:
            self._submit(job)
            await job.done.wait()
        finally:
            if not job.done.is_set():
                self._withdraw(job)
        result: T = job.result()
        return result

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do, or going on."""
        return self._active is not None

    async def lull(self) -> None:
        """Until what was submitted is done, or some of it; SLOW_SEC at most."""
        self._lull = trio.Event()
        if self._active is not None:
            with trio.move_on_after(SLOW_SEC):
                await self._lull.wait()

    def _submit(self, job: Job) -> None:
        with self._lock:
            self._queue.append(job)
            if self._active is None:
                self._start_worker()
        self._watch_over()

    def _withdraw(self, job: Job) -> bool:
        """Nobody waits for a job any more: if it has not begun, it never will. Whether that is so."""
        with self._lock:
            if job.begun:
                return False
            if job in self._queue:
                self._queue.remove(job)
        self._leave(job)
        return True

    def _leave(self, job: Job) -> None:
        """A job is over; the next one of its key takes its place."""
        if job.key is None:
            return
        state = self._keys[job.key]
        first = bool(state.jobs) and state.jobs[0] is job
        if job in state.jobs:
            state.jobs.remove(job)
        if first and state.jobs:
            self._submit(state.jobs[0])
        elif not state.jobs:
            del self._keys[job.key]

    def _start_worker(self) -> None:
        """Make a new worker the active one. Hold the lock. If no thread can be had, `_supervise()` tries it again."""
        worker = _Worker(self, trio.lowlevel.current_trio_token())
        with contextlib.suppress(OSError, RuntimeError):
            self._start(worker.work)
            self._active = worker

    def _is_work_left(self) -> bool:
        return bool(self._queue or self._gathered or self._last or self._resumed)

    def _next(self, worker: _Worker) -> list[Job]:
        """What a worker goes on with: one job, or several with a need; nothing if it is not active, or none is left."""
        with self._lock:
            if self._active is not worker:
                return []
            if self._resumed:
                jobs = [self._resumed.popleft()]
            elif self._gathered and (self._is_enough() or not self._queue):
                jobs, self._gathered = self._gathered, []
            elif self._queue and len(self._last) < _LAST_MAX and time.monotonic() < self._last_by:
                jobs = [self._queue.popleft()]
            elif self._last:
                jobs, self._last, self._last_by = self._last, [], math.inf
            else:
                self._active, self._most = None, 1
                return []
            worker.begun = time.monotonic()
            for job in jobs:
                job.begun = True
            return jobs

    def _lose(self, worker: _Worker) -> None:
        """A worker has to end. `_supervise()` starts another one."""
        with self._lock:
            if self._active is worker:
                self._active = None

    def _is_enough(self) -> bool:
        """Whether so many jobs need something that the others in the queue have to wait. Hold the lock."""
        if any(job.has_got for job in self._gathered):
            return True  # it is half-way through: a service waits
        enough = len(self._gathered) >= self._most
        if enough:
            self._most = min(self._most * _MORE, _GATHERED_MAX)
        return enough

    def _go_on(self, worker: _Worker, jobs: Sequence[Job]) -> None:
        """Jobs of a worker that are not over go on when it is their turn, and what they need is done."""
        with self._lock:
            for job in jobs:
                if job.need is None:
                    self._resumed.append(job)
                elif job.need.last:
                    self._last_by = min(self._last_by, time.monotonic() + _LAST_SEC)
                    self._last.append(job)
                else:
                    self._gathered.append(job)
            if self._active is None:  # it took so long that nobody is active any more
                self._active = worker
                worker.tell(self._watch_over)

    def _watch_over(self) -> None:
        if not self._supervised:
            self._supervised = True
            trio.lowlevel.spawn_system_task(self._supervise)

    async def _supervise(self) -> None:
        """While there are jobs: tell what has ended, and let nobody wait behind a job that takes long."""
        while True:
            await trio.sleep(self._until_slow())
            self._deliver()
            with self._lock:
                if self._active is not None and self._until_slow() <= 0:
                    self._active = None
                if self._active is None and self._is_work_left():
                    self._start_worker()
                if self._active is None and not self._is_work_left():
                    self._supervised = False
                    return

    def _until_slow(self) -> float:
        """Seconds until the active worker has been at its job for too long."""
        begun = self._active.begun if self._active is not None else None
        return SLOW_SEC if begun is None else max(0.0, begun + SLOW_SEC - time.monotonic())

    def _deliver(self) -> None:
        """Tell those who wait that their jobs have ended."""
        self._lull.set()
        while self._ended:
            job = self._ended.popleft()
            given_up = job.key is not None and self._keys[job.key].given_up
            self._leave(job)
            job.done.set()
            if given_up and job.key is not None:
                if job.key in self._keys:
                    self._keys[job.key].given_up = False
                self.returned(job.key)


class _Worker:
    """A thread that takes jobs for as long as it is the active one.

    Attributes:
        begun: when it began what it is at, `time.monotonic()`.
    """

    def __init__(self, offload: Offload, token: trio.lowlevel.TrioToken) -> None:
        self.begun: float | None = None
        self._offload = offload
        self._token = token

    def work(self) -> None:
        offload = self._offload
        while not is_lost() and (jobs := offload._next(self)):
            if jobs[0].need is not None:
                get_needs(jobs)
                offload._go_on(self, jobs)
            elif not jobs[0].run():
                offload._go_on(self, jobs)
            else:
                offload._ended.append(jobs[0])
                if not offload._is_work_left():
                    self._tell_ended()
                # Else `_supervise()` tells it of many at once: it would take the interpreter from jobs that wait.
        if is_lost():
            offload._lose(self)
        self._tell_ended()

    def _tell_ended(self) -> None:
        if self._offload._ended:
            self.tell(self._offload._deliver)

    def tell(self, what: Callable[[], None]) -> None:
        """Have the event loop call a function."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(what, idempotent=True)
