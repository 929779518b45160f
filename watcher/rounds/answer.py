# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `wait` answers: a pure function of what is known of a service, and of what lies at the path now.

An answer is about the content that the file has at this moment. What became of a file by this name before does not
count: a good image that was overwritten by a bad one is no success. Kinds of answers, and the exit status of each, are
the table `Kind`; confext-watcher(1) has the same rows.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from watcher.images import tries
from watcher.model import Busy, Event, Incomplete, KeptOut, Layer, Outcome, Refused, Verdict, shown
from watcher.records.schema import ExitStatus
from watcher.records.state import Quarantine
from watcher.rounds import decide, messages
from watcher.rounds.facts import Facts

_ON_IT, _NOT_BY_ITSELF, _IN_PROGRESS = ExitStatus.DONE, ExitStatus.FAILED, ExitStatus.TIMED_OUT


class Kind(enum.Enum):
    """What an answer says: the word for it, and the exit status.

    0: the service runs on it, or would at its next start where it does not run.

        applied           the service runs on it, and took it well
        unchanged         the service runs on this content, which it had under another name
        accepted          the service does not run; its next start gets it

    1: it will not come by itself. Mostly a command helps.

        failed            the service did not take it well, and stays on it
        needs-restart     accepted; it runs where nothing can be mounted, or without a main process
        needs-start       its check cannot be run before the service runs
        refused           it can be used for no service, or not for this one
        kept-out          it proved bad before, or was refused by the check
        kept-out-for-now  the same; its next try is at the next start of the service
        pinned            the service was put on another stack by hand
        older             a newer version is accepted
        superseded        a newer version has come since, and is on its way
        not-there         nothing lies there by that name
        elsewhere         the service looks into other directories
        misnamed          by its name it does not count there
        dangling          a link that leads nowhere
        stuck             all stays as it is until somebody mends something else

    4: in progress, and this far.

        looking           nothing is known yet
        uploading         it is there under a temporary name
        incomplete        it, or what lies beside it, is not whole; an upload that broke off may be resumed
        waiting           something is missing that comes by itself: its writer or a start ends, space, its turn
        checking          about to be checked, or being checked
        placing           accepted, or about to be, and not on the service yet
        reloading         on the service, which is asked to reload
        on-trial          on the service, and it is not known yet how it takes it
        undoing           being taken out again
    """

    APPLIED = "applied", _ON_IT
    UNCHANGED = "unchanged", _ON_IT
    ACCEPTED = "accepted", _ON_IT

    FAILED = "failed", _NOT_BY_ITSELF
    NEEDS_RESTART = "needs-restart", _NOT_BY_ITSELF
    NEEDS_START = "needs-start", _NOT_BY_ITSELF
    REFUSED = "refused", _NOT_BY_ITSELF
    KEPT_OUT = "kept-out", _NOT_BY_ITSELF
    KEPT_OUT_FOR_NOW = "kept-out-for-now", _NOT_BY_ITSELF
    PINNED = "pinned", _NOT_BY_ITSELF
    OLDER = "older", _NOT_BY_ITSELF
    SUPERSEDED = "superseded", _NOT_BY_ITSELF
    NOT_THERE = "not-there", _NOT_BY_ITSELF
    ELSEWHERE = "elsewhere", _NOT_BY_ITSELF
    MISNAMED = "misnamed", _NOT_BY_ITSELF
    DANGLING = "dangling", _NOT_BY_ITSELF
    STUCK = "stuck", _NOT_BY_ITSELF

    LOOKING = "looking", _IN_PROGRESS
    UPLOADING = "uploading", _IN_PROGRESS
    INCOMPLETE = "incomplete", _IN_PROGRESS
    WAITING = "waiting", _IN_PROGRESS
    CHECKING = "checking", _IN_PROGRESS
    PLACING = "placing", _IN_PROGRESS
    RELOADING = "reloading", _IN_PROGRESS
    ON_TRIAL = "on-trial", _IN_PROGRESS
    UNDOING = "undoing", _IN_PROGRESS

    @property
    def word(self) -> str:
        return self.value[0]

    @property
    def status(self) -> ExitStatus:
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is so now.

    Attributes:
        event: the outcome that it is the end of, or one of this moment that says no more than the answer.
        command: what helps, "" where no command does.
        more: what there is to say beside that.
        words: what there is to say of the image, without its path.
    """

    kind: Kind
    event: Event
    command: str = ""
    more: str = ""
    words: str = ""

    @property
    def text(self) -> str:
        """A sentence for people."""
        return f"{self.event.message}; {self.more}" if self.more else self.event.message

    @property
    def final(self) -> bool:
        return self.kind.status is not _IN_PROGRESS


@dataclass(frozen=True, slots=True)
class Dropped:
    """What lies at a path now, as a look has found it (`rounds/dropped.py`).

    Attributes:
        path: of the candidate; of what is none, as it was asked for.
        digest: of its content, "" where it was not read.
        passed: why it was passed over, None if it was not.
        chosen: what its entry has in the wanted stack.
        problem: why it is no candidate, as a kind and in words; None if it is one.
    """

    path: str
    digest: str = ""
    passed: Refused | Busy | None = None
    chosen: Layer | None = None
    problem: tuple[Kind, str] | None = None


def answer(service: str, f: Facts, d: Dropped, history: Sequence[Event] = ()) -> Answer:
    """The answer for one image of a service.

    Args:
        f: with `shown` as the mount table of its main process has it.
        history: its outcomes, newest first.
    """
    say = _Sayer(service, f, d, history)
    if d.problem is not None:
        return say(*d.problem)
    by_hand = isinstance(d.passed, KeptOut) and f.pinned is not None and d.digest in f.pinned.digests
    if d.passed is not None and not by_hand:
        return _passed(say, d.passed)
    if d.digest in f.accepted.digests:
        return _accepted(say)
    if d.digest and f.pinned is not None:
        return say(Kind.PINNED, "the service was put on another stack by hand, and stays on it", say.let_in)
    if d.digest not in f.wanted.digests or f.wanted.id in f.damaged:
        return _not_wanted(say)
    if f.nothing_new:
        return say(Kind.STUCK, f"no service gets anything new: {f.nothing_new}")
    if f.starting or f.waits:
        return say(Kind.WAITING, f.stays)
    if f.stays:
        return say(Kind.NEEDS_START, f.stays, say.systemctl("restart" if f.running else "start"))
    match decide.decide(f):
        case decide.LetIn() | decide.Count() | decide.Check():
            return say(Kind.CHECKING, "new, and is checked")
        case decide.Reject() | decide.Revive() | decide.Undone():
            return say(Kind.UNDOING, "the service goes back on what it had before it")
        case _:
            return say(Kind.PLACING, "new, and is put in place")


class _Sayer:
    """Makes an answer in words: the outcome that is in the history, where there is one, or else of this moment."""

    def __init__(self, service: str, f: Facts, d: Dropped, history: Sequence[Event]) -> None:
        self.service, self.f, self.d, self.history = service, f, d, history
        self.let_in = f"confext-watcher rollback --forget {shown(service)}"
        self.back = f"confext-watcher rollback {shown(service)}"
        self.plan = f"confext-watcher plan {shown(service)}"

    def __call__(
        self,
        kind: Kind,
        words: str,
        command: str = "",
        known: Iterable[Event] = (),
        *,
        outcome: Outcome | None = None,
    ) -> Answer:
        sentence = f"{shown(self.d.path)}: {words}"
        fields = {"stack": self.f.accepted.id, "source": self.d.path}
        new = messages.event(self.service, outcome or Outcome.UNCHANGED, sentence, **fields)
        return Answer(kind, next(iter(known), new), command, words=words)

    def systemctl(self, verb: str) -> str:
        """The command that starts it again; a service without systemd is started in its own way."""
        return (
            f"systemctl {verb} {shown(self.service)}" if self.f.explained and "@." not in self.service else ""
        )

    def about(self, *outcomes: Outcome) -> list[Event]:
        """Outcomes of files by this path."""
        path = tries.plain(self.d.path)
        return [
            one
            for one in self.history
            if one.outcome in outcomes
            and path
            in (tries.plain(source) for source in (one.source, *(each.source for each in one.layers)))
        ]


def _passed(say: _Sayer, why: Refused | Busy) -> Answer:
    """For a candidate that was passed over."""
    f, digest = say.f, say.d.digest
    if isinstance(why, KeptOut):
        entry = next((one for one in f.state.quarantine if one.digest == digest), None)
        return _kept_out(say, why, entry)
    if isinstance(why, Incomplete):
        known = (one for one in say.about(Outcome.INCOMPLETE) if one.reason == str(why))
        return say(Kind.INCOMPLETE, str(why), known=known)
    if isinstance(why, Refused):
        known = (one for one in say.about(Outcome.REFUSED) if one.reason == str(why))
        return say(Kind.REFUSED, f"refused: {why}", known=known, outcome=Outcome.REFUSED)
    return say(Kind.WAITING, f"has to wait, it is tried again by itself: {why}")


def _kept_out(say: _Sayer, why: KeptOut, entry: Quarantine | None) -> Answer:
    f, digest = say.f, say.d.digest
    if f.undoing or digest in f.accepted.digests:
        return say(Kind.UNDOING, f"the service goes back on what it had before it; {why}")
    if isinstance(decide.decide(f), decide.LetIn) or digest in f.retry:
        return say(Kind.CHECKING, "is tried again")
    bad = (one for one in say.about(Outcome.REFUSED, Outcome.ROLLED_BACK) if one.digest == digest)
    if entry is not None and entry.for_now:
        command = say.systemctl("restart") or say.let_in
        found = say(Kind.KEPT_OUT_FOR_NOW, str(why), command, bad, outcome=Outcome.REFUSED)
        return replace(found, more="it is tried again at the next start of the service")
    return say(Kind.KEPT_OUT, str(why), say.let_in if entry else "", bad, outcome=Outcome.REFUSED)


def _not_wanted(say: _Sayer) -> Answer:
    """For a candidate that could be used, and is not."""
    f, chosen = say.f, say.d.chosen
    if chosen is None or chosen.source == say.d.path or f.wanted.id in f.damaged:
        return say(Kind.STUCK, "not used, all stays as it is: the log says why", say.plan)
    if chosen.digest in f.accepted.digests:
        return say(Kind.OLDER, f"{chosen.label} is newer, and counts: remove it, or use a higher version")
    name = shown(os.path.basename(chosen.source))
    command = f"confext-watcher wait {shown(say.service)} {name}"
    return say(Kind.SUPERSEDED, f"{chosen.label} is newer, and comes instead of it", command)


def _accepted(say: _Sayer) -> Answer:
    """For content that the next start of the service gets: is it on the service, and has it proved good?"""
    f = say.f
    if f.undoing or f.kept_by_hand or f.blame:
        return say(Kind.UNDOING, "the service goes back on what it had before, or is put on it again")
    if f.starting:
        return say(Kind.ON_TRIAL, "the service is being started on it")
    if f.headless or f.out_of_reach:
        why = (
            f"the main process {f.out_of_reach}" if f.out_of_reach else "systemd knows no main process of it"
        )
        words = f"accepted, its next start gets it; {why}: restart it once"
        return say(Kind.NEEDS_RESTART, words, say.systemctl("restart"), outcome=Outcome.NEEDS_RESTART)
    if f.reachable and f.shown != f.accepted.id:
        last = (one for one in say.history[:1] if one.outcome is Outcome.FAILED and not one.stack)
        return say(Kind.PLACING, "accepted, and is put in place", known=last)
    if f.is_owed:
        return say(Kind.RELOADING, "in place, and the service is asked to reload")
    if f.reachable and f.on_trial and f.pinned is None:
        return say(Kind.ON_TRIAL, "on trial: whether the service takes it well is not known yet")
    if f.state.replaced is not None:
        return say(Kind.PLACING, "accepted, and its outcome is being written down")
    return _settled(say)


def _settled(say: _Sayer) -> Answer:
    """For content on which nothing is left to do."""
    f = say.f
    if not f.reachable:
        words = f"accepted; {messages.gets_it(say.service, f)}"
        return say(Kind.ACCEPTED, words, outcome=Outcome.APPLIED)
    here = [one for one in say.history if one.stack == f.accepted.id]
    last = next((one for one in here if one.outcome in (Outcome.APPLIED, Outcome.FAILED)), None)
    if last is not None and last.outcome is Outcome.FAILED:
        return say(Kind.FAILED, last.reason, say.back, (last,))
    unchanged = [one for one in say.about(*Outcome) if one in here][:1]
    if unchanged and unchanged[0].outcome is Outcome.UNCHANGED:
        return say(Kind.UNCHANGED, "", known=unchanged)
    if tries.plain(say.d.path) not in {tries.plain(one.source) for one in f.accepted.layers}:
        return say(Kind.UNCHANGED, "the service runs on this content already")
    good = (one for one in (last,) if one is not None and one.verdict is Verdict.GOOD)
    return say(Kind.APPLIED, "applied already, the service runs on it", known=good, outcome=Outcome.APPLIED)
