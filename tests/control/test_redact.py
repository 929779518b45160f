# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is public of each answer; see test_strangers.py for what strangers get over a real socket."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from varlink import scanner

from watcher.control import redact
from watcher.model import Event, Layer, Outcome, Remark, Setting, Trust, Verdict
from watcher.records import schema
from watcher.records.schema import (
    Answer,
    CandidateStatus,
    Drift,
    EntryStatus,
    PlannedChange,
    Quarantined,
    ServiceStatus,
    to_dict,
)

ANSWERS: list[type[Any]] = [
    Layer,
    Trust,
    Event,
    Quarantined,
    Remark,
    Setting,
    ServiceStatus,
    PlannedChange,
    Answer,
    EntryStatus,
    CandidateStatus,
]
PRIVATE = {
    Layer: {"source"},
    Trust: {"signer", "fingerprint", "root_hash", "how", "remark"},
    Event: {"message", "source", "reason", "output"},
    Quarantined: {"reason", "source"},
    Remark: {"level", "path", "text"},
    Setting: {"key", "value", "source"},
    ServiceStatus: {"settings", "not_allowed", "newer", "entries", "remarks", "drifted"},
    EntryStatus: {field.name for field in dataclasses.fields(EntryStatus)},
    CandidateStatus: {field.name for field in dataclasses.fields(CandidateStatus)},
    PlannedChange: {"remarks", "report", "check"},
    Answer: {"kind", "text", "command"},
    Drift: {field.name for field in dataclasses.fields(Drift)},
}


def filled(kind: Any, name: str = "") -> Any:
    """A value of a type in which each string names the field that it is in."""
    if isinstance(kind, types.UnionType):
        return filled(typing.get_args(kind)[0], name)
    if typing.get_origin(kind) is tuple:
        return (filled(typing.get_args(kind)[0], name),)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{field: filled(hint, f"{kind.__name__}.{field}") for field, hint in hints.items()})
    if issubclass(kind, enum.Enum):
        return next(iter(kind))
    return {int: 7, bool: True, str: name}[kind]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("cls", ANSWERS)
def test_strangers_get_what_is_declared_public_and_nothing_else(cls: type[Any]) -> None:
    told = set(strings(to_dict(redact.redacted(filled(cls)))))
    private = {f"{one.__name__}.{field}" for one, fields in PRIVATE.items() for field in fields}
    assert not told & private
    assert set(strings(to_dict(filled(cls)))) - told <= private
    # And all of it is still what the interface says.
    assert schema.from_dict(cls, to_dict(redact.redacted(filled(cls))))


@pytest.mark.parametrize("cls", ANSWERS)
def test_a_field_is_private_until_it_is_declared_public(cls: type[Any]) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields - redact.PUBLIC.get(cls, frozenset()) == PRIVATE[cls] - {"message"}

    @dataclasses.dataclass(frozen=True)
    class Newer(cls):  # type: ignore[misc]
        news: str = ""
        more: int | None = None

    newer = Newer(**{name: getattr(filled(cls), name) for name in fields}, news="secret", more=5)
    redact.PUBLIC[Newer] = redact.PUBLIC.get(cls, frozenset())
    try:
        told = redact.redacted(newer)
    finally:
        del redact.PUBLIC[Newer]
    assert (told.news, told.more) == ("", None)


def test_of_a_type_that_nobody_declared_nothing_is_told() -> None:
    @dataclasses.dataclass(frozen=True)
    class New:
        text: str
        number: int
        flag: bool
        items: tuple[str, ...]

    assert redact.redacted(New("secret", 5, True, ("secret",))) == New("", 0, False, ())


def test_a_result_that_nobody_declared_is_told_to_nobody() -> None:
    with pytest.raises(ValueError, match="secrets"):
        redact.redacted_results({"services": [], "secrets": []})
    interface = scanner.Interface(schema.DESCRIPTION)
    reading = [interface.members[name] for name in ("Status", "History", "Plan", "Wait")]
    assert {field for method in reading for field in method.out_type.fields} == redact.PUBLIC_RESULTS


def test_of_errors_strangers_get_back_what_they_asked() -> None:
    assert redact.redacted_error(schema.Failed("/secret")) == {"reason": ""}
    assert redact.redacted_error(schema.ServiceNotFound("a")) == {"service": "a", "nearest": ""}
    assert {*redact.PUBLIC_ERRORS, schema.Failed} == set(schema.ERRORS.values())


@pytest.mark.parametrize(
    ("image", "version", "said"),
    [
        ("web", "1.4", "web.service: web 1.4 rolled-back"),
        ("web", "", "web.service: web rolled-back"),
        ("", "", "web.service: rolled-back"),
        ("a\nb", "\x1b", "web.service: a\\nb \\x1b rolled-back"),
    ],
)
def test_the_message_for_strangers_is_a_sentence(image: str, version: str, said: str) -> None:
    event = Event("web.service", Outcome.ROLLED_BACK, "api_token=", when=5, image=image, version=version)
    assert redact.redacted(event).message == said


@pytest.mark.parametrize(
    ("outcome", "verdict", "said"),
    [
        (Outcome.APPLIED, Verdict.GOOD, "web.service: web 1.4 applied"),
        (Outcome.REFUSED, Verdict.CHECK_FAILED, "web.service: web 1.4 refused (check-failed)"),
        (Outcome.FAILED, Verdict.RELOAD_FAILED, "web.service: web 1.4 failed (reload-failed)"),
    ],
)
def test_strangers_are_told_the_verdict(outcome: Outcome, verdict: Verdict, said: str) -> None:
    event = Event("web.service", outcome, "", 5, image="web", version="1.4", reason="no", verdict=verdict)
    told = redact.redacted(event)
    assert (told.verdict, told.message, told.reason) == (verdict, said, "")
