# SPDX-License-Identifier: LGPL-2.1-or-later
"""What rounds keep in memory. Nothing of it has to outlive the watcher: what does is in `records/state.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from watcher.mounts.converge import Compared, Converged
from watcher.records.state import State
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Judged


@dataclass(slots=True)
class Memory:
    """What was seen of one service in the rounds before, so that it is not looked at again. A lost one is made anew.

    Attributes:
        interests: what is watched for it.
        attempts: rounds in a row that left something to wait for.
        mounted: digests of what it runs on, None while that is not known.
        at_hand: digests of what the last look found and did not refuse. What has to wait is not copied again.
        compared: see `converge()`.
        ran: when a round last saw it running, `time.monotonic()`.
        blameless: of a service that went down, whether a copy was found damaged since it ran; None: not looked at.
        seen: a round has looked at it.
    """

    interests: tuple[object, ...] | None = None
    attempts: int = 0
    mounted: frozenset[str] | None = None
    at_hand: frozenset[str] = frozenset()
    compared: Compared = field(default_factory=dict)
    ran: float = 0.0
    blameless: bool | None = None
    seen: bool = False


@dataclass(slots=True)
class Round:
    """What one round has found and done so far.

    Attributes:
        since: when the change was noticed that it is for, `trio.current_time()`.
        begun: microseconds since the epoch. What was before is judged by that, however long a look takes.
        first: nothing was done yet, in the first round of this watcher.
        state: as it was read or written last.
        desired: the last look; None: look again.
        looked_with: what that look depended on.
        accepted: a new stack was accepted.
        owing: the note that a reload is owed was written with that, before it was known whether a swap is needed.
        shown: the start of the service, and the identity of the stack, that its namespaces were brought to.
        converged: what that found and did.
        judged: a verdict that is not written down yet.
    """

    since: float
    begun: int
    first: bool = False
    state: State = field(default_factory=State)
    desired: Desired | None = None
    looked_with: object = None
    accepted: bool = False
    owing: bool = False
    shown: tuple[str, str] | None = None
    converged: Converged | None = None
    judged: Judged | None = None
