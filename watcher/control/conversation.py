# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes Varlink connections from a listening socket, within the bounds of peers.py; what is said on them is others'.

A connection is a task of its own. One that breaks the protocol is closed, with one debug line.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import varlink

from watcher.control import peers
from watcher.control.peers import Peer, Quota
from watcher.control.transport import Connection, Request
from watcher.records import journal

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


async def converse(
    listener: trio.SocketListener, answer_calls: Callable[[Connection], Awaitable[None]], what: str
) -> None:
    """Take connections until cancelled.

    Args:
        answer_calls: talks with one client to its end. Raises ValueError: it broke the protocol.
        what: the socket's name in the log.
    """
    quota = Quota(peers.CONNECTIONS, peers.CONNECTIONS_PER_USER)

    async def one(stream: trio.SocketStream, peer: Peer) -> None:
        with trio.CancelScope() as scope:
            async with stream:
                with quota.take(peer) as free:
                    try:
                        if not free:
                            raise ValueError("too many connections")
                        await answer_calls(Connection(stream, peer, scope))
                    except ValueError as error:
                        journal.log.debug(f"{what}: connection closed: {error}", uid=peer.uid, pid=peer.pid)

    exhausted = False
    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                if not exhausted:
                    journal.log.warning(f"{what}: no connection can be taken now: {error.strerror}")
                exhausted = True
                # The clients wait in the kernel's backlog (listen(2)).
                await trio.sleep(0.1)
            else:
                exhausted = False
                peer = Peer.of(stream)
                nursery.start_soon(one, stream, peer)
                if not peer.privileged:
                    # Or a client that connects without end keeps the event loop busy, refused or not.
                    await trio.sleep(1 / peers.CONNECTS_PER_SEC)


def checked(service: varlink.Service, request: Request) -> tuple[str, dict[str, Any]]:
    """The method's name and its parameters, optional ones without a value left out. Raises varlink.VarlinkError."""
    name_of_interface, _, name = request.method.rpartition(".")
    interface = service.interfaces.get(name_of_interface)
    if interface is None:
        raise varlink.InterfaceNotFound(name_of_interface)
    fields = interface.get_method(name).in_type.fields
    for parameter in request.parameters:
        if parameter not in fields:
            raise varlink.InvalidParameter(parameter)
    found = {}
    for parameter, kind in fields.items():
        try:
            value = interface.filter_params(parameter, kind, False, request.parameters.get(parameter), None)
        except (ValueError, OverflowError):
            raise varlink.InvalidParameter(parameter)
        if value is not None:
            found[parameter] = value
    return name, found
