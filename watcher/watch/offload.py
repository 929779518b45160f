# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs what works on a service's paths in threads. Any of them may hang, and then only that service waits.

A path may lead to a network file system whose server is gone, or to a FUSE file system whose author has stopped it.
A look-up there waits in the kernel, and cannot be called back. So the event loop never works on such paths. The
alternatives for a thread:

- trio's own limiter: 40 threads for all. Forty services on one dead mount take them all, and the others wait.
- A process for each service: could be killed, costs 10 MiB each, and the leases, locks and descriptors of a copy would
  have to go with it. A thread that waits for a FUSE server which has taken its request cannot be killed either.

So each service has one thread at most. When its job does not end, we leave the job alone, and the next job of that
service is refused at once. When the first one comes back, the service is looked at again. Nothing polls.

Before a program is started by execve(2), a process tries the paths instead: see `comes_back()`.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import trio

from watcher.mounts.workers import HANGS_SEC

P = ParamSpec("P")
T = TypeVar("T")

_UNANSWERED = (
    "a file system that its configuration comes from, or its root, does not answer;"
    " it goes on by itself when that answers, or is unmounted (umount -f)"
)

CROWD = 8
CROWD_SEC = 0.1
"""So many jobs begin at once: more of them would fight for the interpreter. A job that takes longer than these seconds
lets the next one begin."""


class Unanswered(Exception):
    """The files of a service do not answer. It is looked at again by itself as soon as they do."""


class _Key:
    """What runs for one service."""

    def __init__(self) -> None:
        self.turn = trio.CapacityLimiter(1)
        self.given_up = False


class Offload:
    """Runs functions in threads, one at a time for each key.

    Args:
        returned: called with the key, when a job that was given up has come to an end.
    """

    def __init__(self, returned: Callable[[str], None] = lambda key: None) -> None:
        self.returned = returned
        self._keys: dict[str, _Key] = {}
        self._crowd = trio.CapacityLimiter(CROWD)

    async def run(self, key: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function, in its turn. If the caller is cancelled, the function goes on alone.

        A large image on a slow disk may take longer than HANGS_SEC. Its copy goes on, and the next look finds it.

        Raises:
            Unanswered: it does not end within HANGS_SEC, or one before it has not.
        """
        return await self.run_within(HANGS_SEC, key, lambda: function(*args, **kwargs))

    def forget(self, key: str) -> None:
        """No more work comes for this key. What still runs goes on, and `returned` is called if it was given up."""
        state = self._keys.get(key)
        if state is not None and not state.turn.borrowed_tokens:
            del self._keys[key]

    async def run_within(self, seconds: float, key: str, function: Callable[[], T]) -> T:
        """`run()` for a caller that waits so many seconds at most."""
        state = self._keys.setdefault(key, _Key())
        if state.given_up:
            raise Unanswered(_UNANSWERED)
        job: Future[T] = Future()
        with trio.move_on_after(min(seconds, HANGS_SEC)):
            await state.turn.acquire_on_behalf_of(job)
            try:
                await self._crowd.acquire_on_behalf_of(job)
            except BaseException:
                state.turn.release_on_behalf_of(job)
                raise
            try:
                done = self._start(key, state, job, function)
                with trio.move_on_after(CROWD_SEC):
                    await done.wait()
            finally:
                self._crowd.release_on_behalf_of(job)
            await done.wait()
            return job.result()
        if seconds >= HANGS_SEC:
            state.given_up = state.turn.borrowed_tokens > 0
        raise Unanswered(_UNANSWERED)

    def _start(self, key: str, state: _Key, job: Future[T], function: Callable[[], T]) -> trio.Event:
        """Start a thread; the event is set when it has ended."""
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()

        def work() -> None:
            try:
                job.set_result(function())
            except BaseException as error:  # noqa: BLE001 -- raised again where it is waited for
                job.set_exception(error)

        def end() -> None:
            state.turn.release_on_behalf_of(job)
            done.set()
            given_up, state.given_up = state.given_up, False
            if given_up:
                self.returned(key)

        def deliver(_: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(end)

        trio.lowlevel.start_thread_soon(work, deliver, f"confext-{key}")
        return done


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
