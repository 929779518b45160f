# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `wait` answers: one row for each answer. (`rounds/answer.py`)"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from support import CHECKOUT
from support.facts import facts, kept_out, layer, stack
from watcher.model import Busy, Event, Incomplete, KeptOut, Later, Outcome, Refused, Stack, Verdict
from watcher.records.state import INNOCENT, Trial, Undoing
from watcher.rounds.answer import Answer, Dropped, Kind, answer
from watcher.rounds.facts import Facts

WEB = "web.service"
OLD, NEW, NEWEST, OTHER, EMPTY = stack("web1"), stack("web2"), stack("web3"), stack("db1"), Stack()
DOWN: dict[str, Any] = {"running": False, "invocation": "", "shown": None}
FAILED = DOWN | {"failed": True}
UNCHECKED = {"has_check": True, "no_shadow": "its unit is masked"}
HOST = {"out_of_reach": "is in the host's mount namespace", "shown": None}
ON_TRIAL = {"trial": Trial(NEW.id), "replaced": OLD.id}
BAD = {"quarantine": (kept_out(NEW),)}
NOT_NOW = {"quarantine": (kept_out(NEW, for_now=True),), "held_for": "first"}
NOT_YET = {"quarantine": (kept_out(NEW, for_now=True, judge=INNOCENT),), "held_for": "first"}
UNDOING = BAD | {"undoing": Undoing(NEW, Verdict.RELOAD_FAILED, "reload failed")}
KEPT = KeptOut("kept out: it is bad")
RENAMED = "/srv/web.raw.v/web_2.1.raw"
LET_IN = "confext-watcher rollback --forget web.service"


def file(one: Stack, /, chosen: Stack | None = None, **changes: Any) -> Dropped:
    """The file of the topmost layer of a stack."""
    top = one.layers[-1]
    counts = (one if chosen is None else chosen).layers
    return replace(Dropped(top.source, top.digest, chosen=counts[-1] if counts else None), **changes)


def unread(one: Stack, chosen: Stack) -> Dropped:
    """One that the look did not have to read."""
    return file(one, chosen, digest="")


def outcome(what: Outcome, one: Stack, message: str, **changes: Any) -> Event:
    top = one.layers[-1]
    verdict = Verdict.GOOD if what is Outcome.APPLIED else None
    said = Event(WEB, what, message, 5, stack=one.id, digest=top.digest, source=top.source, verdict=verdict)
    return replace(said, **{"layers": one.layers} | changes)


APPLIED = outcome(Outcome.APPLIED, NEW, "web 1 -> 2 applied in 1 ms, reload done in 2 ms")
ROLLED_BACK = outcome(Outcome.ROLLED_BACK, NEW, "web 2 taken out again", stack=OLD.id, layers=OLD.layers)
STAYS = outcome(Outcome.FAILED, NEW, "web 2 is in place, but reload failed", reason="reload failed")
SAME = outcome(Outcome.UNCHANGED, NEW, "web 2.1 has the content that it had before: unchanged")
NOT_PLACED = Event(WEB, Outcome.FAILED, "its stack could not be put in place, it is tried again: no space", 5)

Row = tuple[Facts, Dropped, tuple[Event, ...], Kind, str]
"""What is known, the file, the history, newest first; the answer, and a part of its words or of its command."""

TABLE: dict[str, Row] = {
    "the service runs on it": (facts(NEW), file(NEW), (), Kind.APPLIED, "the service runs on it"),
    "... as the history has it": (facts(NEW), file(NEW), (APPLIED,), Kind.APPLIED, "reload done in 2 ms"),
    "... since a start": (
        facts(NEW),
        file(NEW),
        (replace(APPLIED, verdict=None, message="it is not running"),),
        Kind.APPLIED,
        "the service runs on it",
    ),
    "... while another image is tried": (
        facts(NEW, wanted=stack("web2", "db1"), has_check=True), file(NEW), (), Kind.APPLIED, "",
    ),
    "... while a newer one comes": (facts(NEW, wanted=NEWEST), file(NEW, NEWEST), (), Kind.APPLIED, ""),
    "... by hand": (facts(NEW, wanted=NEWEST, pinned=NEW), file(NEW, NEWEST), (), Kind.APPLIED, ""),
    "... by hand, though it had proved bad": (
        facts(NEW, wanted=OLD, pinned=NEW, state=BAD), file(NEW, OLD, passed=KEPT), (), Kind.APPLIED, "",
    ),
    "the same content under a new version": (
        facts(NEW), file(NEW, path=RENAMED), (), Kind.UNCHANGED, "runs on this content already",
    ),
    "... as the history has it ": (facts(NEW), file(NEW), (SAME, APPLIED), Kind.UNCHANGED, "2.1 has the content"),
    "the service is stopped": (
        facts(NEW, **DOWN), file(NEW), (APPLIED,), Kind.ACCEPTED, "accepted; it is not running, its next start gets it",
    ),
    "... and was never judged on it": (
        facts(NEW, state={"trial": Trial(NEW.id)}, **DOWN), file(NEW), (), Kind.ACCEPTED, "its next start gets it",
    ),
    "... and the outcome is to be written": (
        facts(NEW, state=ON_TRIAL, **DOWN), file(NEW), (), Kind.PLACING, "being written down",
    ),
    "the service fails, with and without it": (facts(NEW, **FAILED), file(NEW), (), Kind.ACCEPTED, "its next start"),
    "Rollback=no": (facts(NEW), file(NEW), (STAYS, APPLIED), Kind.FAILED, "confext-watcher rollback web.service"),
    "the main process is the host's": (
        facts(NEW, **HOST), file(NEW), (), Kind.NEEDS_RESTART, "systemctl restart web.service",
    ),
    "... without systemd": (
        facts(NEW, explained=False, **HOST), file(NEW), (), Kind.NEEDS_RESTART, "restart it once",
    ),
    "there is no main process": (
        facts(NEW, headless=True, **DOWN), file(NEW), (), Kind.NEEDS_RESTART, "no main process of it: restart it once",
    ),
    "Check= needs it to run": (
        facts(OLD, wanted=NEW, **UNCHECKED, **DOWN), file(NEW), (), Kind.NEEDS_START, "systemctl start web.service",
    ),
    "... where Check= can run": (
        facts(OLD, wanted=NEW, **UNCHECKED, **HOST), file(NEW), (), Kind.NEEDS_START, "systemctl restart web",
    ),
    "it cannot be used": (
        facts(OLD), file(NEW, OLD, digest="", passed=Refused("not an image")), (), Kind.REFUSED, "not an image",
    ),
    "... as the history has it  ": (
        facts(OLD),
        file(NEW, OLD, digest="", passed=Refused("not an image")),
        (outcome(Outcome.REFUSED, NEW, "refused: not an image; it keeps web 1", reason="not an image"),),
        Kind.REFUSED,
        "it keeps web 1",
    ),
    "... and the history has another reason": (
        facts(OLD),
        file(NEW, OLD, digest="", passed=Refused("not an image")),
        (outcome(Outcome.REFUSED, NEW, "refused: too large", reason="too large"),),
        Kind.REFUSED,
        "refused: not an image",
    ),
    "it was applied, and overwritten by what the check refuses": (
        facts(OLD, state=BAD), file(NEW, OLD, passed=KEPT), (APPLIED,), Kind.KEPT_OUT, LET_IN,
    ),
    "it proved bad": (facts(OLD, state=BAD), file(NEW, OLD, passed=KEPT), (ROLLED_BACK,), Kind.KEPT_OUT, "taken out"),
    "it proved bad elsewhere": (
        facts(OLD), file(NEW, OLD, passed=KeptOut("kept out: it did not do on b.service: no")), (), Kind.KEPT_OUT,
        "it did not do on b.service",
    ),
    "it has tries left": (
        facts(OLD, state=NOT_NOW), file(NEW, OLD, passed=KEPT), (), Kind.KEPT_OUT_FOR_NOW,
        "systemctl restart web.service",
    ),
    "... without systemd ": (
        facts(OLD, state=NOT_NOW, explained=False), file(NEW, OLD, passed=KEPT), (), Kind.KEPT_OUT_FOR_NOW, LET_IN,
    ),
    "it is not to blame": (
        facts(OLD, state=NOT_YET), file(NEW, OLD, passed=KEPT), (), Kind.KEPT_OUT_FOR_NOW, "at the next start",
    ),
    "it is tried again": (
        facts(OLD, state=NOT_NOW, invocation="second"), file(NEW, OLD, passed=KEPT), (), Kind.CHECKING, "tried again",
    ),
    "it was touched": (
        facts(OLD, state=BAD, again=NEW.digests), file(NEW, OLD, passed=KEPT), (), Kind.CHECKING, "tried again",
    ),
    "another stack by hand": (facts(OLD, wanted=NEW, pinned=OLD), file(NEW), (), Kind.PINNED, LET_IN),
    "older than what runs": (facts(NEW), unread(OLD, NEW), (), Kind.OLDER, "web 2 is newer"),
    "... which is not there any more": (facts(NEW, wanted=NEW), file(OLD, NEW), (), Kind.OLDER, "web 2 is newer"),
    "superseded in a burst": (
        facts(OLD, wanted=NEWEST), unread(NEW, NEWEST), (), Kind.SUPERSEDED, "wait web.service web_3.raw",
    ),
    "too many layers": (facts(OLD), file(NEW, EMPTY), (), Kind.STUCK, "confext-watcher plan web.service"),
    "a damaged copy": (facts(OLD, wanted=NEW, damaged=(NEW.id,)), file(NEW), (), Kind.STUCK, "the log says why"),
    "it is not whole": (
        facts(OLD), file(NEW, OLD, digest="", passed=Incomplete("incomplete: 1 of 3 bytes are here")), (),
        Kind.INCOMPLETE, "incomplete: 1 of 3 bytes are here",
    ),
    "somebody writes to it": (
        facts(OLD), file(NEW, OLD, digest="", passed=Busy("it is being written")), (), Kind.WAITING, "being written",
    ),
    "the store is full": (
        facts(OLD), file(NEW, OLD, digest="", passed=Later("no space")), (), Kind.WAITING, "no space",
    ),
    "it is not its turn": (
        facts(OLD, wanted=NEW, rolling=True, waits="it waits for its turn"), file(NEW), (), Kind.WAITING, "its turn",
    ),
    "new, while the service is being started": (
        facts(OLD, wanted=NEW, **DOWN | {"starting": True}), file(NEW), (), Kind.WAITING, "it is being started",
    ),
    "confexts are off": (
        facts(OLD, wanted=NEW, nothing_new="systemd.confext=no"), file(NEW), (), Kind.STUCK, "systemd.confext=no",
    ),
    "it is to be checked": (facts(OLD, wanted=NEW, has_check=True), file(NEW), (), Kind.CHECKING, "is checked"),
    "it was checked": (facts(OLD, wanted=NEW), file(NEW), (), Kind.PLACING, "is put in place"),
    "what is there goes first": (
        facts(OTHER, wanted=NEW, state={"trial": Trial(OTHER.id)}, **FAILED), file(NEW), (), Kind.UNDOING, "goes back",
    ),
    "it is not in place yet": (facts(NEW, state=ON_TRIAL, shown=OLD.id), file(NEW), (), Kind.PLACING, "put in place"),
    "... and cannot be": (
        facts(NEW, state=ON_TRIAL, shown=OLD.id), file(NEW), (NOT_PLACED, APPLIED), Kind.PLACING, "no space",
    ),
    "the service is told": (
        facts(NEW, state=ON_TRIAL | {"owed": "first"}), file(NEW), (), Kind.RELOADING, "asked to reload",
    ),
    "the service is watched": (facts(NEW, state=ON_TRIAL), file(NEW), (APPLIED,), Kind.ON_TRIAL, "on trial"),
    "the first start on what only a reload has seen": (
        facts(NEW, state={"untried": {NEW.id: "zero"}}), file(NEW), (APPLIED,), Kind.ON_TRIAL, "on trial",
    ),
    "the service is being started": (
        facts(NEW, state=ON_TRIAL, **DOWN | {"starting": True}), file(NEW), (), Kind.ON_TRIAL, "started on it",
    ),
    "the outcome is to be written": (
        facts(NEW, state={"replaced": OLD.id}), file(NEW), (), Kind.PLACING, "being written down",
    ),
    "it is about to go": (
        facts(NEW, state=ON_TRIAL, **FAILED), file(NEW), (), Kind.UNDOING, "goes back",
    ),
    "it goes": (facts(OLD, state=UNDOING), file(NEW, OLD, passed=KEPT), (), Kind.UNDOING, "goes back"),
    "it comes back": (facts(OLD, state=UNDOING), file(OLD), (), Kind.UNDOING, "put on it again"),
    "it is no candidate": (
        facts(OLD), Dropped("x", problem=(Kind.MISNAMED, "not called web_VERSION.raw")), (), Kind.MISNAMED, "VERSION",
    ),
}  # fmt: skip


def said(found: Answer) -> str:
    return f"{found.text}\n{found.command}"


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_the_answer_where(row: Row) -> None:
    known, dropped, history, kind, words = row
    found = answer(WEB, known, dropped, history)
    assert (found.kind, words in said(found)) == (kind, True), said(found)
    assert found.event.message.isprintable() and found.event.service == WEB
    assert found.final == (kind.status in (0, 1))


def test_every_kind_has_a_row() -> None:
    """Those of what is no candidate are found by `rounds/dropped.py`, and `looking` before anything is."""
    others = {Kind.NOT_THERE, Kind.ELSEWHERE, Kind.DANGLING, Kind.UPLOADING, Kind.LOOKING}
    assert {row[3] for row in TABLE.values()} == set(Kind) - others


def test_what_becomes_of_a_name_does_not_count_for_its_content() -> None:
    """Applied, said the history; and then the file was overwritten, again and again."""
    for passed, kind in (
        (KEPT, Kind.KEPT_OUT),
        (Refused("x"), Kind.REFUSED),
        (Incomplete("x"), Kind.INCOMPLETE),
    ):
        found = answer(WEB, facts(NEW, state=BAD), file(NEW, passed=passed), (APPLIED,))
        assert found.event != APPLIED and found.kind.status != 0, kind


def test_what_is_in_the_stack_and_shown_is_no_success_before_its_time() -> None:
    for state in (
        ON_TRIAL,
        ON_TRIAL | {"owed": "first"},
        {"replaced": OLD.id},
        {"untried": {NEW.id: "zero"}},
    ):
        found = answer(WEB, facts(NEW, state=state), file(NEW), (APPLIED,))
        assert not found.final, state


def test_the_rows_of_the_man_page_and_of_the_code_are_the_same() -> None:
    page = (CHECKOUT / "contrib/man/confext-watcher.1").read_text()
    table = page.partition(".Ss What wait answers\n")[2].partition("\n.S")[0]
    found: dict[str, int] = {}
    status = -1
    for line in table.splitlines():
        if begins := re.match(r"Exit status (\d)", line):
            status = int(begins[1])
        elif item := re.match(r"\.It Li (\S+)$", line):
            found[item[1]] = status
    assert found == {kind.word: int(kind.status) for kind in Kind}
    documented = re.findall(r"^ +([a-z-]+) {2,}\S", Kind.__doc__ or "", re.MULTILINE)
    assert documented == [kind.word for kind in Kind]


def test_a_layer_is_its_file() -> None:
    assert layer("web2").source == file(NEW).path
