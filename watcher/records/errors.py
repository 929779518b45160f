# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a call fails, with the words for a person; and how the command line ends. schema.py describes the interface."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from watcher.records.codec import utf8
from watcher.text import nearest

INTERFACE = "io.confext.Watcher"


class ExitStatus(enum.IntEnum):
    """How the command line ends; the epilog of `--help` says the same."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    TIMED_OUT = 4
    UNSUPPORTED = 5
    TOO_MANY_CALLS = 6
    INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


class CallError(Exception):
    """A call that failed: `str()` is one line for a person."""

    exit_code = ExitStatus.FAILED


@dataclass(eq=False)
class ErrorReply(CallError):
    """An error of the interface: the backend raises it, the server sends it, the client raises it again."""

    @property
    def name(self) -> str:
        return f"{INTERFACE}.{type(self).__name__}"

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(eq=False)
class ServiceNotFound(ErrorReply):
    """`nearest`: the service that was probably meant, "" if none is called like it, or by an older daemon."""

    service: str
    nearest: str = ""

    @classmethod
    def among(cls, asked: str, names: Iterable[str]) -> ServiceNotFound:
        """With the nearest of these names."""
        return cls(asked, nearest(asked, map(utf8, names)))

    def __str__(self) -> str:
        meant = (
            f"did you mean {utf8(self.nearest)}?"
            if self.nearest
            else "`confext-watcher status` lists those that do"
        )
        return f"no service {utf8(self.service)} takes part; {meant}"


@dataclass(eq=False)
class NoSuchStack(ErrorReply):
    """An empty `stack`: there is none to go back to."""

    service: str
    stack: str

    def __str__(self) -> str:
        what = f"has no stack {utf8(self.stack)}" if self.stack else "has no stack before the present one"
        return f"{utf8(self.service)} {what}; its history lists those it had"


@dataclass(eq=False)
class NotPermitted(ErrorReply):
    method: str

    def __str__(self) -> str:
        return f"{utf8(self.method)} is for root and the watcher's own user only"


@dataclass(eq=False)
class MembersOnly(ErrorReply):
    method: str
    group: str

    def __str__(self) -> str:
        return (
            f"only root may, and members of the group {utf8(self.group)}: use sudo, or join it by"
            f" `sudo usermod -aG {utf8(self.group)} YOU` and log in anew"
        )


@dataclass(eq=False)
class TooManyCalls(ErrorReply):
    uid: int
    limit: int
    exit_code = ExitStatus.TOO_MANY_CALLS

    def __str__(self) -> str:
        return (
            f"too many calls of uid {self.uid} wait already ({self.limit} may); try again when one has ended"
        )


@dataclass(eq=False)
class Failed(ErrorReply):
    """An empty `reason`: this client is not told reasons."""

    reason: str

    def __str__(self) -> str:
        return utf8(self.reason) or "it did not work; the watcher's log says why"


ERRORS = {f"{INTERFACE}.{error.__name__}": error for error in ErrorReply.__subclasses__()}
