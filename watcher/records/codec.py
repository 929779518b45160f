# SPDX-License-Identifier: LGPL-2.1-or-later
"""Data classes as JSON, and back: what the control socket says, and what is kept.

`to_dict()` makes the JSON of any of them: with Varlink's spelling (`swap_usec` becomes `swapUSec`) and with all keys,
`null` where there is no value. `from_dict()` is the way back, and passes over keys and verdicts that a newer program
has added. Standard library only: the command line starts with this.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from watcher.model import Event, Verdict

_Text = Callable[[str], str]

_NOT_UTF8 = re.compile("[\0\ud800-\udfff]")


def utf8(value: str) -> str:
    """`value` as JSON and SQLite can carry it: bytes that are not UTF-8 (surrogates) and NUL become "\\xNN".

    Everything else stays, so that an ordinary path is itself. To compare two names, put both through this.
    """
    if value.isascii() and "\0" not in value:  # which is nearly always
        return value
    return _NOT_UTF8.sub(lambda found: _escaped(ord(found[0])), value)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code else "\\x00"


def to_dict(value: Any, text: _Text = utf8) -> Any:
    """The JSON value of an answer: data classes become objects, tuples arrays, enumerations their values.

    Args:
        text: what becomes of each string. A record that only we read keeps names exactly: `str`.
    """
    return _writer(value.__class__)(value, text)


@functools.cache
def _writer(cls: type) -> Callable[[Any, _Text], Any]:
    """What makes the JSON value of each value of a class."""
    if issubclass(cls, enum.Enum):
        return lambda value, text: value.value
    if issubclass(cls, str):
        return lambda value, text: text(value)
    if issubclass(cls, list | tuple):
        return lambda value, text: [_writer(item.__class__)(item, text) for item in value]
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        return functools.partial(_write_object, [_camel(name) for name in names], _values(names))
    if issubclass(cls, Mapping):
        return lambda value, text: {text(key): to_dict(item, text) for key, item in value.items()}
    return lambda value, text: value


def _values(names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """What gives the values of these fields."""
    if len(names) < 2:  # then attrgetter() gives no tuple
        return lambda value: [getattr(value, name) for name in names]
    return operator.attrgetter(*names)


def _write_object(
    keys: Sequence[str], values: Callable[[Any], Sequence[Any]], value: Any, text: _Text
) -> dict[str, Any]:
    found = {}
    for key, item in zip(keys, values(value), strict=True):
        kind = item.__class__
        if kind is str:  # these are nearly all, of thousands
            found[key] = text(item)
        elif kind is int or item is None:
            found[key] = item
        else:
            found[key] = _writer(kind)(item, text)
    return found


T = TypeVar("T")


def from_dict(cls: type[T], data: Any) -> T:
    """The data class `cls` from its JSON object.

    Raises ValueError: `data` is not such an object, or a key without a default is missing.
    """
    kind: Any = cls
    result = _reader(kind)(data)
    assert isinstance(result, cls)
    return result


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of a type of its JSON value. It raises ValueError."""
    if isinstance(kind, types.UnionType):
        some = _reader(typing.get_args(kind)[0])
        return lambda data: None if data is None else some(data)
    if typing.get_origin(kind) is tuple:
        item = _reader(typing.get_args(kind)[0])
        return lambda data: tuple(item(one) for one in _checked(list, data, "an array"))
    if typing.get_origin(kind) is Mapping:
        value = _reader(typing.get_args(kind)[1])
        return lambda data: {key: value(one) for key, one in _checked(dict, data, "an object").items()}
    if dataclasses.is_dataclass(kind):
        return functools.partial(_read_object, kind)
    if issubclass(kind, enum.Enum):
        named: Callable[[Any], Any] = kind
        return named
    return lambda data: _checked(kind, data, f"of type {kind.__name__}")


def _checked(kind: type, data: Any, what: str) -> Any:
    if type(data) is not kind:
        raise ValueError(f"not {what}: {data!r}")
    return data


_VERDICTS = frozenset(verdict.value for verdict in Verdict)


def _read_object(cls: Any, data: Any) -> Any:
    _checked(dict, data, "an object")
    if cls is Event and isinstance(data.get("verdict"), str) and data["verdict"] not in _VERDICTS:
        # A newer daemon's. Elsewhere a verdict decides (state.py), and an unknown one is an error.
        data = {**data, "verdict": None}
    given = {name: read(data[camel]) for name, camel, read in _readers(cls) if camel in data}
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from error


@functools.cache
def _readers(cls: type) -> tuple[tuple[str, str, Callable[[Any], Any]], ...]:
    """The fields of a data class, with their names in JSON and what reads them."""
    return tuple((name, _camel(name), _reader(kind)) for name, kind in types_of(cls).items())


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of the fields of a data class."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("USec" if word == "usec" else word.capitalize() for word in rest)
