# SPDX-License-Identifier: LGPL-2.1-or-later
"""The jobs of `offload.py`: what is run in a thread, and what comes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import trio

from watcher.records.together import Gathering, Together


class Turn:
    """The jobs of one service: the first is in the queue or runs, the others wait for it."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.given_up = False


class Job:
    """A function, and what comes of it.

    Attributes:
        key: whose turn it needs; None: nobody's.
        begun: a worker has begun it.
        need: what it waits for, which is done for several jobs together.
        error: what was raised by that.
        found: what it returned, if it has ended.
        raised: or what it raised.
        has_got: it got such a thing before.
        done: the event loop knows the result.
    """

    def __init__(self, key: str | None, function: Callable[[], Any]) -> None:
        self.key = key
        self.found: Any = None
        self.raised: BaseException | None = None
        self.done = trio.Event()
        self.begun = False
        self.need: Together | None = None
        self.error: Exception | None = None
        self.has_got = False
        self._function = function
        self._steps: Gathering[Any] | None = None

    def run(self) -> bool:
        """Go on with it. True: it is over; else there is a `need`."""
        error, self.need, self.error = self.error, None, None
        try:
            if self._steps is None:
                found = self._function()
                if not isinstance(found, Generator):
                    self.found = found
                    return True
                self._steps = found
            self.need = next(self._steps) if error is None else self._steps.throw(error)
        except StopIteration as end:
            self.found = end.value
        except BaseException as raised:  # noqa: BLE001 -- raised again where it is waited for
            self.raised = raised
        return self.need is None

    def result(self) -> Any:
        """What it returned; raises what it raised. Once, when it has ended."""
        if self.raised is not None:
            raise self.raised
        return self.found


def get_needs(jobs: Sequence[Job]) -> None:
    """Do what jobs need, for all of them together."""
    needs: dict[Callable[[Sequence[Any]], None], list[Job]] = {}
    for job in jobs:
        assert job.need is not None
        needs.setdefault(job.need.function, []).append(job)
    for function, some in needs.items():
        try:
            function([job.need.item for job in some if job.need is not None])
        except Exception as error:  # noqa: BLE001 -- raised in each of the jobs
            for job in some:
                job.error = error
    for job in jobs:
        job.need, job.has_got = None, True
