# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface (records/interface.py, records/traces_interface.py), the data classes and the errors
(records/errors.py) agree, and survive JSON (records/codec.py)."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import pytest
from varlink import scanner

from watcher.model import Event, Kind, Layer, Outcome, Remark, Setting, Trust, Verdict
from watcher.records import codec, schema, traces
from watcher.records.schema import (
    CandidateStatus,
    Drift,
    EntryStatus,
    PlannedChange,
    Quarantined,
    ServiceStatus,
    from_dict,
    to_dict,
    utf8,
)
from watcher.records.state import Trial

TRACES: list[type[Any]] = [
    getattr(traces, name)
    for name in "TracedLayer Piece TracedPath TracedFile Origin Compared Side Difference Diff".split()
]
ANSWERS: list[type[Any]] = [
    Layer,
    Trust,
    Event,
    Quarantined,
    Remark,
    Setting,
    ServiceStatus,
    PlannedChange,
    EntryStatus,
    CandidateStatus,
    Drift,
    *TRACES,
]

LAYER = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw")
EVENT = Event("web.service", Outcome.ROLLED_BACK, "said", when=5, swap_usec=7, layers=(LAYER, LAYER))
JUDGED = dataclasses.replace(EVENT, verdict=Verdict.HEALTH_CHECK_FAILED)
STATUS = ServiceStatus("web.service", "standalone", "running", pid=9, layers=(LAYER,), last=EVENT)


def varlink_type(kind: Any) -> str:
    """What the interface has to say for a Python type."""
    if isinstance(kind, types.UnionType):
        return "?" + varlink_type(typing.get_args(kind)[0])
    if typing.get_origin(kind) is tuple:
        return "[]" + varlink_type(typing.get_args(kind)[0])
    if kind in ANSWERS:
        return str(kind.__name__)
    return {int: "int", bool: "bool"}.get(kind, "string")


def described(kind: Any) -> str:
    """The same of the parsed interface."""
    if isinstance(kind, scanner._Maybe):
        return "?" + described(kind.element_type)
    if isinstance(kind, scanner._Array):
        return "[]" + described(kind.element_type)
    if isinstance(kind, scanner._CustomType):
        return str(kind.name)
    return {"bool": "bool", "int": "int", "str": "string"}[type(kind).__name__]


@pytest.mark.parametrize("cls", ANSWERS)
def test_the_interface_describes_each_answer_field_by_field(cls: type[Any]) -> None:
    interface = scanner.Interface(schema.DESCRIPTION)
    fields = {name: described(kind) for name, kind in interface.members[cls.__name__].type.fields.items()}
    hints = typing.get_type_hints(cls)
    wanted = {codec._camel(field.name): varlink_type(hints[field.name]) for field in dataclasses.fields(cls)}
    assert fields == wanted


@pytest.mark.parametrize(("field", "values"), [("outcome", Outcome), ("verdict", Verdict)])
def test_the_interface_lists_all_outcomes_and_verdicts(field: str, values: type[enum.Enum]) -> None:
    comment = schema.DESCRIPTION.partition("type Event (")[0].rpartition("\n\n")[2]
    said = re.split(r"^# (?=[a-z, ]+: )", comment, flags=re.MULTILINE)
    (sentence,) = [text for text in said if text.startswith(f"{field}:")]
    assert re.findall('"(.*?)"', sentence) == [value.value for value in values]


def test_the_interface_describes_each_error() -> None:
    interface = scanner.Interface(schema.DESCRIPTION)
    described = {
        f"{schema.INTERFACE}.{name}": list(member.type.fields)
        for name, member in interface.members.items()
        if isinstance(member, scanner._Error)
    }
    raised = [
        schema.ServiceNotFound("a"),
        schema.NoSuchStack("a", "b"),
        schema.NotPermitted("m"),
        schema.MembersOnly("m", "g"),
        schema.TooManyCalls(1000, 8),
        schema.Failed("r"),
    ]
    assert {error.name: list(error.parameters()) for error in raised} == described
    assert set(schema.ERRORS) == set(described)


@pytest.mark.parametrize(
    "answer",
    [
        STATUS,
        EVENT,
        JUDGED,
        ServiceStatus("web.service", "systemd", "stopped"),
        PlannedChange("web.service", True, wanted_layers=(LAYER,), remarks=(Remark("debug", "/srv", "no"),)),
    ],
)
def test_an_answer_survives_the_way_through_json(answer: Any) -> None:
    assert from_dict(type(answer), json.loads(json.dumps(to_dict(answer)))) == answer


def test_every_key_is_there_in_varlinks_spelling() -> None:
    assert to_dict(Event("web.service", Outcome.NEEDS_RESTART, "said", when=5)) == {
        "service": "web.service",
        "outcome": "needs-restart",
        "message": "said",
        "when": 5,
        "stack": "",
        "previous": "",
        "image": "",
        "version": "",
        "digest": "",
        "source": "",
        "reason": "",
        "output": "",
        "swapUSec": None,
        "totalUSec": None,
        "layers": [],
        "verdict": None,
    }


def test_keys_of_a_newer_daemon_are_passed_over() -> None:
    assert from_dict(Layer, {**to_dict(LAYER), "colour": "red"}) == LAYER


def test_a_verdict_of_a_newer_daemon_is_passed_over() -> None:
    newer = {**to_dict(JUDGED), "verdict": "out-of-tune"}
    assert from_dict(Event, newer) == EVENT
    assert from_dict(ServiceStatus, {**to_dict(STATUS), "last": newer}) == STATUS


def test_an_older_daemon_has_no_verdicts() -> None:
    older = to_dict(EVENT)
    del older["verdict"]
    assert from_dict(Event, older) == EVENT


@pytest.mark.parametrize("verdict", [5, True, [], {}])
def test_a_verdict_is_text(verdict: object) -> None:
    with pytest.raises(ValueError):
        from_dict(Event, {**to_dict(EVENT), "verdict": verdict})


def test_where_a_verdict_decides_an_unknown_one_is_an_error() -> None:
    with pytest.raises(ValueError):
        from_dict(Trial, {"stack": "a", "verdict": "out-of-tune"})


@pytest.mark.parametrize(
    "data", [None, [], {}, {**to_dict(LAYER), "kind": "pipe"}, {**to_dict(LAYER), "name": 1}]
)
def test_what_is_not_an_answer_is_an_error(data: Any) -> None:
    with pytest.raises(ValueError):
        from_dict(Layer, data)


def test_text_is_what_json_can_carry_and_otherwise_unchanged() -> None:
    assert utf8("/srv/ä b\\c\n.raw") == "/srv/ä b\\c\n.raw"
    assert utf8(os.fsdecode(b"/srv/\xff\xfe.raw")) == "/srv/\\xff\\xfe.raw"
    assert utf8("a\0b\ud800") == "a\\x00b\\ud800"


@dataclasses.dataclass(frozen=True)
class Everything:
    names: Mapping[str, str]
    counts: Mapping[str, int]
    layers: Mapping[str, Layer]
    kind: Kind | None = None
    flag: bool = False


def test_a_record_of_our_own_keeps_names_exactly() -> None:
    odd = os.fsdecode(b"\xff")
    made = Everything({odd: odd}, {odd: 1}, {odd: LAYER}, Kind.IMAGE, flag=True)
    data = json.loads(json.dumps(to_dict(made, text=str)))
    assert data["names"] == {odd: odd}
    assert from_dict(Everything, data) == made
    assert to_dict(made)["names"] == {"\\xff": "\\xff"}


@pytest.mark.parametrize(
    "wrong", [{"names": []}, {"names": {"a": 1}}, {"counts": {"a": True}}, {"layers": {"a": {}}}, {"flag": 1}]
)
def test_a_mapping_has_values_of_its_type(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        from_dict(Everything, {"names": {}, "counts": {}, "layers": {}, **wrong})
