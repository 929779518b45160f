# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface description, the data classes and the errors agree, and all of them survive JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from typing import Any

import pytest
from varlink import scanner

from watcher.model import Event, Kind, Layer, Outcome, Remark
from watcher.records import schema
from watcher.records.schema import PlannedChange, Quarantined, ServiceStatus, from_dict, to_dict, utf8

ANSWERS: list[type[Any]] = [Layer, Event, Quarantined, Remark, ServiceStatus, PlannedChange]

LAYER = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw")
EVENT = Event("web.service", Outcome.ROLLED_BACK, "said", when=5, swap_usec=7, layers=(LAYER, LAYER))
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
    wanted = {schema._camel(field.name): varlink_type(hints[field.name]) for field in dataclasses.fields(cls)}
    assert fields == wanted


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
    }


def test_keys_of_a_newer_daemon_are_passed_over() -> None:
    assert from_dict(Layer, {**to_dict(LAYER), "colour": "red"}) == LAYER


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
