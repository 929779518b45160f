# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of each file that lies there for a service, and what helps where it is not used. Pure.

`status` says it of all, and `wait` of one: both ask `answer.py`. Of what the last look has passed over `status` tells
without another look, which may take long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from watcher.managers.base import Service
from watcher.model import Candidate, Event, Incomplete, KeptOut, Refused, Sysext, shown
from watcher.records.schema import CandidateStatus, EntryStatus
from watcher.records.state import BEFORE_START, INNOCENT, Quarantine, State
from watcher.rounds.answer import Kind, answer
from watcher.rounds.choose import Passed
from watcher.rounds.desired import Desired
from watcher.rounds.dropped import of_candidate
from watcher.rounds.facts import Facts

_KEPT_OUT = (Kind.KEPT_OUT, Kind.KEPT_OUT_FOR_NOW)


def newer(service: Service, state: State, passed: Iterable[Passed]) -> tuple[CandidateStatus, ...]:
    """What a look has passed over.

    Args:
        state: what is decided about the service.
    """
    return tuple(_passed(service, state, one) for one in passed if not isinstance(one.reason, Sysext))


def entries(
    service: Service, facts: Facts, desired: Desired, history: Sequence[Event]
) -> tuple[EntryStatus, ...]:
    """All that lies there, by a look with `Given.thorough`, topmost entry first.

    Args:
        facts: with `shown` as the mount table of the main process has it.
        history: outcomes of the service, newest first.
    """
    sysexts = {entry.slot for entry in desired.sysexts}
    found = []
    for pick in reversed(desired.look.picks):
        entry, told = pick.entry, []
        for candidate in pick.candidates:
            if entry.slot in sysexts:
                told.append(_status(candidate, "", Kind.ACCEPTED, "a system extension, which systemd mounts"))
                continue
            dropped = of_candidate(pick, candidate, desired)
            known = answer(service.name, facts, dropped, history)
            reason, kept = known.words, _kept(facts.state, dropped.digest)
            if known.kind in _KEPT_OUT:
                reason = _why(facts.state, dropped.digest, reason)
            elif known.kind is Kind.REFUSED:
                reason = str(dropped.passed)
            elif known.kind is Kind.OLDER and dropped.chosen is not None:
                reason = f"{dropped.chosen.label} is newer"
            elif known.final and known.kind.status == 0:
                reason = ""
            ends = until(kept) if kept is not None and known.kind in _KEPT_OUT else ""
            told.append(_status(candidate, dropped.digest, known.kind, reason, ends, known.command))
        found.append(EntryStatus(entry.slot, entry.path, entry.kind.value, entry.declared, tuple(told)))
    return tuple(found)


def _passed(service: Service, state: State, one: Passed) -> CandidateStatus:
    why, candidate = one.reason, one.candidate
    if not isinstance(why, KeptOut):
        kind = (
            Kind.INCOMPLETE
            if isinstance(why, Incomplete)
            else Kind.REFUSED
            if isinstance(why, Refused)
            else Kind.WAITING
        )
        return _status(candidate, "", kind, str(why))
    kept = _kept(state, why.digest)
    reason = _why(state, why.digest, str(why))
    if kept is None:  # it is kept out of another service, which the reason names
        return _status(candidate, why.digest, Kind.KEPT_OUT, reason)
    command = f"confext-watcher rollback --forget {shown(service.name)}"
    if not kept.for_now:
        return _status(candidate, why.digest, Kind.KEPT_OUT, reason, until(kept), command)
    if service.manager == "systemd" and "@." not in service.name:
        command = f"systemctl restart {shown(service.name)}"
    return _status(candidate, why.digest, Kind.KEPT_OUT_FOR_NOW, reason, until(kept), command)


def _status(
    candidate: Candidate, digest: str, kind: Kind, reason: str, ends: str = "", command: str = ""
) -> CandidateStatus:
    return CandidateStatus(
        candidate.path,
        candidate.version,
        digest,
        kind.word,
        reason.removeprefix("incomplete: "),
        ends,
        command,
        candidate.tries_left,
        candidate.tries_done,
    )


def _kept(state: State, digest: str) -> Quarantine | None:
    return next((one for one in state.quarantine if one.digest == digest), None)


def _why(state: State, digest: str, words: str) -> str:
    return state.kept_out.get(digest) or words.removeprefix("kept out: ")


def until(entry: Quarantine) -> str:
    """Until when a content is kept out."""
    if entry.judge == INNOCENT:
        return "the next start of the service, or a change of the file"
    if entry.for_now:
        return "the next start of the service"
    if entry.judge.endswith(BEFORE_START):
        return "the service runs"
    if entry.judge.startswith("Check "):
        return "a change of the file, of Check= or of the host's /etc"
    if entry.judge:
        return "a change of HealthCheck="
    return "it is let in by hand"
