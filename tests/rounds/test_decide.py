# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service gets next: one row for each decision. (`rounds/facts.py`, `rounds/decide.py`)"""

from __future__ import annotations

import typing
from typing import Any

import pytest

from support.facts import NOW, entries, facts, kept_out, layer, stack
from watcher.model import Entry, Kind, Stack, Verdict
from watcher.records.state import BEFORE_START, INNOCENT, STACK, Accepted, Quarantine, Trial, Undoing
from watcher.rounds.decide import (
    Accept,
    Check,
    Count,
    Done,
    Good,
    Keep,
    LetIn,
    NeedsRestart,
    Reject,
    Reload,
    Revive,
    SayAccepted,
    Step,
    Swap,
    TryStart,
    Undone,
    Watch,
    decide,
)
from watcher.rounds.facts import AFTERGLOW_USEC, Facts, Judged

OLD, NEW, OTHER, EMPTY = stack("web1"), stack("web2"), stack("web3"), Stack()
COUNTED = Stack((layer("web2", "+2"),))
TRIED = Stack((layer("web2", "+1-1"),))
DOWN: dict[str, Any] = {"running": False, "invocation": "", "shown": None}
FAILED = DOWN | {"failed": True}
STARTING = DOWN | {"starting": True}
HOST = {"out_of_reach": "is in the host's mount namespace", "shown": None}
TURN = "it waits for its turn"
NO_SHADOW = {"no_shadow": "its unit is masked"}
NEEDS_CHECK = "it is not running, and Check= needs that (its unit is masked): it is tried once it runs"
BEING_STARTED = "it is being started, and all processes of one start see one /etc: it is tried once it runs"
STARTED_ON_ITS_OWN = "its manager is starting it: whether it is up on the stack before is known then"
BEFORE_GOOD = Reject(NEW, Verdict.WENT_DOWN, "the service failed on it before it had proved good")
SOON = Reject(NEW, Verdict.WENT_DOWN, "its main process ended soon after the reload")


def trial(one: Stack, **changes: Any) -> dict[str, Any]:
    return {"trial": Trial(one.id, **changes)}


def glow(one: Stack, **changes: Any) -> dict[str, Any]:
    """It proved good a moment ago."""
    return trial(one, verdict=Verdict.GOOD, judged=NOW - AFTERGLOW_USEC + 1, **changes)


def bad(one: Stack, **changes: Any) -> dict[str, Any]:
    return {"quarantine": (kept_out(one, **changes),)}


def undoing(one: Stack, verdict: Verdict = Verdict.RELOAD_FAILED) -> dict[str, Any]:
    return {"undoing": Undoing(one, verdict, "reload failed")}


def judged(one: Stack, verdict: Verdict = Verdict.RELOAD_FAILED, **changes: Any) -> dict[str, Any]:
    return {"judged": Judged(one, verdict, reason="why", output="line", **changes)}


GOOD = Verdict.GOOD
NOT_NOW = bad(NEW, for_now=True) | {"held_for": "first"}
NOT_YET = bad(NEW, for_now=True, judge=INNOCENT) | {"held_for": "first"}
REMOVAL = Quarantine(STACK + EMPTY.id, "it is bad", 1)
REJECTED = Reject(NEW, Verdict.RELOAD_FAILED, "why", "line")
NEVER: dict[str, Any] = {"state": {"accepted": Accepted()}}
RENAMED = Stack((layer("web1", "+1"),))
MOUNTED = {OLD.layers[0].source: "/srv"}
EARLY = f"Check 1\n/bin/true{BEFORE_START}"
MORE = Entry("more.raw", "/srv/more.raw", Kind.IMAGE)
KEY = NEW.digests[0][:16]
SECOND = {"invocation": "second"}

UNTRIED = {"untried": {OLD.id: "zero", NEW.id: "first"}}
FIRST_START = Reject(NEW, Verdict.WENT_DOWN, "the service failed at its first start on it")

TABLE: dict[str, dict[str, tuple[Facts, Step]]] = {
    "offered": {
        "nothing": (facts(OLD), Done()),
        "nothing ever": (facts(EMPTY, **NEVER), Done()),
        "the first": (facts(EMPTY, wanted=NEW, **NEVER), Accept(NEW, new=True)),
        "a new one": (facts(OLD, wanted=NEW), Accept(NEW, new=True)),
        "to one that is stopped": (facts(OLD, wanted=NEW, **DOWN), Accept(NEW, new=True)),
        "to one in the host's namespace": (facts(OLD, wanted=NEW, **HOST), Accept(NEW, new=True)),
        "a removal": (facts(OLD, wanted=EMPTY), Accept(EMPTY, new=True)),
        "while a file is being written": (facts(OLD, busy=True), Done()),
    },
    "the first start on what only a reload has seen": {
        "not yet": (facts(NEW, fallback=OLD, state=UNTRIED), Done()),
        "is on trial": (facts(NEW, fallback=OLD, state=UNTRIED, **SECOND), Watch()),
        "goes well": (facts(NEW, state=UNTRIED, **SECOND, **judged(NEW, GOOD)), Good()),
        "goes ill": (facts(NEW, fallback=OLD, state=UNTRIED, **SECOND, **judged(NEW)), REJECTED),
        "fails": (facts(NEW, fallback=OLD, state=UNTRIED, failed_start="second", **FAILED), FIRST_START),
        "comes after the service has failed": (
            facts(NEW, fallback=OLD, state=UNTRIED, failed_start="first", **FAILED),
            Done(),
        ),
        "is not known": (facts(NEW, fallback=OLD, state=UNTRIED, **FAILED), Done()),
        "fails, and Rollback=no": (
            facts(NEW, fallback=OLD, state=UNTRIED, failed_start="second", rollback=False, **FAILED),
            Done(),
        ),
        "fails on a stack by hand": (
            facts(NEW, fallback=OLD, pinned=NEW, state=UNTRIED, failed_start="second", **FAILED),
            Done(),
        ),
        "is not for another stack": (
            facts(OTHER, fallback=OLD, state=UNTRIED, failed_start="second", **FAILED),
            Done(),
        ),
        "fails after the way back from another": (
            facts(OLD, fallback=EMPTY, state=UNTRIED, failed_start="second", **FAILED),
            Reject(OLD, Verdict.WENT_DOWN, "the service failed at its first start on it"),
        ),
    },
    "Check=": {
        "runs": (facts(OLD, wanted=NEW, has_check=True), Check(NEW)),
        "has passed": (
            facts(OLD, wanted=NEW, has_check=True, state={"checked": f"first {NEW.id}"}),
            Accept(NEW, new=True),
        ),
        "has passed for another": (
            facts(OLD, wanted=NEW, has_check=True, state={"checked": f"first {OTHER.id}"}),
            Check(NEW),
        ),
        "has passed before it was started anew": (
            facts(OLD, wanted=NEW, has_check=True, state={"checked": f"before {NEW.id}"}),
            Check(NEW),
        ),
        "is not for what it has": (facts(OLD, has_check=True), Done()),
        "before a start": (facts(OLD, wanted=NEW, has_check=True, **DOWN), Check(NEW)),
        "before the first start": (facts(EMPTY, wanted=NEW, has_check=True, **NEVER | DOWN), Check(NEW)),
        "has passed before a start": (
            facts(OLD, wanted=NEW, has_check=True, state={"checked": f" {NEW.id}"}, **DOWN),
            Accept(NEW, new=True),
        ),
        "has passed before a start that has come since": (
            facts(OLD, wanted=NEW, has_check=True, state={"checked": f" {NEW.id}"}),
            Check(NEW),
        ),
        "in the host's namespace": (facts(OLD, wanted=NEW, has_check=True, **HOST), Check(NEW)),
        "... and nothing was accepted yet": (facts(EMPTY, wanted=NEW, has_check=True, **HOST), Check(NEW)),
        "... and has passed": (
            facts(EMPTY, wanted=NEW, has_check=True, state={"checked": f"first {NEW.id}"}, **HOST),
            Accept(NEW, new=True),
        ),
        "... and has failed": (facts(EMPTY, wanted=NEW, has_check=True, **HOST, **judged(NEW)), REJECTED),
        "cannot be run before a start": (
            facts(OLD, wanted=NEW, has_check=True, **DOWN, **NO_SHADOW),
            Done(NEEDS_CHECK),
        ),
        "cannot be run before the first, which is on trial": (
            facts(EMPTY, wanted=NEW, has_check=True, **DOWN, **NO_SHADOW),
            Accept(NEW, new=True),
        ),
        "cannot be run for a template, whose instances run it": (
            facts(OLD, wanted=NEW, has_check=True, template=True, **DOWN, **NO_SHADOW),
            Accept(NEW, new=True),
        ),
        "cannot be run beside one in the host's namespace": (
            facts(OLD, wanted=NEW, has_check=True, **HOST, **NO_SHADOW),
            NeedsRestart(),
        ),
        "cannot be run before a start, and it runs": (
            facts(OLD, wanted=NEW, has_check=True, **NO_SHADOW),
            Check(NEW),
        ),
        "refused before a start, and it runs": (
            facts(OLD, state=bad(NEW, judge=EARLY, since=NOW - 1)),
            LetIn(anything=False, digests=NEW.digests),
        ),
        "refused before a start, and it runs in the host's namespace": (
            facts(EMPTY, state=bad(NEW, judge=EARLY, since=NOW - 1), **HOST),
            Done(),
        ),
        "refused before a start, and it does not run": (
            facts(OLD, state=bad(NEW, judge=EARLY, since=NOW - 1), **DOWN),
            Done(),
        ),
    },
    "being started": {
        "a new one": (facts(OLD, wanted=NEW, **STARTING), Done(BEING_STARTED)),
        "a new one, with Check=": (facts(OLD, wanted=NEW, has_check=True, **STARTING), Done(BEING_STARTED)),
        "the first": (facts(EMPTY, wanted=NEW, **NEVER | STARTING), Done(BEING_STARTED)),
        "a removal": (facts(OLD, wanted=EMPTY, **STARTING), Done(BEING_STARTED)),
        "what has counters": (facts(OLD, wanted=COUNTED, **STARTING), Done(BEING_STARTED)),
        "by hand": (facts(OLD, pinned=NEW, **STARTING), Accept(NEW)),
        "the way back": (facts(NEW, fallback=OLD, state=trial(NEW) | bad(NEW), **STARTING), Accept(OLD)),
    },
    "the record": {
        "of a file's name": (facts(OLD, wanted=RENAMED), Accept(RENAMED)),
        "of the entries": (facts(OLD, entries=(*entries(OLD), MORE)), Accept(OLD)),
        "of an entry that is gone, though its layer stays": (facts(OLD, entries=()), Done()),
        "of where its file is mounted": (facts(OLD, mounted=MOUNTED), Accept(OLD)),
        "of where its file was mounted": (
            facts(OLD, state={"accepted": Accepted(OLD, entries(OLD), 1, MOUNTED)}),
            Accept(OLD),
        ),
        "of its file system, which is gone": (
            facts(OLD, state={"accepted": Accepted(OLD, entries(OLD), 1, MOUNTED)}, mounted=MOUNTED),
            Done(),
        ),
        "says nothing of other files": (facts(OLD, mounted={NEW.layers[0].source: "/srv"}), Done()),
    },
    "Rollout=": {
        "not its turn": (facts(OLD, wanted=NEW, waits=TURN), Done(TURN)),
        "an instance that shows the stack of its template": (
            facts(EMPTY, wanted=NEW, waits=TURN, shown=None, **NEVER),
            Done(TURN),
        ),
        "not its turn, and it does not show what it has": (
            facts(OLD, wanted=NEW, waits=TURN, shown=None),
            Swap(),
        ),
        "not its turn, and a copy is damaged": (
            facts(NEW, wanted=OTHER, fallback=OLD, waits=TURN),
            Accept(OLD),
        ),
        "not its turn for what has counters": (facts(OLD, wanted=COUNTED, waits=TURN), Done(TURN)),
        "not its turn, after its images were removed": (
            facts(EMPTY, wanted=NEW, entries=(), waits=TURN, state={"replaced": OLD.id}),
            SayAccepted(),
        ),
        "nothing to wait for": (facts(OLD, waits=TURN), Done()),
    },
    "tries": {
        "not counted": (facts(OLD, wanted=COUNTED), Count()),
        "not counted, with Check=": (facts(OLD, wanted=COUNTED, has_check=True), Count()),
        "counted": (facts(OLD, wanted=TRIED, state={"counted": {KEY: 1}}), Accept(TRIED, new=True)),
        "counted, then killed, before the file was renamed": (
            facts(OLD, wanted=COUNTED, state={"counted": {KEY: 1}}),
            Count(),
        ),
        "of another attempt": (facts(OLD, wanted=TRIED), Count()),
        "of what it has": (facts(NEW, wanted=COUNTED), Accept(COUNTED)),
    },
    "brought to it": {
        "in a swap": (facts(NEW, shown=OLD.id), Swap()),
        "after a look at its namespaces": (facts(NEW, shown=None), Swap()),
        "and owed a reload": (facts(NEW, state={"owed": "first"}), Reload()),
        "and another start was owed one": (facts(NEW, state={"owed": "second"}), Done()),
        "by its start": (facts(NEW, state=trial(NEW)), Watch()),
        "by its start, after a reload that was owed": (
            facts(NEW, state=trial(NEW) | {"owed": "zeroth"}),
            Watch(),
        ),
        "and another is on trial": (facts(NEW, state=trial(OLD)), Done()),
        "and nothing was said": (facts(NEW, state={"replaced": OLD.id}), SayAccepted()),
        "and it is judged first": (facts(NEW, state=trial(NEW) | {"replaced": OLD.id}), Watch()),
    },
    "cannot be brought to it": {
        "stopped": (facts(NEW, **DOWN), Done()),
        "stopped, and nothing was said": (facts(NEW, state={"replaced": OLD.id}, **DOWN), SayAccepted()),
        "starting, and nothing was said": (facts(NEW, state={"replaced": OLD.id}, **STARTING), SayAccepted()),
        "headless, and nothing was said": (
            facts(NEW, state={"replaced": OLD.id}, headless=True, **DOWN),
            SayAccepted(),
        ),
        "stopped, and on trial": (facts(NEW, state=trial(NEW), **DOWN), Done()),
        "starting, and on trial": (facts(NEW, state=trial(NEW), **STARTING), Done()),
        "stopped, and a reload is owed": (facts(NEW, state={"owed": ""}, **DOWN), Done()),
        "in the host's namespace": (facts(NEW, **HOST), NeedsRestart()),
        "in the host's namespace, without images": (facts(EMPTY, **HOST), Done()),
        "in the host's namespace, on trial, and owed a reload": (
            facts(NEW, state=trial(NEW) | {"owed": "first"}, **HOST),
            NeedsRestart(),
        ),
        "in the host's namespace, and the images were removed": (
            facts(EMPTY, state={"replaced": OLD.id}, **HOST),
            SayAccepted(),
        ),
        "in the host's namespace, and undone": (
            facts(EMPTY, wanted=OTHER, entries=(), state=trial(NEW) | undoing(NEW) | bad(NEW), **HOST),
            Undone(),
        ),
        "in the host's namespace, undone, and another came": (
            facts(EMPTY, wanted=OTHER, state=trial(NEW) | bad(NEW), **HOST),
            Accept(OTHER, new=True),
        ),
    },
    "judged": {
        "good": (facts(NEW, state=trial(NEW) | {"owed": "first"}, **judged(NEW, GOOD)), Good()),
        "bad": (facts(NEW, state=trial(NEW) | {"owed": "first"}, **judged(NEW)), REJECTED),
        "bad, by its start": (facts(NEW, state=trial(NEW), **judged(NEW)), REJECTED),
        "bad, and it has ended": (facts(NEW, state=trial(NEW), **FAILED, **judged(NEW)), REJECTED),
        "bad, with Rollback=no": (facts(NEW, state=trial(NEW), rollback=False, **judged(NEW)), Keep()),
        "bad, though it was good before": (facts(NEW, state={"owed": "first"}, **judged(NEW)), Keep()),
        "bad, put on it by hand": (facts(NEW, pinned=NEW, state=trial(NEW), **judged(NEW)), Keep()),
        "good, put on it by hand": (facts(NEW, pinned=NEW, **judged(NEW, GOOD)), Good()),
        "by Check=": (facts(OLD, wanted=NEW, has_check=True, **judged(NEW)), REJECTED),
        "by Check=, with Rollback=no": (
            facts(OLD, wanted=NEW, has_check=True, rollback=False, **judged(NEW)),
            REJECTED,
        ),
        "the way back, good": (facts(OLD, state=undoing(NEW) | bad(NEW), **judged(OLD, GOOD)), Undone()),
        "the way back, bad": (facts(OLD, state=undoing(NEW) | bad(NEW), **judged(OLD)), Undone()),
        "the way back, bad, and down": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **FAILED, **judged(OLD, told="start")),
            Undone(),
        ),
        "by Check=, and it was stopped meanwhile": (
            facts(OLD, wanted=NEW, has_check=True, **DOWN, **judged(NEW)),
            REJECTED,
        ),
        "by Check=, and its turn is over": (
            facts(OLD, wanted=NEW, has_check=True, waits=TURN, **judged(NEW)),
            REJECTED,
        ),
    },
    "to blame": {
        "it failed on trial": (facts(NEW, state=trial(NEW), **FAILED), BEFORE_GOOD),
        "the start before failed": (
            facts(NEW, state=trial(NEW, other="zero"), failed_start="zero", **FAILED),
            Done(),
        ),
        "another start than the one before failed": (
            facts(NEW, state=trial(NEW, other="zero"), failed_start="first", **FAILED),
            BEFORE_GOOD,
        ),
        "it was stopped": (facts(NEW, state=trial(NEW), **DOWN), Done()),
        "it is being started again": (facts(NEW, state=trial(NEW), **FAILED | {"starting": True}), Done()),
        "it runs again": (facts(NEW, state=trial(NEW), failed=True), Watch()),
        "it had failed before": (facts(NEW, state=trial(NEW, was_down=True), **FAILED), Done()),
        "it failed on a damaged copy": (facts(NEW, state=trial(NEW), blameless=True, **FAILED), Done()),
        "its manager has another reason, and no start on this was seen": (
            facts(NEW, state=trial(NEW), excused="226", **FAILED),
            TryStart(),
        ),
        "... nor with this, after a reload": (
            facts(NEW, state=UNTRIED, failed_start="second", excused="226", **FAILED),
            TryStart(),
        ),
        "... which makes no difference": (
            facts(NEW, state=trial(NEW), excused="226", unstartable="", **FAILED),
            Done(),
        ),
        "... which it is": (
            facts(NEW, state=trial(NEW), excused="226", unstartable="226 on it", **FAILED),
            Reject(NEW, Verdict.WENT_DOWN, "226 on it"),
        ),
        "... but had failed before": (
            facts(NEW, state=trial(NEW, was_down=True), excused="226", **FAILED),
            Done(),
        ),
        "... and has no image": (facts(EMPTY, state=trial(EMPTY), excused="226", **FAILED), Done()),
        "... and a start on this was seen": (facts(NEW, excused="226", **FAILED), Done()),
        "nobody knows why it ended": (facts(NEW, state=trial(NEW), explained=False, **FAILED), Done()),
        "Rollback=no": (facts(NEW, state=trial(NEW), rollback=False, **FAILED), Done()),
        "it proved good": (facts(NEW, **FAILED), Done()),
        "it was judged, and stays": (
            facts(NEW, state=trial(NEW, verdict=Verdict.WENT_DOWN, judged=NOW), **FAILED),
            Done(),
        ),
        "another is on trial": (facts(NEW, state=trial(OLD), **FAILED), Done()),
        "already": (facts(NEW, fallback=OLD, state=trial(NEW) | bad(NEW), **FAILED), Accept(OLD)),
        "put on it by hand": (facts(NEW, pinned=NEW, state=trial(NEW), **FAILED), Done()),
    },
    "to blame in the afterglow": {
        "it failed": (facts(NEW, state=glow(NEW), **FAILED), SOON),
        "it failed, though nobody knows why": (facts(NEW, state=glow(NEW), explained=False, **FAILED), SOON),
        "systemd has started it again": (facts(NEW, state=glow(NEW), restarts=1, **SECOND), SOON),
        "it was killed from outside": (facts(NEW, state=glow(NEW), excused="SIGKILL", **FAILED), Done()),
        "it was killed from outside and started again": (
            facts(NEW, state=glow(NEW), excused="SIGKILL", restarts=1, **SECOND),
            Done(),
        ),
        "systemd had started it before": (facts(NEW, state=glow(NEW, restarts=3), restarts=3), Done()),
        "an operator has started it again": (
            facts(NEW, state=glow(NEW, restarts=3), restarts=0, **SECOND),
            Done(),
        ),
        "it goes on": (facts(NEW, state=glow(NEW)), Done()),
        "it was stopped": (facts(NEW, state=glow(NEW), **DOWN), Done()),
        "it is over": (facts(NEW, state=glow(NEW), now=NOW + 1, **FAILED), Done()),
        "the clock was set back": (facts(NEW, state=glow(NEW), now=0, **FAILED), Done()),
        "it failed on a damaged copy": (facts(NEW, state=glow(NEW), blameless=True, **FAILED), Done()),
        "Rollback=no": (facts(NEW, state=glow(NEW), rollback=False, **FAILED), Done()),
        "put on it by hand": (facts(NEW, pinned=NEW, state=glow(NEW), **FAILED), Done()),
    },
    "undone": {
        "first the one before": (
            facts(NEW, wanted=OTHER, fallback=OLD, state=trial(NEW) | bad(NEW) | undoing(NEW)),
            Accept(OLD),
        ),
        "... which is swapped in": (facts(OLD, state=undoing(NEW) | bad(NEW), shown=NEW.id), Swap()),
        "... and told": (facts(OLD, state=undoing(NEW) | bad(NEW) | {"owed": "first"}), Reload()),
        "... unless it was started on it": (
            facts(OLD, state=undoing(NEW) | bad(NEW) | {"owed": "first"}, **SECOND),
            Undone(),
        ),
        "by a start": (facts(OLD, state=undoing(NEW) | bad(NEW), **FAILED), Revive()),
        "without one where it was stopped": (facts(OLD, state=undoing(NEW) | bad(NEW), **DOWN), Undone()),
        "without one where it was killed from outside": (
            facts(OLD, state=undoing(NEW) | bad(NEW), excused="SIGKILL", **FAILED),
            Undone(),
        ),
        "by a start, though its manager puts that down to something else": (
            facts(OLD, state=undoing(NEW, Verdict.WENT_DOWN) | bad(NEW), excused="226", **FAILED),
            Revive(),
        ),
        "not while its manager starts it, perhaps on the bad one still: that may fail": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **STARTING),
            Done(STARTED_ON_ITS_OWN),
        ),
        "... and has not come to an end with it": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **FAILED | {"starting": True}),
            Done(STARTED_ON_ITS_OWN),
        ),
        "by a start, whichever stack the one that failed was on": (
            facts(
                OLD,
                state=undoing(NEW) | bad(NEW) | {"untried": {OLD.id: "first"}},
                failed_start="second",
                **FAILED,
            ),
            Revive(),
        ),
        "by a start, where it ended before it was back": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **FAILED, **judged(OLD, Verdict.WENT_DOWN)),
            Revive(),
        ),
        "... which its manager may be about to make": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **STARTING, **judged(OLD, Verdict.WENT_DOWN)),
            Done(STARTED_ON_ITS_OWN),
        ),
        "without one in the host's namespace": (
            facts(OLD, state=undoing(NEW) | bad(NEW), **HOST),
            Undone(),
        ),
        "a removal": (
            facts(EMPTY, fallback=OLD, wanted=OLD, state=undoing(EMPTY) | {"quarantine": (REMOVAL,)}),
            Accept(OLD),
        ),
        "nothing, where nothing else is left": (
            facts(EMPTY, state=undoing(EMPTY) | {"quarantine": (REMOVAL,)}),
            Undone(),
        ),
        "what was kept out for another reason": (
            facts(NEW, fallback=OLD, wanted=OLD, state=bad(NEW)),
            Accept(OLD),
        ),
        "no more, once it was let in again": (
            facts(NEW, state=trial(NEW) | undoing(NEW) | {"owed": "first"}),
            Reload(),
        ),
        "... and started since": (facts(NEW, state=trial(NEW) | undoing(NEW)), Watch()),
        "... and judged": (facts(NEW, state=trial(NEW) | undoing(NEW), **judged(NEW, GOOD)), Good()),
        "before anything new": (facts(OLD, wanted=OTHER, state=undoing(NEW) | bad(NEW)), Undone()),
        "before anything new is counted": (
            facts(OLD, wanted=COUNTED, state=undoing(OTHER) | bad(OTHER)),
            Undone(),
        ),
    },
    "put on it by hand": {
        "another": (facts(NEW, pinned=OLD), Accept(OLD)),
        "the one it has": (facts(OLD, pinned=OLD, wanted=NEW), Done()),
        "nothing at all": (facts(OLD, pinned=EMPTY), Accept(EMPTY)),
        "a bad one": (facts(OLD, pinned=NEW, state=bad(NEW)), Accept(NEW)),
        "a bad one, which it has": (facts(NEW, pinned=NEW, fallback=OLD, state=bad(NEW)), Done()),
        "with Check=": (facts(NEW, pinned=OLD, has_check=True), Accept(OLD)),
        "with Check=, stopped": (facts(NEW, pinned=OLD, has_check=True, **DOWN), Accept(OLD)),
        "with Rollout=": (facts(NEW, pinned=OLD, wanted=OTHER, waits=TURN), Accept(OLD)),
        "a damaged one": (facts(NEW, pinned=OTHER, fallback=OLD, damaged=(OTHER.id,)), Accept(OLD)),
        "one on trial": (facts(NEW, pinned=NEW, state=trial(NEW)), Done()),
        "another, while one is undone": (
            facts(OLD, pinned=OTHER, state=undoing(NEW) | bad(NEW)),
            Accept(OTHER),
        ),
        "... and that is the outcome": (facts(OTHER, pinned=OTHER, state=undoing(NEW) | bad(NEW)), Undone()),
        "another, before one is undone": (
            facts(NEW, pinned=OTHER, fallback=OLD, state=undoing(NEW) | bad(NEW)),
            Accept(OTHER),
        ),
        "the bad one, while it is undone": (
            facts(NEW, pinned=NEW, fallback=OLD, state=undoing(NEW) | bad(NEW) | {"owed": "first"}),
            Reload(),
        ),
        "... which it was told already": (
            facts(NEW, pinned=NEW, fallback=OLD, state=undoing(NEW) | bad(NEW)),
            Keep(),
        ),
        "... and it is down": (
            facts(NEW, pinned=NEW, fallback=OLD, state=undoing(NEW) | bad(NEW), **FAILED),
            Keep(),
        ),
        "... which is bad again": (
            facts(NEW, pinned=NEW, fallback=OLD, state=undoing(NEW) | bad(NEW), **judged(NEW)),
            Keep(),
        ),
    },
    "damaged": {
        "what it has": (facts(NEW, fallback=OLD, damaged=(NEW.id,)), Accept(OLD)),
        "what it has, with Check=, and stopped": (
            facts(NEW, fallback=OLD, damaged=(NEW.id,), has_check=True, **DOWN),
            Accept(OLD),
        ),
        "what is offered": (facts(OLD, wanted=NEW, damaged=(NEW.id,)), Done()),
        "everything": (facts(NEW, fallback=EMPTY, damaged=(NEW.id,), shown=None), Done()),
        "everything, put on it by hand": (facts(NEW, pinned=NEW, fallback=EMPTY, damaged=(NEW.id,)), Done()),
        "everything, and it is stopped": (
            facts(NEW, fallback=EMPTY, damaged=(NEW.id,), **DOWN),
            Accept(EMPTY),
        ),
        "everything but what is offered": (
            facts(NEW, wanted=OTHER, fallback=EMPTY),
            Accept(OTHER, new=True),
        ),
        "what it shows, and there is a new copy": (facts(NEW, worn=True), Swap()),
        "what it had shown, and it is stopped": (facts(NEW, worn=True, **DOWN), Done()),
        "what it shows, and the new copy, too": (
            facts(NEW, worn=True, damaged=(NEW.id,), fallback=EMPTY, shown=None),
            Done(),
        ),
    },
    "kept out for now": {
        "it is the same start": (facts(OLD, state=NOT_NOW), Done()),
        "its check says something else now": (
            facts(OLD, state=bad(NEW, since=NOW - 1), again=NEW.digests),
            LetIn(anything=False, digests=NEW.digests),
        ),
        "... and did so in this round": (facts(OLD, state=bad(NEW, since=NOW), again=NEW.digests), Done()),
        "it was started anew": (facts(OLD, state=NOT_NOW, **SECOND), LetIn(anything=True)),
        "it was started anew after it fell": (
            facts(OLD, state=NOT_NOW | {"fell": True}, **SECOND),
            LetIn(anything=False),
        ),
        "it is not to blame for its fall": (
            facts(OLD, state=NOT_YET | {"fell": True}, **SECOND),
            LetIn(anything=True),
        ),
        "... but systemd starts it again": (
            facts(OLD, state=NOT_YET | {"fell": True}, restarts=1, **SECOND),
            LetIn(anything=False),
        ),
        "it is stopped": (facts(OLD, state=NOT_NOW, **DOWN), Done()),
        "it is the first look of this watcher": (facts(OLD, state=NOT_NOW, first=True), LetIn(anything=True)),
        "... after it fell": (
            facts(OLD, state=NOT_NOW | {"fell": True}, first=True),
            LetIn(anything=True),
        ),
        "... and it is stopped": (facts(OLD, state=NOT_NOW, first=True, **DOWN), LetIn(anything=True)),
        "first what is undone": (facts(OLD, state=NOT_NOW | undoing(NEW), first=True), Undone()),
        "for good": (facts(OLD, state=bad(NEW) | {"held_for": "zeroth"}, first=True), Done()),
        "first what is undone, though it was started anew": (
            facts(OLD, state=NOT_NOW | undoing(NEW), **SECOND),
            Undone(),
        ),
    },
}


@pytest.mark.parametrize(
    ("known", "step"),
    [
        pytest.param(known, step, id=f"{about}: {name}")
        for about, rows in TABLE.items()
        for name, (known, step) in rows.items()
    ],
)
def test_decide(known: Facts, step: Step) -> None:
    assert decide(known) == step


def test_each_step_is_in_the_table() -> None:
    taken = {type(step) for rows in TABLE.values() for _, step in rows.values()}
    assert taken == set(typing.get_args(Step))


def test_the_reason_of_a_rejection_ends_with_what_the_command_said_last() -> None:
    """A check's reason has that line already."""
    assert Reject(NEW, Verdict.RELOAD_FAILED, "reload failed", "a\nb\n").reason == "reload failed (b)"
    assert Reject(NEW, Verdict.CHECK_FAILED, "check failed: b", "a\nb\n").reason == "check failed: b"


def test_a_start_finds_each_layer_of_the_stack_that_stays() -> None:
    """Though its file, and what it was an entry of, was replaced by another."""
    both, waits = stack("base1", "web1"), {"waits": "it waits for its turn (Rollout=rolling)"}
    base, more = entries(stack("base1")), (MORE,)
    known = facts(both, wanted=stack("base1", "more1"), entries=(*base, *more), **waits)
    assert [entry.slot for entry in known.listed] == ["base.raw", "web.raw", "more.raw"]
    assert known.target == both
    # An older one comes back of which no entry is known any more.
    pinned = facts(both, pinned=stack("old1", "web1"), entries=entries(both))
    assert [entry.slot for entry in pinned.listed] == ["old.raw", "base.raw", "web.raw"]


@pytest.mark.parametrize(
    ("known", "other"),
    [
        (facts(OLD), None),
        (facts(NEW, state=trial(NEW)), ""),
        (facts(NEW, state=trial(NEW), **DOWN), ""),
        (facts(NEW, state=trial(NEW, other="zero"), **HOST), "zero"),
        (facts(NEW, state=trial(NEW, other="zero"), **STARTING), "zero"),
        # It may well end: nothing is made of that.
        (facts(NEW, state=trial(NEW, was_down=True), failed_start="first", **FAILED), "first"),
        (facts(NEW, state=trial(OLD)), None),
        (facts(NEW, state=glow(NEW)), None),
        (facts(NEW, state=trial(NEW) | bad(NEW)), None),
        (facts(NEW, pinned=NEW, state=trial(NEW)), None),
        (facts(NEW, rollback=False, state=trial(NEW)), None),
    ],
)
def test_whose_next_start_is_on_trial(known: Facts, other: str | None) -> None:
    assert known.start_on_trial == other
