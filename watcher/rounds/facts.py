# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that a round decides on, read by one function (`observe.py`): plain data, which a bug report can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from watcher.images import tries
from watcher.images.rebuild import entry_of
from watcher.model import Entry, Stack, Verdict
from watcher.records.state import BEFORE_START, INNOCENT, State

AFTERGLOW_USEC = 1_000_000
"""If the main process ends so soon after a good verdict, the stack is to blame. No round waits for that."""


@dataclass(frozen=True, slots=True)
class Judged:
    """How a service took a stack.

    Attributes:
        told: what the service was told, for the log: "reload", "SIGHUP", "restart", "" if nothing.
        reason: why it is bad; or why nothing was told although there is a way; one line, else "".
        output: what the command printed that failed, at most 64 KiB.
        usec: how long the reload took, microseconds.
        logged: what the service itself has logged as errors meanwhile, at most 4 KiB.
        begun: when its check began that it was refused by, microseconds since the epoch.
    """

    stack: Stack
    verdict: Verdict
    told: str = ""
    reason: str = ""
    output: str = ""
    usec: int = field(default=0, compare=False)
    logged: str = ""
    begun: int = field(default=0, compare=False)

    @property
    def good(self) -> bool:
        return self.verdict is Verdict.GOOD

    @property
    def said(self) -> str:
        """What was printed and logged."""
        return both(self.output, self.logged)


def both(printed: str, logged: str) -> str:
    """Two texts one after the other, each from a line of its own on."""
    return "\n".join((printed.rstrip("\n"), logged)) if printed and logged else printed or logged


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a service at one moment of a round.

    Attributes:
        now: when the round began, microseconds since the epoch.
        state: what was decided before.
        first: this watcher has not looked at it before.

        running: it has a main process.
        starting, failed, failed_start, restarts, headless, invocation: see `Service`.
        excused: `Service.blameless`.
        template: it is not started itself, its instances are.
        explained: its manager knows why it ended. (The kernel tells only its parent: not so of a standalone service.)
        out_of_reach: why its main process must not be touched: it is in the host's mount namespace; "" if it may be.
        blameless: it went down, and a copy that it ran on was damaged.

        has_check, rollback, rolling: what its `Check=`, `Rollback=` and `Rollout=` say.

        wanted: the best stack that was dropped and admitted, and is not in quarantine.
        fallback: the newest accepted stack that is whole and not in quarantine; the empty one if there is none.
        pinned: the stack that an operator has put it on by hand.
        damaged: identities of those of them, and of the accepted one, that have a damaged copy.
        worn: what it shows was made of a damaged copy, and there is a new one.
        again: digests of what is kept out, and may be tried again (`retry.py`).
        entries: what lies there, with a layer or without.
        mounted: where the file systems of the files are mounted that they came from, by path (`unmounted.noted()`).
        busy: a file is still being written that may change the answer.
        waits: why it is not its turn, "" if it is.
        nothing_new: why no service gets anything new, "" if they do.
        no_shadow: why its `Check=` cannot be run while it is not `reachable`, "" if it can.
        unstartable: why its manager cannot start it on the accepted stack, where it could on the one before; "" if that
            makes no difference; None: not tried in this round.

        shown: identity of the stack that its namespaces were brought to in this round; None: not yet.
        judged: the verdict of this round, which is not written down yet.
    """

    now: int
    state: State
    first: bool = False

    running: bool
    starting: bool = False
    failed: bool = False
    failed_start: str = ""
    restarts: int = 0
    excused: str = ""
    headless: bool = False
    template: bool = False
    invocation: str = ""
    explained: bool = True
    out_of_reach: str = ""
    blameless: bool = False

    has_check: bool = False
    rollback: bool = True
    rolling: bool = False

    wanted: Stack
    fallback: Stack
    pinned: Stack | None = None
    damaged: tuple[str, ...] = ()
    worn: bool = False
    again: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    mounted: Mapping[str, str] = field(default_factory=dict)
    busy: bool = False
    waits: str = ""
    nothing_new: str = ""
    no_shadow: str = ""
    unstartable: str | None = None

    shown: str | None = None
    judged: Judged | None = None

    @property
    def accepted(self) -> Stack:
        """What its next start gets."""
        return self.state.accepted.stack

    @property
    def reachable(self) -> bool:
        """Whether it runs where a stack can be put in place."""
        return self.running and not self.out_of_reach

    @cached_property
    def can_check(self) -> bool:
        """Whether its `Check=` can be run against a stack that it does not have."""
        return self.reachable or not self.no_shadow

    @cached_property
    def proved_bad(self) -> bool:
        """Whether the accepted stack has to be taken out again, and another is there."""
        bad = self.pinned is None and bool(self.state.why_bad(self.accepted))
        return bad and self.fallback.id != self.accepted.id

    @cached_property
    def undoing(self) -> bool:
        """Whether a bad stack is being taken out again: not if an operator has let it in again meanwhile."""
        undoing, accepted = self.state.undoing, self.accepted
        if undoing is None or undoing.stack.id != accepted.id:
            return undoing is not None
        return bool(self.state.why_bad(accepted)) if self.pinned is None else self.pinned.id != accepted.id

    @property
    def kept_by_hand(self) -> bool:
        """Whether an operator has put it on the bad stack that was being taken out: there is an outcome to come."""
        undoing = self.state.undoing
        return undoing is not None and self.pinned is not None and undoing.stack.id == self.accepted.id

    @cached_property
    def on_trial(self) -> bool:
        """Whether the accepted stack was not judged yet; or only after a reload, and this is its first start."""
        trial = self.state.trial
        new = trial is not None and trial.stack == self.accepted.id and trial.verdict is None
        return new or self.first_start

    @property
    def first_start(self) -> bool:
        """Whether it was started on the accepted stack for the first time, which only a reload has seen before.

        A service that keeps its old configuration says nothing at a reload, and then it cannot be started.
        """
        reloaded = self.state.untried.get(self.accepted.id)
        return reloaded is not None and (self.invocation or self.failed_start) not in ("", reloaded)

    @property
    def start_on_trial(self) -> str | None:
        """The last start that is not on trial, where the stack before comes back if another fails; else None."""
        if not self.rollback or self.pinned is not None or self.state.why_bad(self.accepted):
            return None
        trial = self.state.trial
        if trial is None or trial.stack != self.accepted.id or trial.verdict is not None:
            return None
        return self.failed_start or trial.other

    @property
    def is_owed(self) -> bool:
        """Whether this start of the service has still to be told of the accepted stack. A later one has read it."""
        return self.running and self.state.owed == self.invocation

    @property
    def was_told(self) -> bool:
        """Whether the verdict of this round is on a reload. After `Reload=restart` this is another start already."""
        return self.is_owed or (self.judged is not None and bool(self.judged.told))

    @cached_property
    def offered(self) -> bool:
        """Whether there is a stack that it never had, and that has to prove itself."""
        if self.pinned is not None or self.proved_bad or self.undoing:
            return False
        return self.wanted.id != self.accepted.id and self.wanted.id not in self.damaged

    @property
    def has_nothing_whole(self) -> bool:
        """Whether it runs on a damaged copy, and no other accepted stack has a layer: it keeps what it shows."""
        damaged = self.accepted.id in self.damaged
        return self.running and damaged and bool(self.accepted.layers) and not self.fallback.layers

    @property
    def bids(self) -> bool:
        """Whether it has to ask for its turn (`Rollout=rolling`)."""
        return self.rolling and self.offered and not self.stays

    @cached_property
    def stays(self) -> str:
        """Why it stays for now on what it has, though another stack is offered; "" if it does not."""
        if not self.offered:
            return ""
        if self.starting:
            return (
                "it is being started, and all processes of one start see one /etc: it is tried once it runs"
            )
        if self.has_check and not self.can_check and self.accepted.layers and not self.template:
            where = "in a mount namespace of its own" if self.running else ""
            return (
                f"it is not running{where and ' ' + where}, and Check= needs that ({self.no_shadow}): it is tried"
                " once it runs"
            )
        return self.nothing_new or self.waits

    @cached_property
    def target(self) -> Stack:
        """The stack that it should be on now."""
        if self.proved_bad or self.stays or (self.undoing and self.pinned is None):
            return self.fallback
        chosen = self.wanted if self.pinned is None else self.pinned
        if chosen.id not in self.damaged:
            return chosen
        return self.accepted if self.has_nothing_whole else self.fallback

    @property
    def new(self) -> bool:
        """Whether `target` has to prove itself."""
        return self.offered and not self.stays

    @cached_property
    def listed(self) -> tuple[Entry, ...]:
        """The entries to be recorded with `target`: a start looks for these slots alone.

        A stack that stays or comes back may have layers whose entries do not lie there any more.
        """
        known = {entry.slot: entry for entry in self.state.accepted.entries}
        entries = list(self.entries)
        place = 0
        for layer in self.target.layers:
            slots = [entry.slot for entry in entries]
            if layer.slot in slots:
                place = slots.index(layer.slot) + 1
            else:
                entries.insert(place, known.get(layer.slot) or entry_of(layer))
                place += 1
        return tuple(entries)

    @cached_property
    def recorded(self) -> bool:
        """Whether the record says of `target` all that it should: that it is accepted, names, entries, places."""
        record, sources = self.state.accepted, [layer.source for layer in self.target.layers]
        mounted = {source: self.mounted[source] for source in sources if source in self.mounted}
        return (record.stack, record.entries, record.mounted) == (self.target, self.listed, mounted)

    @cached_property
    def uncounted(self) -> bool:
        """Whether a new file has counters, and this try was not counted yet (systemd.v(7))."""
        return self.new and bool(tries.uncounted(self.target, self.accepted, self.state.counted))

    @property
    def check(self) -> str:
        """What `State.checked` says if `target` has passed the check: for another start, it is checked again."""
        return f"{self.invocation} {self.target.id}"

    @property
    def held(self) -> bool:
        """Whether something is kept out for the moment."""
        return any(one.for_now for one in self.state.quarantine)

    @cached_property
    def retry(self) -> tuple[str, ...]:
        """Digests of what may be tried again now: once in a round, however often something changes.

        What a check refused before a start may do now that the service runs, with all that it needs beside.
        """
        judged = [one for one in self.state.quarantine if one.since < self.now]
        runs = self.reachable and self.state.undoing is None
        return tuple(
            one.digest
            for one in judged
            if one.digest in self.again or (runs and one.judge.endswith(BEFORE_START))
        )

    @cached_property
    def innocent(self) -> bool:
        """Whether all that is kept out for the moment is not to blame, and systemd does not start the service again
        by itself just now."""
        held = [one for one in self.state.quarantine if one.for_now]
        return self.restarts == 0 and all(one.judge == INNOCENT for one in held)

    @cached_property
    def started_anew(self) -> bool:
        """Whether it was started since something was kept out for the moment, or this watcher was."""
        if self.undoing:
            return False
        if self.first:
            return True
        return bool(self.invocation) and self.invocation != self.state.held_for

    @cached_property
    def blame(self) -> str:
        """Why its last stack is to blame for its end, "" if it is not."""
        if not self.excused:
            return self.suspicion
        return self.unstartable or "" if self.doubtful else ""

    @cached_property
    def doubtful(self) -> bool:
        """Whether its manager puts its end down to something else, but no start on the accepted stack was ever seen.

        An image may keep systemd itself from starting the service, which no other image does.
        """
        is_down = self.failed and not self.running and not self.starting
        is_first = self.on_trial and bool(self.accepted.layers)
        return is_down and is_first and bool(self.excused and self.suspicion)

    @cached_property
    def suspicion(self) -> str:
        """Why its last stack would be to blame, if its manager did not know better (`excused`)."""
        if (
            not self.rollback
            or self.blameless
            or self.pinned is not None
            or self.state.why_bad(self.accepted)
        ):
            return ""
        is_down = self.failed and not self.running and not self.starting
        # While a bad stack is taken out, what fails may be a start that its manager has begun on that one.
        if is_down and self.explained and self.first_start and not self.undoing:
            return "the service failed at its first start on it"
        trial = self.state.trial
        if trial is None or trial.stack != self.accepted.id:
            return ""
        if trial.verdict is Verdict.GOOD:
            down = self.failed or self.restarts not in (0, trial.restarts)
            soon = 0 <= self.now - trial.judged < AFTERGLOW_USEC
            return "its main process ended soon after the reload" if down and soon else ""
        is_another = self.failed_start != "" and self.failed_start == trial.other
        if is_down and self.explained and self.on_trial and not trial.was_down and not is_another:
            return "the service failed on it before it had proved good"
        return ""
