# SPDX-License-Identifier: LGPL-2.1-or-later
"""What works on a service's paths, in threads: any of them may hang, and then nobody but that service waits.

A path may lead to a network file system whose server is gone, or to a FUSE file system whose author has stopped it. Who
looks it up waits in the kernel, and cannot be called back. The event loop therefore never works on such paths. The
alternatives for a thread:

- trio's own limiter: 40 threads for all. Forty services on one dead mount take them all, and the others wait.
- A process for each service: could be killed, costs 10 MiB each, and the leases, locks and descriptors of a copy would
  have to go with it. A thread that waits for a FUSE server which has taken its request cannot be killed either.

So each service has one thread at most. When its job does not end, the job is left alone, and whoever asks for another
is told so at once, until the first one comes back: then the service is looked at again. Nobody polls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")

HANGS_SEC = 30.0
"""After so many seconds a job counts as hanging. A large image on a slow disk takes longer, and is not lost: its copy
goes on, and is found when the service is looked at again."""


_UNANSWERED = "a file system that its configuration comes from, or its root, does not answer"


class Unanswered(Exception):
    """The files of a service do not answer. It is looked at again as soon as they do, without anybody asking."""


class _Key:
    """What runs for one service. `lock` guards the other two, which its thread changes as well."""

    def __init__(self) -> None:
        self.turn = trio.CapacityLimiter(1)
        self.lock = threading.Lock()
        self.running = False
        self.given_up = False


class Offload:
    """Runs functions in threads, one at a time for each key.

    Args:
        returned: called on the event loop with the key, when a job that was given up has come to an end.
    """

    def __init__(self, returned: Callable[[str], None] = lambda key: None) -> None:
        self.returned = returned
        self._keys: dict[str, _Key] = {}

    async def run(self, key: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function, in its turn. Whoever is cancelled leaves it alone, and goes.

        Raises:
            Unanswered: it does not end, or one before it has not.
        """
        return await self.run_within(HANGS_SEC, key, lambda: function(*args, **kwargs))

    async def run_within(self, seconds: float, key: str, function: Callable[[], T]) -> T:
        """`run()`, for a caller who does not wait longer than so many seconds."""
        state = self._keys.setdefault(key, _Key())
        if state.given_up:
            raise Unanswered(_UNANSWERED)
        work = self._work(key, state, function)
        with trio.move_on_after(min(seconds, HANGS_SEC)):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=state.turn)
        if seconds >= HANGS_SEC:
            with state.lock:
                state.given_up = state.running
        raise Unanswered(_UNANSWERED)

    def _work(self, key: str, state: _Key, function: Callable[[], T]) -> Callable[[], T]:
        token = trio.lowlevel.current_trio_token()

        def work() -> T:
            state.running = True
            try:
                return function()
            finally:
                with state.lock:
                    state.running = False
                    given_up, state.given_up = state.given_up, False
                if given_up:
                    try:
                        token.run_sync_soon(self.returned, key)
                    except trio.RunFinishedError:
                        pass

        return work
