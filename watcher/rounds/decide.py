# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to do next for a service: a pure function of what is known of it. No other place decides.

A round looks (`observe.py`), decides, takes one step, and looks again, until there is nothing left to do. If the
watcher is killed at any moment, the next round looks at what is there, and goes on from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from watcher.model import Stack, Verdict
from watcher.rounds.facts import Facts, Judged
from watcher.text import reason_in


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to do now.

    Attributes:
        why: what it waits for, "" if for nothing.
    """

    why: str = ""


@dataclass(frozen=True, slots=True)
class LetIn:
    """What is kept out for the moment may be tried again; not if the service is started because it went down.

    Attributes:
        digests: what else may be, though it is not kept out for the moment alone.
    """

    anything: bool
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Count:
    """Count one try of the new files that have counters."""


@dataclass(frozen=True, slots=True)
class Check:
    """Have the service's own check look at a stack, where the service cannot see it."""

    stack: Stack


@dataclass(frozen=True, slots=True)
class TryStart:
    """Find out whether the accepted stack keeps systemd from starting the service, where the one before does not."""


@dataclass(frozen=True, slots=True)
class Accept:
    """From now on every start of the service gets this stack.

    Attributes:
        new: it has to prove itself.
    """

    stack: Stack
    new: bool = False


@dataclass(frozen=True, slots=True)
class SayAccepted:
    """Record that the service does not run on the accepted stack yet, but its next start will."""


@dataclass(frozen=True, slots=True)
class NeedsRestart:
    """Record that it needs a restart to get the accepted stack."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Bring the accepted stack to each namespace of the service that does not show it, or shows a damaged copy."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Have the service reload, and judge how it takes the accepted stack."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Judge how the service takes the accepted stack, which it was started on."""


@dataclass(frozen=True, slots=True)
class Good:
    """Record that the accepted stack proved good."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Record that the accepted stack proved bad, and stays."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Keep out what is new in a stack.

    Attributes:
        why: one line.
        output: what the command printed that failed.
        logged: what the service itself has logged as errors.
        begun: see `Judged`.
    """

    stack: Stack
    verdict: Verdict
    why: str
    output: str = ""
    logged: str = ""
    begun: int = field(default=0, compare=False)

    @property
    def reason(self) -> str:
        """`why`, with what the output says of it. What is said of a check has that already."""
        is_check = self.verdict in (Verdict.CHECK_FAILED, Verdict.HEALTH_CHECK_FAILED)
        return self.why if is_check else self.why + reason_in(self.output)


@dataclass(frozen=True, slots=True)
class Revive:
    """Start the service again: a stack that was taken out took it down."""


@dataclass(frozen=True, slots=True)
class Undone:
    """Record that the stack is back that the service had before a bad one."""


Step = (
    Done
    | LetIn
    | Count
    | Check
    | TryStart
    | Accept
    | SayAccepted
    | NeedsRestart
    | Swap
    | Reload
    | Watch
    | Good
    | Keep
    | Reject
    | Revive
    | Undone
)

UNSETTLED = (LetIn, Count, Check, Accept, Reject)
"""Steps after which the service may have another accepted stack."""


def decide(f: Facts) -> Step:
    """The next step of a round."""
    state, target = f.state, f.target
    if f.judged is not None:
        return _conclude(f, f.judged)
    if f.held and f.started_anew:
        return LetIn(anything=f.first or not state.fell or f.innocent)
    if f.retry:
        return LetIn(anything=False, digests=f.retry)
    if f.doubtful and f.unstartable is None:
        return TryStart()
    if f.blame:
        return Reject(f.accepted, Verdict.WENT_DOWN, f.blame)
    if f.stays and not state.accepted.when and state.undoing is None:
        # An instance that shows the stack of its template has none of its own to stay on.
        return Done(f.stays)
    if f.uncounted:
        return Count()
    if f.new and f.has_check and f.can_check and state.checked != f.check:
        return Check(target)
    if not f.recorded:
        return Accept(target, new=f.new)
    if not f.reachable:
        return _unreachable(f)
    if (f.shown != f.accepted.id or f.worn) and not f.has_nothing_whole:
        return Swap()
    if f.is_owed:
        return Reload()
    if f.undoing:
        return Undone()
    if f.kept_by_hand:
        return Keep()
    if f.on_trial and f.pinned is None:
        return Watch()
    return SayAccepted() if state.replaced is not None else Done(f.stays)


def _conclude(f: Facts, judged: Judged) -> Step:
    """The verdict of this round is on the accepted stack, or on one that was checked before it was accepted."""
    if judged.stack.id != f.accepted.id:
        return _rejected(judged)
    if f.undoing:
        return _unreachable(f) if _ended_before_it_was_back(f, judged) else Undone()
    if judged.good:
        return Good()
    if f.on_trial and f.rollback and f.pinned is None:
        return _rejected(judged)
    return Keep()


def _ended_before_it_was_back(f: Facts, judged: Judged) -> bool:
    """Whether the service that was to have the stack before is down, and no start that was asked for it has failed.

    It was swapped in beneath a process that had read the bad one, or that could not take another reload.
    """
    is_down = not f.running and (f.failed or f.starting)
    return is_down and not judged.good and f.explained and judged.told not in ("start", "restart")


def _rejected(judged: Judged) -> Reject:
    return Reject(judged.stack, judged.verdict, judged.reason, judged.output, judged.logged, judged.begun)


def _unreachable(f: Facts) -> Step:
    """The service does not run, or where no stack can be put in place: its next start gets the accepted one."""
    if f.undoing:
        if f.starting and not f.running:
            # It may have got the bad one still, and that may be its last try (StartLimitBurst=).
            return Done("its manager is starting it: whether it is up on the stack before is known then")
        # What took it down, or kept it from being started, may be what its manager puts that down to.
        excused = f.excused and f.state.undoing and f.state.undoing.verdict is not Verdict.WENT_DOWN
        down = f.failed and not f.running and not excused
        return Revive() if down else Undone()
    if f.kept_by_hand:
        return Keep()
    if f.running and f.accepted.layers:
        return NeedsRestart()
    if f.state.replaced is not None:
        return SayAccepted()
    return Done(f.stays)
