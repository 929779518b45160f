# SPDX-License-Identifier: LGPL-2.1-or-later
"""What arrives from the bus is read as jeepney reads it, whole or in pieces, and only what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    new_error,
    new_method_call,
    new_method_return,
    new_signal,
)
from jeepney.low_level import Endianness

from watcher.managers.systemd import dbus, systemd1
from watcher.managers.systemd.systemd1 import unit_path
from watcher.managers.systemd.wire import BadMessage, Incoming, Received

WEB = DBusAddress(unit_path("web.service"), systemd1.NAME, dbus.PROPERTIES)
CALL = new_method_call(WEB, "Get", "ss", ("a.b", "C"))
CALL.header.serial = 7
COMMANDS = ("a(sasbttttuii)", [("/bin/x", ["x", "y"], False, 1, 2, 3, 4, 5, 6, 7)])


def changed(values: dict[str, Any], invalidated: Sequence[str] = ("ExecStart",)) -> Message:
    return new_signal(WEB, "PropertiesChanged", "sa{sv}as", (systemd1.SERVICE, values, list(invalidated)))


def sent(message: Message, endianness: Endianness = Endianness.little) -> bytes:
    """As the bus passes it on."""
    message.header.endianness = endianness
    message.header.fields[HeaderFields.sender] = ":1.17"
    return bytes(message.serialise(serial=9))


def received(data: bytes) -> Received:
    (message,) = Incoming().feed(data)
    return message


ALL = {
    "signal": changed({"MainPID": ("u", 1)}),
    "no arguments": new_signal(WEB, "Reloading"),
    "reply": new_method_return(CALL, "v", (("a(sasbttttuii)", COMMANDS[1]),)),
    "empty reply": new_method_return(CALL),
    "error": new_error(CALL, "org.freedesktop.systemd1.NoSuchUnit", "s", ("Ünit",)),
    "descriptors": new_signal(WEB, "X", "s", ("",)),
    "call": CALL,
}


@pytest.mark.parametrize("endianness", list(Endianness))
@pytest.mark.parametrize("name", ALL)
def test_a_message_is_what_jeepney_makes_of_it(name: str, endianness: Endianness) -> None:
    data = sent(ALL[name], endianness)
    ours, theirs = received(data), Message.from_buffer(data)
    assert ours.body == theirs.body
    assert vars(ours.header) == vars(theirs.header)


@pytest.mark.parametrize("size", [1, 7, 16, 4096])
def test_messages_come_in_pieces_of_any_size(size: int) -> None:
    data = b"".join(sent(message) for message in ALL.values())
    incoming = Incoming()
    found = [m for at in range(0, len(data), size) for m in incoming.feed(data[at : at + size])]
    assert [message.body for message in found] == [message.body for message in ALL.values()]


@pytest.mark.parametrize("endianness", list(Endianness))
@pytest.mark.parametrize(
    "before",
    [
        {},
        {"StatusText": ("s", "MainPID"), "Slice": ("o", "/a")},
        {"A": ("y", 1), "B": ("n", 1), "C": ("q", 1), "D": ("b", True), "E": ("i", -1)},
        {"A": ("x", 1), "B": ("y", 2), "C": ("t", 3), "D": ("y", 4), "E": ("d", 0.5), "F": ("g", "as")},
        {
            "A": ("ay", b"12345"),
            "B": ("as", ["MainPID"]),
            "ExecStart": COMMANDS,
            "C": ("at", []),
            "D": ("at", [1]),
        },
    ],
    ids=lambda before: " ".join(kind for kind, _ in before.values()),
)
def test_a_property_is_found_wherever_it_stands(before: dict[str, Any], endianness: Endianness) -> None:
    message = changed({**before, "MainPID": ("u", 4711), "After": ("s", "")})
    assert received(sent(message, endianness)).changed_number("MainPID") == 4711


@pytest.mark.parametrize(
    "message",
    [
        changed({"ControlPID": ("u", 1)}),
        changed({}, ["MainPID"]),
        changed({"MainPID": ("s", "1")}),
        changed({"Job": ("(uo)", (1, "/")), "MainPID": ("u", 1)}),
        new_signal(WEB, "PropertiesChanged"),
        new_signal(WEB, "PropertiesChanged", "s", ("a",)),
    ],
)
def test_what_a_signal_does_not_say_is_not_made_up(message: Message) -> None:
    assert received(sent(message)).changed_number("MainPID") is None


def test_what_is_no_message_is_said_to_be_none() -> None:
    data = bytearray(sent(changed({"MainPID": ("u", 1)})))
    with pytest.raises(BadMessage):
        received(b"x" + data[1:])
    # A length that leads out of the message: of a field of the header, then of an argument.
    data[20] = 255
    with pytest.raises(BadMessage):
        received(data)
    bad = bytearray(sent(new_signal(WEB, "X", "s", ("a",))))
    bad[-5] = 255
    message = received(bytes(bad))
    with pytest.raises(BadMessage):
        _ = message.body


def test_a_number_is_not_looked_for_outside_of_the_message() -> None:
    data = sent(changed({"StatusText": ("s", "x" * 40), "MainPID": ("u", 1)}))
    at = data.index(b"x" * 40) - 4
    assert received(data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]).changed_number("MainPID") is None
