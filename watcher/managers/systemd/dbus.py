# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client connection to a D-Bus message bus, on jeepney's wire format and trio.

jeepney has a router of its own for this. It puts signals into bounded channels and drops what does not fit, in
silence; a daemon-reload with a thousand units fills any bound. Here a signal goes straight to one plain function,
which does no more than to note what to look at again: nothing queues, so nothing can be dropped.

A bus that goes away takes the connection with it: everything that waits for a reply gets `BusLost`, and so does whoever
holds the connection open. To connect again is the caller's business, because only he knows what to look at again.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import trio
from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageFlag, MessageType, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus
from jeepney.io.trio import DBusConnection

BUS: Final = "org.freedesktop.DBus"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

DISCONNECTED: Final = frozenset(
    f"{BUS}.Error.{name}" for name in ("NoReply", "ServiceUnknown", "NameHasNoOwner", "Disconnected")
)
"""Errors that say that the other side is not on the bus, or has just left it."""

FAILED: Final = f"{BUS}.Error.Failed"

# What jeepney raises for bytes that are no message.
_NO_MESSAGE: Final = (ValueError, TypeError, LookupError, AttributeError, struct.error)

CALL_SEC: Final = 30.0
"""How long a reply may take, in seconds, unless the call says otherwise."""


class Error(Exception):
    """The other side answered a call with an error.

    Attributes:
        name: "org.freedesktop.systemd1.NoSuchUnit" and the like.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text or name}")
        self.name = name


def require(what: str, found: str, wanted: str | None) -> None:
    """Raises Error: what was found has another signature than the wanted one, if there is one."""
    if wanted is not None and found != wanted:
        raise Error(FAILED, f"{what}: {found or 'nothing'} came for an answer, and not {wanted or 'nothing'}")


class BusLost(Exception):
    """There is no connection to the bus, or no longer."""


class Bus:
    """An open connection; made by `connect()`."""

    def __init__(self, connection: DBusConnection, on_signal: Callable[[Message], None]) -> None:
        self._connection = connection
        self._on_signal = on_signal
        self._pending: dict[int, _Reply] = {}
        # The names whose owners' signals are heard, and who owns them: "" for nobody.
        self._heard: set[str] = set()
        self._owners: dict[str, str] = {}
        self._lost: BusLost | None = None

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *arguments: Any,
        answer: str | None = None,
        timeout: float = CALL_SEC,
    ) -> tuple[Any, ...]:
        """Call a method and wait for its reply; never starts a service by bus activation.

        Args:
            answer: signature that the reply must have; None: any.
            timeout: seconds; `math.inf` waits for as long as the connection lasts.

        Raises:
            Error: the reply is an error or another than `answer`, or did not come in time
                ("org.freedesktop.DBus.Error.NoReply").
            Lost: the connection ended first.
        """
        address = DBusAddress(path, destination, interface)
        message = new_method_call(address, member, signature or None, arguments)
        message.header.flags |= MessageFlag.no_auto_start
        reply = await self._exchange(message, timeout)
        if reply is None:
            raise Error(f"{BUS}.Error.NoReply", f"{member}: no reply within {timeout:g} s")
        if reply.header.message_type is MessageType.error:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise Error(reply.header.fields.get(HeaderFields.error_name, FAILED), text)
        require(member, reply.header.fields.get(HeaderFields.signature, ""), answer)
        return tuple(reply.body)

    async def get(
        self, destination: str, path: str, interface: str, name: str, kind: str | None = None
    ) -> Any:
        """The value of a property; raises as `call()` does.

        Args:
            kind: signature that it must have; None: any.
        """
        ((signature, value),) = await self.call(
            destination, path, PROPERTIES, "Get", "ss", interface, name, answer="v"
        )
        require(name, signature, kind)
        return value

    async def hear(self, name: str) -> None:
        """Have signals of whoever owns a name handed on; raises as `call()` does.

        Match rules only say what the bus is to send. Besides that any user may send a signal straight to any connection
        (the system bus allows it by default): so signals of others than these owners and the bus itself are dropped.
        The sender in a message is the bus's own word, and one of its connections' names.
        """
        self._heard.add(name)
        rule = MatchRule(type="signal", sender=BUS, interface=BUS, member="NameOwnerChanged")
        rule.add_arg_condition(0, name)
        await self.add_match(rule)
        try:
            (owner,) = await self.call(
                BUS, "/org/freedesktop/DBus", BUS, "GetNameOwner", "s", name, answer="s"
            )
        except Error:
            owner = ""  # it has none now
        # What a signal has said meanwhile is newer.
        self._owners.setdefault(name, owner)

    async def add_match(self, rule: MatchRule) -> None:
        """Have the bus send what matches; raises as `call()` does."""
        await self.call(BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", rule.serialise())

    async def remove_match(self, rule: MatchRule) -> None:
        """Take one `add_match()` of the same rule back; raises as `call()` does."""
        await self.call(BUS, "/org/freedesktop/DBus", BUS, "RemoveMatch", "s", rule.serialise())

    async def _exchange(self, message: Message, timeout: float) -> Message | None:
        if self._lost:
            raise self._lost
        serial = next(self._connection.outgoing_serial)
        reply = self._pending[serial] = _Reply()
        try:
            with trio.move_on_after(timeout), _broken_is_lost():
                await self._connection.send(message, serial=serial)
                await reply.event.wait()
        finally:
            del self._pending[serial]
        if reply.message is None and self._lost:
            raise self._lost
        return reply.message

    async def _receive(self) -> None:
        """Hand out what arrives until nothing does any more.

        Raises:
            Lost: always.
        """
        try:
            with _broken_is_lost():
                while True:
                    try:
                        message = await self._connection.receive()
                    except _NO_MESSAGE as error:
                        raise BusLost(f"the bus sent what is no message: {error!r}") from error
                    self._dispatch(message)
        except BusLost as lost:
            self._lost = lost
            raise
        finally:
            self._lost = self._lost or BusLost("the connection to the bus was closed")
            for reply in self._pending.values():
                reply.event.set()

    def _dispatch(self, message: Message) -> None:
        kind = message.header.message_type
        if kind is MessageType.signal:
            if self._is_heard(message):
                self._on_signal(message)
        elif kind in (MessageType.method_return, MessageType.error):
            reply = self._pending.get(message.header.fields.get(HeaderFields.reply_serial, 0))
            if reply:
                reply.message = message
                reply.event.set()

    def _is_heard(self, message: Message) -> bool:
        sender = message.header.fields.get(HeaderFields.sender)
        if sender != BUS:
            return sender in self._owners.values()
        if message.header.fields.get(HeaderFields.member) == "NameOwnerChanged":
            name, _, owner = message.body
            if name in self._heard:
                self._owners[name] = owner
        return True


class _Reply:
    def __init__(self) -> None:
        self.event = trio.Event()
        self.message: Message | None = None


@asynccontextmanager
async def connect(on_signal: Callable[[Message], None], address: str = "SYSTEM") -> AsyncIterator[Bus]:
    """A connection to a bus, for as long as the block lasts.

    Args:
        on_signal: called for every signal that a match rule asked for; must neither block nor raise.
        address: "SYSTEM" (`$DBUS_SYSTEM_BUS_ADDRESS` counts), "SESSION", or an address as D-Bus writes it.

    Raises:
        Lost: nobody answers at the address.
        BaseExceptionGroup: with a Lost in it: the bus went away later, which cancels the block.
    """
    connection = await _open(address)
    async with connection, trio.open_nursery() as nursery:
        bus = Bus(connection, on_signal)
        nursery.start_soon(bus._receive)
        await bus.call(BUS, "/org/freedesktop/DBus", BUS, "Hello")
        yield bus
        nursery.cancel_scope.cancel()


async def _open(address: str) -> DBusConnection:
    # Not jeepney's own open_dbus_connection(): it leaves the socket open where it fails.
    try:
        stream = await trio.open_unix_socket(get_bus(address))
        try:
            with trio.fail_after(CALL_SEC), _broken_is_lost():
                await _authenticate(stream)
        except BaseException:
            stream.socket.close()
            raise
    except (OSError, AuthenticationError, trio.TooSlowError) as error:
        raise BusLost(f"no connection to the {address} bus: {error}") from error
    return DBusConnection(stream.socket)


async def _authenticate(stream: trio.SocketStream) -> None:
    """Say who we are; the bus asks the kernel whether that is so (SO_PEERCRED)."""
    await stream.send_all(b"\0")
    authenticator = Authenticator(inc_null_byte=False)
    for request in authenticator:
        await stream.send_all(request)
        answer = await stream.receive_some()
        if not answer:
            raise trio.EndOfChannel("it hung up during authentication")
        authenticator.feed(answer)
    await stream.send_all(BEGIN)


@contextmanager
def _broken_is_lost() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel) as error:
        raise BusLost(f"the bus went away: {error}") from error
