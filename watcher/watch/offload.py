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

Before a program is started by execve(2), a process tries the paths instead: see `comes_back()`.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import trio

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


class Unanswered(Exception):
    """The files of a service do not answer.

    Attributes:
        returns: `Offload.returned` is called when they do.
    """

    def __init__(self, *, returns: bool = True) -> None:
        super().__init__(_UNANSWERED)
        self.returns = returns


class _Key:
    """The jobs of one service: the first is in the queue or runs, the others wait for it."""

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.given_up = False


class _Job:
    """A function, and what comes of it.

    Attributes:
        key: whose turn it needs; None: nobody's.
        begun: when a worker began it, `time.monotonic()`; None: none has.
        done: the event loop knows the result.
    """

    def __init__(self, key: str | None, function: Callable[[], Any]) -> None:
        self.key = key
        self.result: Future[Any] = Future()
        self.done = trio.Event()
        self.begun: float | None = None
        self._function = function

    def run(self) -> None:
        try:
            self.result.set_result(self._function())
        except BaseException as error:  # noqa: BLE001 -- raised again where it is waited for
            self.result.set_exception(error)


class Offload:
    """Runs functions in threads, one at a time for each key. For one event loop.

    Args:
        returned: called with the key, when a job that was given up has come to an end.
    """

    def __init__(self, returned: Callable[[str], None] = lambda key: None) -> None:
        self.returned = returned
        self._keys: dict[str, _Key] = {}
        # What follows is shared with the workers.
        self._lock = threading.Lock()
        self._queue: deque[_Job] = deque()
        self._ended: deque[_Job] = deque()
        self._active: _Worker | None = None
        self._supervised = False

    async def run(self, key: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function, in its turn. If the caller is cancelled, the function goes on alone.

        A large image on a slow disk may take longer than HANGS_SEC. Its copy goes on, and the next look finds it.

        Raises:
            Unanswered: it does not end within HANGS_SEC, or one before it has not.
        """
        return await self.run_within(HANGS_SEC, key, lambda: function(*args, **kwargs))

    async def run_within(
        self, seconds: float, key: str, function: Callable[[], T], dropped: Callable[[], None] = lambda: None
    ) -> T:
        """`run()` for a caller that waits so many seconds at most.

        Args:
            dropped: called if the function never begins.
        """
        job = _Job(key, function)
        state = self._keys.setdefault(key, _Key())
        try:
            if state.given_up:
                raise Unanswered
            state.jobs.append(job)
            if state.jobs[0] is job:
                self._submit(job)
            with trio.move_on_after(min(seconds, HANGS_SEC)):
                await job.done.wait()
        finally:
            if not job.done.is_set() and self._withdraw(job):
                dropped()
        if job.done.is_set():
            result: T = job.result.result()
            return result
        if seconds >= HANGS_SEC and state.jobs:
            state.given_up = state.jobs[0].begun is not None
        raise Unanswered(returns=state.given_up)

    async def run_alone(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that works on our own files alone, however long that takes: in nobody's turn."""
        job = _Job(None, lambda: function(*args, **kwargs))
        try:
            self._submit(job)
            await job.done.wait()
        finally:
            if not job.done.is_set():
                self._withdraw(job)
        result: T = job.result.result()
        return result

    def _submit(self, job: _Job) -> None:
        with self._lock:
            self._queue.append(job)
            if self._active is None:
                self._start_worker()
        if not self._supervised:
            self._supervised = True
            trio.lowlevel.spawn_system_task(self._supervise)

    def _withdraw(self, job: _Job) -> bool:
        """Nobody waits for a job any more: if it has not begun, it never will. Whether that is so."""
        with self._lock:
            if job.begun is not None:
                return False
            if job in self._queue:
                self._queue.remove(job)
        self._leave(job)
        return True

    def _leave(self, job: _Job) -> None:
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
        with contextlib.suppress(RuntimeError):
            trio.lowlevel.start_thread_soon(worker.work, lambda _: None, "confext-worker")
            self._active = worker

    async def _supervise(self) -> None:
        """While there are jobs: tell what has ended, and let nobody wait behind a job that takes long."""
        while True:
            await trio.sleep(self._until_slow())
            self._deliver()
            with self._lock:
                if self._active is not None and self._until_slow() <= 0:
                    self._active = None
                if self._active is None and self._queue:
                    self._start_worker()
                if self._active is None and not self._queue:
                    self._supervised = False
                    return

    def _until_slow(self) -> float:
        """Seconds until the active worker has been at its job for too long."""
        job = self._active.job if self._active is not None else None
        if job is None or job.begun is None:
            return SLOW_SEC
        return max(0.0, job.begun + SLOW_SEC - time.monotonic())

    def _deliver(self) -> None:
        """Tell those who wait that their jobs have ended."""
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
        job: what it is at.
    """

    def __init__(self, offload: Offload, token: trio.lowlevel.TrioToken) -> None:
        self.job: _Job | None = None
        self._offload = offload
        self._token = token

    def work(self) -> None:
        offload = self._offload
        while self._next():
            assert self.job is not None
            self.job.run()
            offload._ended.append(self.job)
            if not offload._queue:
                self._tell()
            # Else the event loop would take the interpreter away from the jobs that wait. `_supervise()` tells it of
            # many at once.
        self._tell()

    def _next(self) -> bool:
        offload = self._offload
        with offload._lock:
            if offload._active is not self:
                return False
            if not offload._queue:
                offload._active = None
                return False
            self.job = offload._queue.popleft()
            self.job.begun = time.monotonic()
            return True

    def _tell(self) -> None:
        if not self._offload._ended:
            return
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._offload._deliver, idempotent=True)


def comes_back(look: Callable[[], object], seconds: float) -> bool:
    """Whether a function that follows paths of others ends, well or not. For a program without threads.

    A file system can keep a thread in the kernel so that nothing can kill it, and execve(2) waits for all threads of
    its process. So a grandchild tries it, and the program that we execute later has no child to wait for. The
    grandchild holds nothing of ours open, and ends as soon as the kernel lets it.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            _try(look, writing, math.ceil(seconds))
        os.close(writing)
        os.waitpid(child, 0)
        return bool(select.select([reading], [], [], seconds)[0])
    finally:
        os.close(reading)


def _try(look: Callable[[], object], writing: int, seconds: int) -> None:
    try:
        if os.fork() == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.alarm(seconds)
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(writing, 3 + (kept := max(null, writing)))
            for fd in range(3):
                os.dup2(null, fd)
            os.closerange(3, 3 + kept)
            os.closerange(4 + kept, os.sysconf("SC_OPEN_MAX"))
            os.chdir("/")
            with contextlib.suppress(Exception):
                look()
    finally:
        os._exit(0)  # which closes the last end of the pipe
