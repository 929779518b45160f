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
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from watcher.model import Event, Verdict

_NOT_UTF8 = re.compile("[\0\ud800-\udfff]")


def utf8(value: str) -> str:
    """`value` as JSON and SQLite can carry it: bytes that are not UTF-8 (surrogates) and NUL become "\\xNN".

    Everything else stays, so that an ordinary path is itself. To compare two names, put both through this.
    """
    return _NOT_UTF8.sub(lambda found: _escaped(ord(found[0])), value)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code else "\\x00"


def to_dict(value: Any, text: Callable[[str], str] = utf8) -> Any:
    """The JSON value of an answer: data classes become objects, tuples arrays, enumerations their values.

    Args:
        text: what becomes of each string. A record that only we read keeps names exactly: `str`.
    """
    if isinstance(value, Mapping):
        return {text(key): to_dict(item, text) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _camel(field.name): to_dict(getattr(value, field.name), text)
            for field in dataclasses.fields(value)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list | tuple):
        return [to_dict(item, text) for item in value]
    return value


T = TypeVar("T")


def from_dict(cls: type[T], data: Any) -> T:
    """The data class `cls` from its JSON object.

    Raises ValueError: `data` is not such an object, or a key without a default is missing.
    """
    result = _read(cls, data)
    assert isinstance(result, cls)
    return result


def _read(kind: Any, data: Any) -> Any:
    if isinstance(kind, types.UnionType):
        inner, _none = typing.get_args(kind)
        return None if data is None else _read(inner, data)
    if typing.get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise ValueError(f"not an array: {data!r}")
        return tuple(_read(typing.get_args(kind)[0], item) for item in data)
    if typing.get_origin(kind) is Mapping:
        if not isinstance(data, dict):
            raise ValueError(f"not an object: {data!r}")
        return {key: _read(typing.get_args(kind)[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, data)
    if issubclass(kind, enum.Enum):
        return kind(data)
    if type(data) is not kind:
        raise ValueError(f"not of type {kind.__name__}: {data!r}")
    return data


_VERDICTS = frozenset(verdict.value for verdict in Verdict)


def _read_object(cls: Any, data: Any) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"not an object: {data!r}")
    if cls is Event and isinstance(data.get("verdict"), str) and data["verdict"] not in _VERDICTS:
        # A newer daemon's. Elsewhere a verdict decides (state.py), and an unknown one is an error.
        data = {**data, "verdict": None}
    given = {
        name: _read(kind, data[_camel(name)]) for name, kind in types_of(cls).items() if _camel(name) in data
    }
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from error


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of the fields of a data class."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("USec" if word == "usec" else word.capitalize() for word in rest)
