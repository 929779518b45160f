# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the watcher knows of a service beside its stacks: notes that outlive a kill, and a memory that does not.

A note is a symbolic link, and the target of the link is its text. The kernel makes, replaces and reads a link in one
step each: a reader gets the whole note, the one before it, or none.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from watcher.images import tries
from watcher.model import Stack
from watcher.records import durable
from watcher.resolve.trust import Trust

if TYPE_CHECKING:
    from watcher.mounts.converge import Compared  # `exec` has no use for it

# A note has so many digits of a digest, and so many digests: the target of a link has 4095 bytes.
_DIGITS, _NOTED_MAX = 16, 150

_FAILED = "failed"
_BAD = "bad"


class _Notes:
    """One note for each service, in one directory.

    Args:
        directory: absolute path; made if it is not there.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        durable.make(directory, 0o700)
        self._tidy()

    def _write(self, service: str, text: str) -> None:
        """Write a note, not empty, in place of the one that is there."""
        # A service's name never begins with a dot. `exec` is another process than the daemon.
        temporary = os.path.join(self.directory, f".{service}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(text, temporary)
        os.rename(temporary, self._path(service))

    def _read(self, service: str) -> str | None:
        try:
            return os.readlink(self._path(service))
        except FileNotFoundError:
            return None

    def _remove(self, service: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(service))

    def _tidy(self) -> None:
        """Remove the temporary links of processes that were killed."""
        for name in os.listdir(self.directory):
            pid = name.rpartition(".")[2]
            if name.startswith(".") and not os.path.exists(f"/proc/{pid}"):
                self._remove(name)

    def _path(self, service: str) -> str:
        return os.path.join(self.directory, service)


class Pending(_Notes):
    """Services that are owed a reload: a swap has begun, and they were not told yet.

    The mount table says which stack a service shows, not whether the service has read it. The watcher writes the note
    before the swap and removes it after the reload. If the watcher is killed in between, the next round reloads,
    although the stack is in place. A reboot starts every service anew, so the notes are in the runtime directory.

    Args:
        runtime_directory: absolute path; must exist.
    """

    def __init__(self, runtime_directory: str) -> None:
        super().__init__(os.path.join(runtime_directory, "pending"))

    def owe(self, service: str, invocation: str) -> None:
        """This start of the service is to be told, until `paid()`."""
        self._write(service, invocation or "-")

    def owed(self, service: str, invocation: str) -> bool:
        """Whether this start of the service is still to be told. A later start has read everything anew."""
        return self._read(service) == (invocation or "-")

    def paid(self, service: str) -> None:
        """It was told, or there is nothing to tell."""
        self._remove(service)


@dataclass(frozen=True, slots=True)
class Trial:
    """A stack on trial.

    Attributes:
        stack: its identity.
        was_down: the service had failed before the stack was accepted. So the failure does not speak against the stack.
        bad: it was judged bad, and stays all the same (`Rollback=no`). With `Rollout=rolling` no other service follows.
    """

    stack: str
    was_down: bool = False
    bad: bool = False


class Trials(_Notes):
    """Stacks on trial: accepted, and not judged yet.

    The watcher writes the note before it accepts a stack, and removes it after the outcome: the stack proved good, or
    another one is back in its place. If the watcher or the host is killed in between, the next round knows what is
    still to be judged, and blames no stack that proved good long ago. The notes are in the state directory: a service
    that does not run is judged after its next start, perhaps after the next boot.

    Args:
        state_directory: absolute path; must exist.

    Attributes:
        directory: its entries must be on the disk before the stack is (`after=` of `Store.accept`).
    """

    def __init__(self, state_directory: str) -> None:
        super().__init__(os.path.join(state_directory, "trials"))

    def begin(self, service: str, trial: Trial) -> None:
        """This stack is on trial, until `end()`."""
        flag = _BAD if trial.bad else _FAILED if trial.was_down else ""
        self._write(service, f"{trial.stack or '-'} {flag}")

    def of(self, service: str) -> Trial | None:
        """What is on trial for a service, None if nothing is."""
        text = self._read(service)
        if text is None:
            return None
        stack, _, flag = text.partition(" ")
        return Trial("" if stack == "-" else stack, was_down=flag == _FAILED, bad=flag == _BAD)

    def end(self, service: str) -> None:
        """It was judged."""
        self._remove(service)


class CountedTries(_Notes):
    """Tries that were counted for a stack which was not accepted yet.

    The watcher writes the note before it renames a file that has counters. It removes the note when the stack was
    accepted or its check has failed. If the watcher is killed in between, the next attempt goes on with the same try.

    Args:
        state_directory: absolute path; must exist.
    """

    def __init__(self, state_directory: str) -> None:
        super().__init__(os.path.join(state_directory, "counted"))

    def begin(
        self, service: str, stack: Stack, known: Stack, renaming: tries.Renaming, trust: Trust
    ) -> Stack:
        """`tries.begin()` for what is new in a stack, unless its try was counted already. Blocks, raises as that."""
        noted = dict(one.split(":") for one in (self._read(service) or "").split())
        new = [layer.digest for layer in stack.layers if layer.digest not in known.digests]
        before = _tries_done(stack, new)
        # If the watcher was killed before the rename, the name says less than the note.
        counted = {one for one, done in before.items() if done >= int(noted.get(one[:_DIGITS], done + 1))}
        after = {one: done if one in counted else done + 1 for one, done in before.items()}
        self._note(service, after)
        try:
            begun = tries.begin(stack, counted.union(known.digests), service, renaming, trust)
        except FileNotFoundError:
            self.end(service)  # another service's attempt has renamed the file, and this one was not counted
            raise
        if _tries_done(begun, new) != after:
            self._note(service, _tries_done(begun, new))  # some cannot be counted
        return begun

    def _note(self, service: str, tries_done: Mapping[str, int]) -> None:
        notes = [f"{digest[:_DIGITS]}:{done}" for digest, done in tries_done.items()]
        if notes:
            self._write(service, " ".join(notes[:_NOTED_MAX]))

    def end(self, service: str) -> None:
        """The try was made."""
        self._remove(service)


def _tries_done(stack: Stack, digests: Collection[str]) -> dict[str, int]:
    """How many tries were made of the files of a stack that have counters, by digest."""
    counters = {
        layer.digest: tries.counted(layer.source) for layer in stack.layers if layer.digest in digests
    }
    return {digest: found.done for digest, found in counters.items() if found is not None}


class Next(enum.Enum):
    """How a round goes on after a step."""

    DONE = "nothing left to do"
    LOOK_AGAIN = "another stack is desired now"


@dataclass(frozen=True, slots=True)
class Afterglow:
    """A stack proved good a moment ago. If the service goes down within that moment, the stack is to blame.

    Attributes:
        restarts: how often its manager had started the service again by then (`Service.went_down_since`).
        until: when that moment ends, `trio.current_time()`.
    """

    restarts: int
    until: float
    stack: Stack


@dataclass(slots=True)
class Memory:
    """What the watcher remembers of one service between rounds. After a restart of the watcher it is as new.

    Attributes:
        interests: what is watched for it.
        attempts: rounds in a row that left something to wait for.
        mounted: digests of what it runs on, None while that is not known.
        at_hand: digests of what the last look found and did not refuse. What has to wait is not copied again.
        compared: see `converge()`.
        held: what is kept out of it for the moment: digests (or `STACK` and an identity) with the reason.
        held_for: the start of the service for which `held` holds.
        fell: the service went down with what is kept out. So its next start is systemd's or ours, not an operator's.
        output: what the command printed that refused the last bad stack.
        ran: when a round last saw it running, `time.monotonic()`.
        blameless: of a service that went down, whether a copy was found damaged since it ran; None: not looked at.
    """

    interests: tuple[object, ...] | None = None
    attempts: int = 0
    mounted: frozenset[str] | None = None
    at_hand: frozenset[str] = frozenset()
    afterglow: Afterglow | None = None
    compared: Compared = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    held_for: str = ""
    fell: bool = False
    output: str = ""
    ran: float = 0.0
    blameless: bool | None = None

    def let_in_at_start(self, invocation: str) -> None:
        """If an operator has started the service anew, let it try again what is kept out for the moment.

        Not if systemd or a rollback started it because it went down: each try would be the next outage.
        """
        if invocation and self.held_for != invocation:
            if not self.fell:
                self.held.clear()
            self.held_for, self.fell = invocation, False
