# SPDX-License-Identifier: LGPL-2.1-or-later
"""What rounds keep in memory. Nothing of it has to outlive the watcher: what does is in `records/state.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from watcher.model import Interest, Stack
from watcher.mounts.converge import Compared, Converged
from watcher.records.state import State
from watcher.rounds import looks
from watcher.rounds.choose import Passed
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Facts, Judged
from watcher.rounds.judge import Asked


@dataclass(slots=True)
class Memory:
    """What was seen of one service in the rounds before, so that it is not looked at again. A lost one is made anew.

    Attributes:
        interests: what is watched for it.
        attempts: rounds in a row that left something to wait for.
        look_again: seconds after which the last look is out of date; None: no clock has to do with it.
        mounted: digests of what it runs on, None while that is not known.
        at_hand: digests of what the last look found and did not refuse. What has to wait is not copied again.
        compared: see `converge()`.
        started: the start of the service that a round has seen, and when its main process had begun
            (`integrity.now()`).
        placed: when it last got a stack of whole copies, likewise.
        clings: digests of which a process of it may show a damaged copy for as long as it runs.
        ran: when a round last saw it running, `time.monotonic()`.
        blameless: of a service that went down, whether a copy was found damaged since it ran; None: not looked at.
        seen: a round has looked at it.
        unlearned: its manager has to be told of the accepted stack.
        swaps: how often it got a stack.
        base_changed: the host's own `/etc` has changed, and it is to be told (`BaseChanged=reload`).
        no_shadow: why what its next start would see could not be made for its check when that was tried last.
        passed: what the last look has passed over.
        step: what its round is at that takes time, by its name in `ServiceStatus`; "" if nothing.
        step_since: when that began, microseconds since the epoch.
    """

    interests: tuple[Interest, ...] | None = None
    attempts: int = 0
    look_again: float | None = None
    mounted: frozenset[str] | None = None
    at_hand: frozenset[str] = frozenset()
    compared: Compared = field(default_factory=dict)
    started: tuple[str, float] = ("", 0.0)
    placed: float = 0.0
    clings: frozenset[str] = frozenset()
    ran: float = 0.0
    blameless: bool | None = None
    seen: bool = False
    unlearned: bool = False
    swaps: int = 0
    base_changed: bool = False
    no_shadow: str = ""
    passed: tuple[Passed, ...] = ()
    step: str = ""
    step_since: int = 0


@dataclass(slots=True)
class Round:
    """What one round has found and done so far. It belongs to the thread of a job, or to the event loop, in turn.

    Attributes:
        since: when the change was noticed that it is for, `time.monotonic()`.
        begun: microseconds since the epoch. What was before is judged by that, however long a look takes.
        first: nothing was done yet, in the first round of this watcher.
        state: as it was read or written last.
        facts: what was known when the last step was decided on.
        desired: the last look; None: look again.
        looks_from: a look that began after this, `looks.now()`, is new enough: another service may have made it.
        looked_with: what that look depended on.
        before: what was accepted before.
        accepted: a new stack was accepted.
        owing: the note that a reload is owed was written with that, before it was known whether a swap is needed.
        shown: the start of the service, and the identity of the stack, that its namespaces were brought to.
        converged: what that found and did.
        judged: a verdict that is not written down yet.
        unsaid: nothing was said of that look yet.
        unwatched: what the last look has looked at, and nobody watches yet: it has to be looked at again after that.
        over: nobody waits for it any more; a thread may still be at it.
        waits: why it is not the service's turn (`Rollout=rolling`), "" if it is; None: nobody has asked since the last
            step.
        asked: the service was asked to reload, and is to be judged.
        recording: what has happened is just being written down.
        asks: what the images that came or went say that it is to be told, see `release.asks_for()`.
        base_changed: the service is told because the host's own `/etc` has changed.
        unstartable: see `Facts`.
        in_reach: its main process was seen to be in a namespace of its own, in this turn. A swap makes sure of it anew.
    """

    since: float
    begun: int
    first: bool = False
    state: State = field(default_factory=State)
    facts: Facts = field(
        default_factory=lambda: Facts(now=0, state=State(), running=False, wanted=Stack(), fallback=Stack())
    )
    desired: Desired | None = None
    looks_from: float = field(default_factory=looks.now)
    looked_with: object = None
    before: Stack | None = None
    accepted: bool = False
    owing: bool = False
    shown: tuple[str, str] | None = None
    converged: Converged | None = None
    judged: Judged | None = None
    unsaid: bool = False
    unwatched: tuple[Interest, ...] | None = None
    over: bool = False
    waits: str | None = None
    asked: Asked | None = None
    asks: str = ""
    recording: bool = False
    base_changed: bool = False
    unstartable: str | None = None
    in_reach: bool = False

    def look_anew(self) -> None:
        """What the last look has found is not so any more."""
        self.desired, self.looks_from = None, looks.now()
