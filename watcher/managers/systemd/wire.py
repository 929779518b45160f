# SPDX-License-Identifier: LGPL-2.1-or-later
"""D-Bus messages as they arrive, read only as far as somebody asks for them.

systemd tells some fifty properties of a unit with each change of its state, twice for each reload, and of all that the
tracker wants one number. jeepney reads a message whole: that was a third of what the daemon's main thread did while 50
services reloaded. Here the header is read at once, and the body when it is first asked for.

Rules: D-Bus Specification, "Marshaling" and "Message Format". What is unusual is left to jeepney.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from jeepney import HeaderFields, MessageType
from jeepney.low_level import Endianness, Header, calc_msg_size, parse_signature

NO_MESSAGE: Final = (ValueError, TypeError, LookupError, AttributeError, AssertionError, struct.error)
"""What jeepney raises for bytes that are no message."""

_HEADER: Final = 16  # bytes up to the fields, which tell the length of the message
_FIELDS: Final = {int(field): field for field in HeaderFields}
_ORDER: Final = {ord("l"): ("<", Endianness.little), ord("B"): (">", Endianness.big)}
_STRINGS, _SIGNATURE, _NUMBER = b"so", ord("g"), ord("u")
_SIZES: Final = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}
_EIGHT: Final = frozenset("xtd({")  # types that begin at a multiple of 8


class BadMessage(Exception):
    """These bytes are no message."""


class Received:
    """A message that came: it has the attributes of jeepney's `Message`.

    Args:
        data: all of its bytes.

    Raises:
        BadMessage
    """

    header: Header
    _begin: int  # of the body

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            self.header, self._begin = _usual_header(data) or Header.from_buffer(data)
        except NO_MESSAGE as error:
            raise BadMessage(repr(error)) from error

    @cached_property
    def body(self) -> tuple[Any, ...]:
        """Its arguments. Raises BadMessage."""
        signature = self.header.fields.get(HeaderFields.signature, "")
        try:
            kind = parse_signature(list(f"({signature})"))
            return tuple(kind.parse_data(self._data, self._begin, self.header.endianness)[0])
        except (*NO_MESSAGE, RecursionError) as error:
            raise BadMessage(repr(error)) from error

    def changed_number(self, name: str) -> int | None:
        """The value of a property of type u, by a signal PropertiesChanged; None: it does not say, or not easily."""
        order = self.header.endianness.struct_code()
        try:
            return _number_in(self._data, self._begin, order, name.encode())
        except (struct.error, LookupError, ValueError):
            return None


class Incoming:
    """The bytes that come over a connection, cut into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Received]:
        """The messages that are complete with these further bytes. Raises BadMessage."""
        self._data += data
        while len(self._data) >= _HEADER:
            try:
                size = calc_msg_size(self._data[:_HEADER])
            except NO_MESSAGE as error:
                raise BadMessage(repr(error)) from error
            if len(self._data) < size:
                return
            message = bytes(self._data[:size])
            del self._data[:size]
            yield Received(message)


def _usual_header(data: bytes) -> tuple[Header, int] | None:
    """A header with known fields of their usual types, and where the body begins; None: jeepney may know."""
    if data[0] not in _ORDER:
        return None
    code, endianness = _ORDER[data[0]]
    number = struct.Struct(f"{code}I").unpack_from
    _, kind, flags, version, length, serial, size = struct.unpack_from(f"{code}BBBBIII", data)
    fields: dict[HeaderFields, str | int] = {}
    at, end = _HEADER, _HEADER + size
    while at < end:
        at += -at % 8
        field = _FIELDS.get(data[at])
        if field is None or data[at + 1] != 1 or data[at + 3]:
            return None
        found, at = data[at + 2], at + 4
        if found in _STRINGS:
            begin, at = at + 4, at + 5 + number(data, at)[0]
            fields[field] = data[begin : at - 1].decode()
        elif found == _SIGNATURE:
            begin, at = at + 1, at + 2 + data[at]
            fields[field] = data[begin : at - 1].decode()
        elif found == _NUMBER:
            fields[field] = number(data, at)[0]
            at += 4
        else:
            return None
    if at != end or MessageType(kind) is MessageType.method_call:
        return None
    return Header(endianness, kind, flags, version, length, serial, fields), end + -end % 8


def _number_in(data: bytes, at: int, order: str, name: bytes) -> int | None:
    """The value of a property of type u in a body "sa{sv}as" that begins at `at`; None: not found."""
    number = struct.Struct(f"{order}I").unpack_from
    at += 5 + number(data, at)[0]
    at += -at % 4
    end = at + 4 + number(data, at)[0]
    at += 4
    while at + -at % 8 < end:
        at += -at % 8
        begin, at = at + 4, at + 5 + number(data, at)[0]
        key = data[begin : at - 1]
        begin, at = at + 1, at + 2 + data[at]
        kind = data[begin : at - 1].decode()
        if key == name:
            return int(number(data, at + -at % 4)[0]) if kind == "u" else None
        at = _after(data, at, number, kind)
    return None


def _after(data: bytes, at: int, number: Any, kind: str) -> int:
    """Where a value of a type ends that begins, but for its alignment, at `at`.

    Raises:
        LookupError: such a value takes longer to pass over.
    """
    first = kind[0]
    if first in "so":
        at += -at % 4
        return int(at + 5 + number(data, at)[0])
    if first == "a":
        at += -at % 4
        size = number(data, at)[0]
        at += 4
        if kind[1] in _EIGHT:
            at += -at % 8
        return int(at + size)
    if first == "g":
        return at + 2 + data[at]
    return at + -at % _SIZES[first] + _SIZES[first]
