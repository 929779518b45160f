# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record comes back as it was, each value of its type; anything else is Damaged, in one line."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from watcher.model import Entry, Kind, Layer, Protection, Stack, Trust, Verdict
from watcher.records.state import (
    Accepted,
    Covers,
    Damaged,
    Drifted,
    Quarantine,
    State,
    Trial,
    Undoing,
    decoded,
    encoded,
)

ODD = os.fsdecode(b"/srv/\xff\n.raw")
TRUST = Trust(Protection.SIGNED, "CN=a", "f" * 64, "e" * 64, "its hash tree", "said")
STACK = Stack((Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, ODD, TRUST),))
FULL = State(
    accepted=Accepted(STACK, (Entry("web.raw", ODD, Kind.IMAGE, True, True, "x"),), 5, {ODD: "/srv"}),
    trial=Trial(STACK.id, was_down=True, verdict=Verdict.GOOD, judged=7, restarts=2, other="9"),
    checked=STACK.id,
    replaced="b" * 16,
    owed="9f",
    undoing=Undoing(STACK, Verdict.RELOAD_FAILED, "reload failed", "no", took_down=True),
    quarantine=(Quarantine("b" * 64, "bad", 3, ODD, for_now=True, judge="Check 1", since=2),),
    held_for="9f",
    fell=True,
    pin="",
    untried={STACK.id: "a"},
    left=("c" * 16,),
    counted={"a" * 64: 2},
    sysexts=(ODD,),
    covers=Covers(5, {ODD: "file:0"}, (Drifted(ODD, "web 1.4", "changed", "file:1"),)),
)


@pytest.mark.parametrize("state", [State(), FULL, State(trial=Trial(""), pin="a")])
def test_it_comes_back_as_it_was(state: State) -> None:
    content = encoded(state)
    assert decoded(content, "/a") == state
    content.decode("ascii")


def test_every_field_is_in_the_test_above() -> None:
    """Else a field that does not come back would not be seen."""
    given = json.loads(encoded(FULL))
    missing = json.loads(encoded(State()))
    assert [key for key in given if key != "version" and given[key] == missing[key]] == []


def test_a_layer_of_an_earlier_program_has_no_proof() -> None:
    record = json.loads(encoded(FULL))
    del record["accepted"]["stack"]["layers"][0]["trust"]
    assert decoded(json.dumps(record).encode(), "/a").accepted.stack.layers[0].trust == Trust()


def test_a_key_of_a_later_program_is_passed_over() -> None:
    record = json.loads(encoded(FULL))
    record["accepted"]["colour"] = record["colour"] = "red"
    assert decoded(json.dumps(record).encode(), "/a") == FULL


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accepted", None),
        ("accepted", {"when": True}),
        ("accepted", {"mounted": {"a": 1}}),
        ("accepted", {"stack": {"layers": [{}]}}),
        ("trial", {"stack": "a", "verdict": "excellent"}),
        ("trial", {"stack": "a", "verdict": []}),
        ("trial", {"stack": "a", "wasDown": 1}),
        ("undoing", {}),
        ("quarantine", {}),
        ("quarantine", [{"digest": "a"}]),
        ("heldFor", 1),
        ("pin", 1),
        ("counted", {"a": "1"}),
        ("counted", {"a": True}),
        ("counted", []),
        ("sysexts", [1]),
        ("version", 0),
        ("version", "1"),
        ("version", True),
        ("version", None),
    ],
)
def test_a_value_of_another_type(key: str, value: Any) -> None:
    record = {**json.loads(encoded(FULL)), key: value}
    with pytest.raises(Damaged, match=r"^/a/\\n: the record cannot be read: ") as raised:
        decoded(json.dumps(record).encode(), "/a/\n")
    assert raised.value.suffix == "damaged" and str(raised.value).isprintable()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 1e999}']
)
def test_what_is_no_record(content: bytes) -> None:
    with pytest.raises(Damaged, match=r"^/a: the record cannot be read: .{1,300}$"):
        decoded(content, "/a")


def test_a_later_version() -> None:
    with pytest.raises(Damaged, match=r"^/a: written by a newer confext-watcher \(version 2") as raised:
        decoded(b'{"version": 2, "accepted": "of another shape"}', "/a")
    assert raised.value.suffix == "newer"
