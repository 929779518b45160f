# SPDX-License-Identifier: LGPL-2.1-or-later
"""How each step changes the record of a service; a try that was counted is not counted again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from support.facts import NOW, entries, facts, kept_out, layer, record, stack
from watcher.images import tries
from watcher.images.store import Store
from watcher.model import Stack, Verdict
from watcher.records.state import INNOCENT, STACK, Accepted, Quarantine, State, Trial, Undoing
from watcher.resolve.trust import ROOT_ALONE
from watcher.rounds import changes, decide
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Judged

OLD, NEW, OTHER, EMPTY = stack("web1"), stack("web2"), stack("web3"), Stack()
UNDOING = Undoing(NEW, Verdict.RELOAD_FAILED, "reload failed")
ON_TRIAL: dict[str, Any] = {"trial": Trial(NEW.id), "owed": "first", "replaced": OLD.id}
GOOD = Judged(NEW, Verdict.GOOD, "reload")


def accepted(one: Stack, before: State) -> State:
    """The record that `Store.accept()` hands to its change."""
    return replace(before, accepted=Accepted(one, entries(one), when=2))


# --- accept ---


@pytest.mark.parametrize(
    ("path", "told"), [("/srv/web.raw.v/web_3.raw", True), ("/srv/web.raw.v/web_2+1-1.raw", False)]
)
def test_the_same_content_under_another_version_is_told(path: str, told: bool) -> None:
    other = Stack((replace(NEW.layers[0], source=path),))
    before = facts(NEW, wanted=other)
    state = accept(before, decide.Accept(other))
    assert (state.replaced, state.owed, state.trial) == (NEW.id if told else None, "", None)
    known = facts(other, state={"replaced": state.replaced})
    assert decide.decide(known) == (decide.SayAccepted() if told else decide.Done())


def accept(known: Any, step: decide.Accept) -> State:
    return changes.accept(step, known, known.invocation, (), accepted(step.stack, known.state))


def test_a_new_stack_is_on_trial_and_the_service_owed_a_reload() -> None:
    state = accept(facts(OLD, state={"checked": NEW.id, "counted": {"a": 1}}), decide.Accept(NEW, new=True))
    assert (state.trial, state.owed, state.replaced) == (Trial(NEW.id), "first", OLD.id)
    assert (state.checked, dict(state.counted), state.undoing) == ("", {}, None)


def test_one_that_does_not_run_is_owed_nothing() -> None:
    stopped = facts(OLD, running=False, invocation="", shown=None)
    state = accept(stopped, decide.Accept(NEW, new=True))
    assert (state.trial, state.owed, state.replaced) == (Trial(NEW.id), "", OLD.id)
    state = accept(replace(stopped, failed=True), decide.Accept(NEW, new=True))
    assert state.trial == Trial(NEW.id, was_down=True)


def test_the_same_stack_by_other_names_stays_on_trial_and_owed() -> None:
    renamed = Stack((layer("web2", "+1"),))
    state = accept(facts(NEW, state=ON_TRIAL, wanted=renamed), decide.Accept(renamed))
    assert (state.trial, state.owed, state.replaced) == (Trial(NEW.id), "first", OLD.id)


def test_a_stack_that_is_back_is_not_on_trial() -> None:
    bad = facts(NEW, fallback=OLD, state=ON_TRIAL | {"quarantine": (kept_out(NEW),), "undoing": UNDOING})
    state = accept(bad, decide.Accept(OLD))
    assert (state.trial, state.undoing, state.owed) == (None, UNDOING, "first")


def test_what_was_kept_out_since_it_was_accepted_is_undone() -> None:
    bad = facts(NEW, fallback=OLD, state={"quarantine": (kept_out(NEW),)})
    assert accept(bad, decide.Accept(OLD)).undoing == Undoing(NEW, Verdict.WENT_DOWN, "it is bad")
    chosen = accept(replace(bad, pinned=OLD), decide.Accept(OLD))
    assert chosen.undoing is None


def test_a_new_stack_in_place_of_a_bad_one_that_had_to_stay_is_on_trial_alone() -> None:
    """A removal proved bad, and nothing else was left: the next drop is no way back."""
    bad = facts(EMPTY, wanted=NEW, state={"quarantine": (Quarantine(STACK + EMPTY.id, "it is bad", 1),)})
    state = accept(bad, decide.Accept(NEW, new=True))
    assert (state.trial, state.undoing) == (Trial(NEW.id), None)


def test_what_was_let_in_again_is_not_undone_by_the_next() -> None:
    let_in = facts(NEW, wanted=OTHER, state=ON_TRIAL | {"undoing": UNDOING})
    assert accept(let_in, decide.Accept(OTHER, new=True)).undoing is None


# --- verdicts ---


def good(known: Any) -> State:
    return changes.good(known, NOW, known.state)


def test_one_that_was_told_and_goes_on_proved_good_and_is_watched_for_a_moment() -> None:
    state = good(facts(NEW, state=ON_TRIAL | {"undoing": UNDOING}, restarts=3, judged=GOOD))
    assert state.trial == Trial(NEW.id, verdict=Verdict.GOOD, judged=NOW, restarts=3)
    assert (state.owed, state.replaced, state.undoing) == ("", None, None)


def test_one_that_was_told_by_a_restart_was_told() -> None:
    """It is another start of the service by now, which is owed nothing."""
    state = good(
        facts(NEW, state=ON_TRIAL, invocation="second", judged=replace(GOOD, told="restart"), explained=False)
    )
    assert state.trial == Trial(NEW.id, verdict=Verdict.GOOD, judged=NOW)
    assert (state.owed, state.replaced) == ("", None)


def test_of_one_that_was_started_on_it_the_outcome_is_still_to_come() -> None:
    started = facts(NEW, state=ON_TRIAL, invocation="second", judged=replace(GOOD, told=""))
    state = good(started)
    assert state.trial == Trial(NEW.id, verdict=Verdict.GOOD, judged=NOW)
    assert (state.owed, state.replaced) == ("", OLD.id)
    assert good(replace(started, explained=False)).trial is None


def test_what_was_not_on_trial_is_not_to_blame_later() -> None:
    assert good(facts(NEW, state={"owed": "first"}, judged=GOOD)).trial is None


def test_a_bad_one_that_stays_is_remembered_as_bad() -> None:
    """With Rollout=rolling no other service follows."""
    known = facts(NEW, state=ON_TRIAL)
    state = changes.keep(known, Verdict.RELOAD_FAILED, NOW, known.state)
    assert state.trial == Trial(NEW.id, verdict=Verdict.RELOAD_FAILED, judged=NOW)
    assert (state.owed, state.replaced) == ("", None)
    again = facts(NEW, state={"owed": "first"})
    assert changes.keep(again, Verdict.RELOAD_FAILED, NOW, again.state).trial is None


def test_a_verdict_on_another_stack_than_is_accepted_by_now_changes_nothing() -> None:
    known, since = facts(NEW, state=ON_TRIAL), record(OTHER, trial=Trial(OTHER.id))
    assert changes.good(known, NOW, since) == since
    assert changes.keep(known, Verdict.RELOAD_FAILED, NOW, since) == since


REJECT = decide.Reject(NEW, Verdict.RELOAD_FAILED, "reload failed", "a\nb\n")


def test_a_bad_one_that_is_accepted_is_undone_and_one_that_was_checked_is_not() -> None:
    entry = kept_out(NEW)
    known = facts(NEW, state=ON_TRIAL | {"quarantine": (kept_out(NEW, for_now=True), kept_out(OTHER))})
    state = changes.reject(REJECT, known, [entry], True, known.state)
    assert state.undoing == Undoing(NEW, Verdict.RELOAD_FAILED, "reload failed (b)", "a\nb\n")
    assert (state.quarantine, state.owed) == ((kept_out(OTHER), entry), "first")
    known = facts(OLD, wanted=NEW, state={"counted": {"a": 1}})
    state = changes.reject(replace(REJECT, verdict=Verdict.CHECK_FAILED), known, [entry], True, known.state)
    assert (state.undoing, dict(state.counted), state.held_for) == (None, {}, "first")


@pytest.mark.parametrize(
    ("runs", "more", "fell"),
    [
        (True, {}, False),
        (False, {}, True),
        (False, {"explained": False}, False),  # its next `exec` makes the next try
        # Its manager has started it again already: the next start is an operator's.
        (True, {"restarts": 1, "state": {"trial": Trial(NEW.id, verdict=Verdict.GOOD, judged=NOW)}}, False),
    ],
)
def test_whose_start_is_the_next(runs: bool, more: dict[str, Any], fell: bool) -> None:
    known = facts(NEW, **{"state": ON_TRIAL} | more)
    assert changes.reject(REJECT, known, [], runs, known.state).fell is fell


def test_what_a_check_refuses_takes_nothing_down() -> None:
    known = facts(OLD, wanted=NEW, running=False)
    assert not changes.reject(REJECT, known, [], False, known.state).fell


def test_what_is_kept_out_for_now_is_let_in_by_an_operator_alone() -> None:
    for_now, for_good = kept_out(NEW, for_now=True), kept_out(OTHER)
    state = record(OLD, quarantine=(for_now, for_good), held_for="first", fell=True)
    stays = changes.let_in(decide.LetIn(anything=False), "second", state)
    assert (stays.quarantine, stays.held_for, stays.fell) == ((for_now, for_good), "second", False)
    assert changes.let_in(decide.LetIn(anything=True), "second", state).quarantine == (for_good,)
    named = decide.LetIn(anything=False, digests=(for_good.digest,))
    assert changes.let_in(named, "second", state) == replace(
        state, quarantine=tuple(one for one in state.quarantine if one != for_good)
    )


def test_at_the_end_nothing_is_left_to_do() -> None:
    state = changes.undone(facts(OLD), True, NOW, record(OLD, **ON_TRIAL, undoing=UNDOING))
    assert (state.undoing, state.trial, state.owed, state.replaced) == (None, None, "", None)
    assert changes.said(record(OLD, **ON_TRIAL)).replaced is None


def test_only_what_the_service_does_better_without_is_to_blame() -> None:
    def after(well: bool, undoing: Undoing, told: str = "reload", **more: Any) -> State:
        state = record(OLD, quarantine=(kept_out(NEW), kept_out(OTHER)), undoing=undoing, **more)
        judged = Judged(OLD, Verdict.WENT_DOWN, told)
        return changes.undone(facts(OLD, judged=judged), well, NOW, state)

    took_down = replace(UNDOING, verdict=Verdict.WENT_DOWN, took_down=True)
    guilty = (kept_out(NEW), kept_out(OTHER))
    assert after(True, UNDOING).quarantine == after(False, took_down).quarantine == guilty
    acquitted = replace(kept_out(NEW), for_now=True, judge=INNOCENT, since=NOW)
    assert after(False, UNDOING).quarantine == (acquitted, kept_out(OTHER))
    # No start has seen the old one either: both may be bad.
    only_reloaded = {OLD.id: "first"}
    assert after(False, UNDOING, "start", untried=only_reloaded).quarantine == guilty
    assert after(False, UNDOING, "reload", untried=only_reloaded).quarantine == (acquitted, kept_out(OTHER))


@pytest.mark.parametrize(
    ("more", "took_down"),
    [
        ({"judged": Judged(NEW, Verdict.WENT_DOWN, "reload")}, True),
        ({"state": {"trial": Trial(NEW.id, verdict=Verdict.GOOD)}}, True),
        ({}, False),  # it was started on it, and failed
    ],
)
def test_what_took_a_running_service_down_is_known(more: dict[str, Any], took_down: bool) -> None:
    known = facts(NEW, **{"state": ON_TRIAL} | more)
    undoing = changes.reject(
        decide.Reject(NEW, Verdict.WENT_DOWN, "why"), known, [], False, known.state
    ).undoing
    assert undoing is not None and undoing.took_down is took_down
    failed = changes.reject(
        decide.Reject(NEW, Verdict.RELOAD_FAILED, "why"), known, [], True, known.state
    ).undoing
    assert failed is not None and not failed.took_down


# --- counted tries ---


class Records:
    """The record of one service; a kill loses nothing of it."""

    def __init__(self) -> None:
        self.kept = record(OLD)

    def change(self, slots: str, change: Any) -> State:
        self.kept = change(self.kept)
        return self.kept


class Killed(BaseException):
    """As if the process ended here."""


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    directory = tmp_path / "web.raw.v"
    directory.mkdir()
    (directory / "web_1+3.raw").touch()
    return directory


@pytest.fixture
def records() -> Records:
    return Records()


def begin(versions: Path, records: Records, renaming: tries.Renaming = tries.unseen) -> str:
    """One attempt by a new process; what the file is called then."""
    (name,) = os.listdir(versions)
    found = Stack((replace(layer("web2"), source=str(versions / name)),))
    known = facts(OLD, wanted=found, state={"counted": records.kept.counted})
    if known.uncounted:
        desired = Desired(cast(Any, None), (), found, OLD)
        begun = changes.count(
            cast(Store, records), desired, known, "web.service", "web.service", renaming, ROOT_ALONE
        )
        assert [os.path.basename(one.source) for one in begun.wanted.layers] == os.listdir(versions)
    return os.listdir(versions)[0]


@contextmanager
def before(old: str, new: str) -> Iterator[None]:
    raise Killed
    yield


@contextmanager
def after(old: str, new: str) -> Iterator[None]:
    yield
    raise Killed


def test_a_try_that_was_not_made_is_counted_once(versions: Path, records: Records) -> None:
    assert begin(versions, records) == "web_1+2-1.raw"
    assert begin(versions, records) == "web_1+2-1.raw"
    records.kept = record(OLD)
    assert begin(versions, records) == "web_1+1-2.raw"


@pytest.mark.parametrize("when", [before, after])
def test_a_kill_at_the_rename_costs_no_try_and_saves_none(
    versions: Path, records: Records, when: tries.Renaming
) -> None:
    with pytest.raises(Killed):
        begin(versions, records, when)
    assert begin(versions, records) == "web_1+2-1.raw"


def test_the_try_of_another_service_does_not_count_for_this_one(versions: Path, records: Records) -> None:
    @contextmanager
    def renamed(old: str, new: str) -> Iterator[None]:
        os.rename(old, new)
        yield

    with pytest.raises(FileNotFoundError):
        begin(versions, records, renamed)
    assert begin(versions, records) == "web_1+1-2.raw"


def test_a_file_that_is_dropped_anew_begins_anew(versions: Path, records: Records) -> None:
    begin(versions, records)
    (versions / "web_1+2-1.raw").rename(versions / "web_1+3.raw")
    assert begin(versions, records) == "web_1+2-1.raw"


def test_what_cannot_be_counted_is_tried_to_be_counted_once(
    versions: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def refuse(old: str, new: str) -> None:
        said.append(new)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("watcher.mounts.syscalls.rename_noreplace", refuse)
    for _ in range(2):
        assert begin(versions, records) == "web_1+3.raw"
    assert len(said) == 1


# --- a stack that only a reload has seen ---


def test_a_stack_that_a_reload_took_well_is_still_to_be_started() -> None:
    by_reload = facts(NEW, state=ON_TRIAL | {"untried": {OLD.id: "zero"}}, judged=GOOD)
    after = changes.good(by_reload, NOW, by_reload.state)
    assert after.untried == {OLD.id: "zero", NEW.id: "first"}


@pytest.mark.parametrize("told", ["restart", ""])
def test_one_that_was_started_well_is_tried(told: str) -> None:
    state = {"untried": {OLD.id: "zero", NEW.id: "first"}}
    started = facts(NEW, state=state, invocation="second", judged=replace(GOOD, told=told))
    assert changes.good(started, NOW, started.state).untried == {OLD.id: "zero"}


def test_a_first_start_that_went_ill_and_stays_is_not_judged_again() -> None:
    started = facts(NEW, state={"untried": {NEW.id: "first"}}, invocation="second")
    kept = changes.keep(started, Verdict.HEALTH_CHECK_FAILED, NOW, started.state)
    assert not replace(started, state=kept).on_trial


def test_the_start_that_failed_on_another_stack_is_not_held_against_the_one_that_is_back() -> None:
    state = {"untried": {OLD.id: "first", NEW.id: "first"}, "quarantine": (kept_out(NEW),)}
    down = {"running": False, "invocation": "", "shown": None, "failed": True, "failed_start": "second"}
    failed = facts(NEW, wanted=OLD, fallback=OLD, state=state, **down)
    back = accept(failed, decide.Accept(OLD))
    assert back.untried[OLD.id] == "second" and not replace(failed, state=back).blame
    again = replace(failed, state=replace(back, undoing=None), failed_start="third")
    assert "first start" in again.blame


def test_its_own_etc_is_never_on_trial_for_its_start() -> None:
    removed = facts(EMPTY, state={"owed": "first"}, judged=Judged(EMPTY, Verdict.GOOD, "reload"))
    assert changes.good(removed, NOW, removed.state).untried == {}


def test_what_is_still_to_be_started_does_not_grow_for_ever() -> None:
    many = {f"{number:016x}": "zero" for number in range(100)}
    by_reload = facts(NEW, state=ON_TRIAL | {"untried": many}, judged=GOOD)
    after = list(changes.good(by_reload, NOW, by_reload.state).untried)
    assert len(after) == 16 and after[-1] == NEW.id
