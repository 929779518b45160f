# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of the control socket, what that user may be told, and how much of us he may take.

What counts are the credentials that the kernel recorded when the client connected (unix(7)). Root and the user that
the watcher runs as are *privileged*: they may change things. Every other user has a bound: so many connections, so many
calls that wait, and one call at a time that makes work. So a user is only in his own way. After each such call he has
to pause for longer than it took. So a user who asks without end takes a small part of a processor, and no drop waits
for him.
"""

from __future__ import annotations

import collections
import contextlib
import grp
import os
import pwd
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

GROUP = "confext-watcher"
"""Its members are told reasons, paths and outputs; they may change no more than others."""

CONNECTIONS = 128
"""For all but the privileged, who have as many of their own: root is never locked out."""
CONNECTIONS_PER_USER = 16
CONNECTS_PER_SEC = 1000
"""New ones of all but the privileged. Root's wait behind those in the kernel's backlog (listen(2)), 128 at most."""
WAITS = 64
"""Calls of `Wait` by all but the privileged, who have as many of their own."""
WAITS_PER_USER = 8
UNTAKEN = 4
"""Answers in memory that all but the privileged have not taken yet, who may have as many of their own."""
AT_ONCE = 4
"""Calls that make work at the same time, each another user's, none of the privileged."""
PAUSE = 4
"""After a call, the user's next one waits for this many times what it took."""
PAUSE_MAX_SEC = 1.0

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
_GROUPS_MAX = 256
_NO_LOGIN = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected; pid 0: not of our PID namespace.

    Attributes:
        groups: the primary and the supplementary ones, by number.
        all_groups: False: there are more of them, which are not known.
    """

    pid: int
    uid: int
    groups: frozenset[int] = frozenset()
    all_groups: bool = True

    @staticmethod
    def of(stream: trio.SocketStream) -> Peer:
        ask = stream.socket.getsockopt
        pid, uid, gid = struct.unpack(
            "iII", ask(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        )
        try:
            supplementary = ask(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * struct.calcsize("I"))
        except OSError:  # ERANGE, more groups than there is room for: the user counts as in none of them
            return Peer(pid, uid, frozenset({gid}), False)
        groups = (group for (group,) in struct.iter_unpack("I", supplementary))
        return Peer(pid, uid, frozenset((gid, *groups)))

    @property
    def privileged(self) -> bool:
        """May change things: root and the daemon's own user."""
        return self.uid in (0, os.geteuid())


class Readers:
    """Who may be told everything: the privileged, and the members of GROUP.

    A thread asks for the number of the group, because a directory service may not answer. Until it does, only the
    privileged are readers.
    """

    def __init__(self) -> None:
        self.gid: int | None = None
        self._asked = trio.Event()

    def include(self, peer: Peer) -> bool:
        return peer.privileged or self.gid in peer.groups

    def look_up(self) -> None:
        """Have the group looked up again: the administrator may have made or removed it."""
        self._asked.set()

    async def follow(self) -> None:
        """Looks the group up, now and when asked to."""
        while True:
            self._asked = trio.Event()
            self.gid = await trio.to_thread.run_sync(_gid, abandon_on_cancel=True)
            await self._asked.wait()


def _gid() -> int | None:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except (KeyError, OSError):
        return None


class Quota:
    """How much of something all users may have at a time, and each of them.

    Args:
        of_all: for all but the privileged, who have as much of their own.
        per_user: of this, for one user.
    """

    def __init__(self, of_all: int, per_user: int) -> None:
        self._of_all = of_all
        self.per_user = per_user
        self._privileged: collections.Counter[int] = collections.Counter()
        self._others: collections.Counter[int] = collections.Counter()

    @contextlib.contextmanager
    def take(self, peer: Peer) -> Iterator[bool]:
        """Take one for this peer, for the length of the block; False: his quota is used up."""
        taken = self._privileged if peer.privileged else self._others
        free = taken.total() < self._of_all and (peer.privileged or taken[peer.uid] < self.per_user)
        taken[peer.uid] += int(free)
        try:
            yield free
        finally:
            taken[peer.uid] -= int(free)
            if not taken[peer.uid]:
                del taken[peer.uid]


class Untaken:
    """Answers in memory that their clients have not taken yet. Nobody waits for these clients: with one too many, the
    connection ends that has been at it for longest.
    """

    def __init__(self) -> None:
        self._connections: list[trio.CancelScope] = []

    @contextlib.contextmanager
    def one(self, connection: trio.CancelScope) -> Iterator[None]:
        """An answer, for the length of the block; cancelling `connection` ends it."""
        if len(self._connections) == UNTAKEN:
            self._connections.pop(0).cancel()
        self._connections.append(connection)
        try:
            yield
        finally:
            if connection in self._connections:
                self._connections.remove(connection)


@dataclass(slots=True)
class _User:
    """One user's calls that make work.

    Attributes:
        one: held by the call whose turn it is.
        calls: that one, and those that wait for their turn.
        free_at: when the next one may begin.
    """

    one: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(1))
    calls: int = 0
    free_at: float = 0.0


class Turn(contextlib.ExitStack):
    """A call's turn: closed early by one that only waits from now on.

    Attributes:
        machine: the part that is taken of `AT_ONCE`: closed early by a call that has a bound of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.machine = contextlib.ExitStack()


class Turns:
    """Calls that make work: one at a time for each user without privileges, in the order in which they came."""

    def __init__(self) -> None:
        self._users: dict[int, _User] = {}
        self._at_once = trio.Semaphore(AT_ONCE)

    @contextlib.asynccontextmanager
    async def one_for(self, peer: Peer) -> AsyncIterator[Turn]:
        """Waits for the peer's turn, and holds it for the block."""
        with Turn() as turn:
            if peer.privileged:
                # Or calls without a reply (`oneway`) keep the event loop to themselves.
                await trio.lowlevel.checkpoint()
                yield turn
                return
            now = trio.current_time()
            self._users = {uid: user for uid, user in self._users.items() if user.calls or user.free_at > now}
            user = self._users.setdefault(peer.uid, _User())
            user.calls += 1
            try:
                await user.one.acquire()
                turn.callback(user.one.release)
                await trio.sleep_until(user.free_at)
                await self._at_once.acquire()
                turn.machine.callback(self._at_once.release)
                turn.callback(self._end, user, trio.current_time())
                turn.callback(turn.machine.close)
                yield turn
            finally:
                user.calls -= 1

    def _end(self, user: _User, began: float) -> None:
        now = trio.current_time()
        user.free_at = now + min(PAUSE * (now - began), PAUSE_MAX_SEC)


def who(peer: Peer) -> str:
    """Who has connected, for people: "root", "anna (uid 1000)"; root by the login that it came from. Blocks."""
    name = _user(peer.uid)
    try:
        login = int(Path(f"/proc/{peer.pid}/loginuid").read_text())
    except (OSError, ValueError):
        return name
    return name if login in (peer.uid, _NO_LOGIN) else f"{name}, logged in as {_user(login)}"


def _user(uid: int) -> str:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
    return name if uid == 0 else f"{name} (uid {uid})"
