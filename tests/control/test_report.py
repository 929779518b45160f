# SPDX-License-Identifier: LGPL-2.1-or-later
"""A report of `plan --debug` gives back what the look has found, and a test of it (tests/support/from_report.py).

Over a real socket, with a real service: tests/scenarios/test_debug.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from support import CHECKOUT, from_report
from watcher.control.report import report
from watcher.model import Entry, Kind, Layer, Protection, Stack, Trust, Verdict
from watcher.records.schema import to_dict
from watcher.records.state import Accepted, Covers, Drifted, Quarantine, State, Trial, Undoing
from watcher.rounds import decide
from watcher.rounds.decide import Done, Reject, Step, Swap
from watcher.rounds.facts import Facts, Judged

ODD = os.fsdecode(b"/srv/\xff\n\x1b\x9b'\"\\ \xc3\xa4.raw")
TRUST = Trust(Protection.SIGNED, "CN=a", "f" * 9, "e" * 9, "its hash tree", "said")
LAYER = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, ODD, TRUST)
STACK = Stack((LAYER, dataclasses.replace(LAYER, slot="tree", kind=Kind.DIRECTORY)))
ENTRY = Entry("web.raw", ODD, Kind.IMAGE, optional=True, declared=True, options="x")
STATE = State(
    accepted=Accepted(STACK, (ENTRY,), 5, {ODD: "/srv"}),
    trial=Trial(STACK.id, was_down=True, verdict=Verdict.GOOD, judged=7, restarts=2, other="9"),
    checked=STACK.id,
    owed="9f",
    replaced="",
    undoing=Undoing(STACK, Verdict.RELOAD_FAILED, "reload failed", f"no\n{ODD}\n" * 9),
    quarantine=(Quarantine("b" * 64, "bad", 3, ODD, for_now=True),),
    held_for="9f",
    fell=True,
    pin="",
    left=("c" * 16,),
    untried={"a" * 16: "9f"},
    counted={"a" * 64: 2},
    sysexts=(ODD,),
    covers=Covers(5, {ODD: "file:0"}, (Drifted(ODD, "web 1.4", "changed", "file:1"),)),
)
FULL = Facts(
    now=1_764_547_200_000_000,
    state=STATE,
    first=True,
    running=True,
    starting=True,
    failed=True,
    failed_start="second",
    restarts=3,
    headless=True,
    invocation="9f",
    template=True,
    explained=False,
    out_of_reach="it is in the host's mount namespace",
    blameless=True,
    excused="systemd puts it down to a missing user",
    has_check=True,
    rollback=False,
    rolling=True,
    wanted=STACK,
    fallback=Stack((LAYER,)),
    pinned=Stack((LAYER,)),
    damaged=(STACK.id,),
    worn=True,
    again=("b" * 64,),
    entries=(ENTRY, ENTRY),
    mounted={ODD: "/srv"},
    busy=True,
    waits="it waits for its turn (Rollout=rolling)",
    no_shadow="its unit is masked",
    unstartable="systemd cannot start the service on it: exit status 226 is systemd's own",
    nothing_new="systemd.confext=no is on the kernel command line",
    shown="",
    judged=Judged(STACK, Verdict.RELOAD_FAILED, "reload", "it failed", f"no\n{ODD}\n", usec=9),
)
BARE = Facts(now=5, state=State(), running=False, wanted=Stack(), fallback=Stack())
STEPS: dict[str, Step] = {
    "Done": Done("it waits for its turn"),
    "LetIn": decide.LetIn(anything=True),
    "Check": decide.Check(STACK),
    "Accept": decide.Accept(STACK, new=True),
    "Reject": Reject(STACK, Verdict.CHECK_FAILED, "no", ODD),
}


def evaluated(code: str) -> Any:
    """The value of the code of a table's row, by the names that a test imports."""
    names = {
        name: globals()[name]
        for name in ("Accepted", "Covers", "Drifted", "Entry", "Facts", "Judged", "Kind", "Layer")
    }
    names |= {
        name: globals()[name]
        for name in ("Protection", "Quarantine", "Stack", "State", "Trial", "Trust", "Undoing", "Verdict")
    }
    return eval(code, names | vars(decide) | {"pytest": pytest})


@pytest.mark.parametrize("facts", [FULL, BARE], ids=["full", "bare"])
@pytest.mark.parametrize("step", typing.get_args(Step), ids=lambda step: step.__name__)
def test_facts_and_step_come_back_as_they_were(facts: Facts, step: Any) -> None:
    taken = STEPS[step.__name__] if dataclasses.fields(step) else step()
    text = report("web.service", facts, taken)
    assert text.isascii() and all(line.isprintable() for line in text.splitlines())
    found, came_to = from_report.from_report(text)
    assert (found, came_to) == (facts, taken)
    assert found.judged is None or (facts.judged and found.judged.usec == facts.judged.usec)


def test_every_field_is_in_the_test_above() -> None:
    """Else a field that does not come back would not be seen."""

    for full, bare in ((FULL, BARE), (FULL.state, BARE.state)):
        given, missing = to_dict(full), to_dict(bare)
        assert [key for key in given if given[key] == missing[key]] == []


def test_a_report_names_the_program_and_the_service() -> None:
    content = json.loads(report("web.service", BARE, Swap()))
    done = subprocess.run(
        [sys.executable, "-m", "watcher", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    assert content["program"] == done.stdout.strip()
    assert content["service"] == "web.service"
    assert content["step"] == {"Swap": {}}


def test_it_is_found_in_what_the_command_prints_and_in_what_people_paste() -> None:
    text = report("web.service", FULL, Swap())
    answer = {"changes": [{"service": "web.service", "report": text}], "redacted": False}
    for printed in (
        f"web.service: no change\n  /srv/{{}}: {{ refused\n{text}\n",
        f"It does this:\n```\n{text}\n```\nand should not.\n",
        json.dumps(answer, indent=2),
    ):
        assert from_report.from_report(printed) == (FULL, Swap())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no JSON object in it"),
        ("web.service: no change\n", "there is no JSON object in it"),
        ("{", "Expecting"),
        ("{}", "not a report: without facts, program, service, step"),
        (json.dumps({"changes": [{"report": None}]}), "not a report"),
        (report("a", BARE, Swap()).replace("Swap", "Dance"), "there is no such step: Dance"),
        (report("a", BARE, Swap()).replace('"running"', '"runs"'), "not a Facts"),
    ],
)
def test_what_is_no_report(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_report.from_report(text)


@pytest.mark.parametrize("facts", [FULL, BARE], ids=["full", "bare"])
@pytest.mark.parametrize("step", [STEPS["Reject"], Swap()], ids=["Reject", "Swap"])
def test_a_row_for_the_table_of_tests(facts: Facts, step: Step, tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text(f"web.service: no change\n{report('web.service', facts, step)}\n")
    done = subprocess.run(
        [sys.executable, "-m", "support.from_report", path],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": "tests"},
    )
    assert done.stdout.isascii()
    (row,) = evaluated(f"[{done.stdout}]")
    assert row.values == (facts, step) and row.id == "web.service"
    assert all(len(line) <= 110 or "output=" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [((), 2, "usage: "), (("/no/such",), 1, "No such file"), (("/dev/null",), 1, "no JSON")],
)
def test_the_command_says_what_is_wrong(
    words: tuple[str, ...], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert from_report.main(list(words)) == status
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err
