# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client connection to a D-Bus message bus, on jeepney's wire format and trio.

jeepney's own router puts signals into bounded channels, and silently drops what does not fit; a daemon-reload with a
thousand units fills any bound. Here each signal goes straight to one plain function, which only notes what to look at
again: nothing queues, so nothing is dropped. wire.py reads what arrives.

If the bus goes away, every call that waits for a reply raises `BusLost`, and so does the block of `connect()`. The
caller has to connect again: only he knows what he has to look at again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import trio
from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageFlag, MessageType, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus
from jeepney.io.trio import DBusConnection

from watcher.managers.systemd.wire import BadMessage, Incoming, Received

BUS: Final = "org.freedesktop.DBus"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

DISCONNECTED: Final = frozenset(
    f"{BUS}.Error.{name}" for name in ("NoReply", "ServiceUnknown", "NameHasNoOwner", "Disconnected")
)
"""Errors that mean: the other side is not on the bus, or has just left it."""

FAILED: Final = f"{BUS}.Error.Failed"

# Destination, path and interface of the methods of the bus itself.
_BUS_ITSELF: Final = (BUS, "/org/freedesktop/DBus", BUS)

_RECEIVE: Final = 64 * 1024  # bytes at a time

CALL_SEC: Final = 30.0
"""How long a reply may take, in seconds, unless the call says otherwise."""


class Error(Exception):
    """The other side answered a call with an error.

    Attributes:
        name: "org.freedesktop.systemd1.NoSuchUnit" and the like.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name


def require(what: str, found: str, wanted: str | None) -> None:
    """Raises Error if what was found has another signature than the wanted one (None: any)."""
    if wanted is not None and found != wanted:
        raise Error(FAILED, f"{what}: {found or 'nothing'} came for an answer, and not {wanted or 'nothing'}")


class BusLost(Exception):
    """There is no connection to the bus, or no longer."""


def is_lost(error: Exception) -> bool:
    """Whether an error means that the other side cannot be reached; else it has answered."""
    return isinstance(error, BusLost) or (isinstance(error, Error) and error.name in DISCONNECTED)


class Bus:
    """An open connection; made by `connect()`."""

    def __init__(self, connection: DBusConnection, on_signal: Callable[[Received], None]) -> None:
        self._connection = connection
        self._on_signal = on_signal
        self._pending: dict[int, _Reply] = {}
        # Names on the bus whose owners' signals are heard, and the owner of each ("": it has none).
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
        """Call a method and wait for its reply. Never starts a service by bus activation.

        Args:
            answer: signature that the reply must have; None: any.
            timeout: seconds; `math.inf` waits for as long as the connection lasts.

        Raises:
            Error: the reply is an error, does not have the signature `answer`, or did not come in time
                ("org.freedesktop.DBus.Error.NoReply").
            BusLost: the connection ended before the reply.
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
        """Hear the signals of the connection that owns a name; raises as `call()` does.

        Match rules only say what the bus is to send. Any user may also send a signal straight to any connection (the
        system bus allows it by default). So signals are dropped unless an owner of such a name or the bus itself has
        sent them; the bus writes the sender into each message.
        """
        self._heard.add(name)
        rule = MatchRule(type="signal", sender=BUS, interface=BUS, member="NameOwnerChanged")
        rule.add_arg_condition(0, name)
        await self.add_match(rule)
        try:
            (owner,) = await self.call(*_BUS_ITSELF, "GetNameOwner", "s", name, answer="s")
        except Error:
            owner = ""
        # A signal that came meanwhile is newer.
        self._owners.setdefault(name, owner)

    async def add_match(self, rule: MatchRule) -> None:
        """Have the bus send all messages that match; raises as `call()` does."""
        await self.call(*_BUS_ITSELF, "AddMatch", "s", rule.serialise())

    async def remove_match(self, rule: MatchRule) -> None:
        """Undo one `add_match()` of the same rule; raises as `call()` does."""
        await self.call(*_BUS_ITSELF, "RemoveMatch", "s", rule.serialise())

    async def _exchange(self, message: Message, timeout: float) -> Received | None:
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
        """Hand out what arrives until the connection ends.

        Raises:
            BusLost: always.
        """
        try:
            with _broken_is_lost():
                incoming = Incoming()
                while data := await self._connection.socket.recv(_RECEIVE):
                    for message in incoming.feed(data):
                        self._dispatch(message)
                raise trio.EndOfChannel("it hung up")
        except BusLost as lost:
            self._lost = lost
            raise
        finally:
            self._lost = self._lost or BusLost("the connection to the bus was closed")
            for reply in self._pending.values():
                reply.event.set()

    def _dispatch(self, message: Received) -> None:
        kind = message.header.message_type
        if kind is MessageType.signal:
            if self._is_heard(message):
                self._on_signal(message)
        elif kind in (MessageType.method_return, MessageType.error):
            reply = self._pending.get(message.header.fields.get(HeaderFields.reply_serial, 0))
            if reply:
                _ = message.body  # if it is none, the connection is given up here
                reply.message = message
                reply.event.set()

    def _is_heard(self, message: Received) -> bool:
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
        self.message: Received | None = None


@asynccontextmanager
async def connect(on_signal: Callable[[Received], None], address: str = "SYSTEM") -> AsyncIterator[Bus]:
    """A connection to a bus, for as long as the block lasts.

    Args:
        on_signal: called for every signal that a match rule asked for; must neither block nor raise.
        address: "SYSTEM" (`$DBUS_SYSTEM_BUS_ADDRESS` counts), "SESSION", or an address as D-Bus writes it.

    Raises:
        BusLost: no bus answers at the address.
        BaseExceptionGroup: with a BusLost in it: the bus went away later, and the block was cancelled.
    """
    connection = await _open(address)
    async with connection, trio.open_nursery() as nursery:
        bus = Bus(connection, on_signal)
        nursery.start_soon(bus._receive)
        await bus.call(*_BUS_ITSELF, "Hello")
        yield bus
        nursery.cancel_scope.cancel()


async def _open(address: str) -> DBusConnection:
    # jeepney's own open_dbus_connection() leaves the socket open when it fails.
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
    """Say who we are; the bus checks that with the kernel (SO_PEERCRED)."""
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
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel, OSError) as error:
        raise BusLost(f"the bus went away: {error}") from error
    except BadMessage as error:
        raise BusLost(f"the bus sent what is no message: {error}") from error
