# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the control socket says and `--json` prints: one schema.

Three things must agree: the interface description that `varlinkctl introspect` shows (interface.py), the data classes
of the answers, here, and the errors (errors.py). codec.py makes the JSON of any of them, and reads it. Standard library
only: the command line starts with this.

A new version may add fields and types. It never takes one away: a reader may rely on all that is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from watcher.model import Event, Layer, Remark, Setting
from watcher.records.codec import T as T
from watcher.records.codec import from_dict as from_dict
from watcher.records.codec import to_dict as to_dict
from watcher.records.codec import types_of as types_of
from watcher.records.codec import utf8 as utf8
from watcher.records.errors import ERRORS as ERRORS
from watcher.records.errors import INTERFACE as INTERFACE
from watcher.records.errors import CallError as CallError
from watcher.records.errors import ErrorReply as ErrorReply
from watcher.records.errors import ExitStatus as ExitStatus
from watcher.records.errors import Failed as Failed
from watcher.records.errors import MembersOnly as MembersOnly
from watcher.records.errors import NoSuchStack as NoSuchStack
from watcher.records.errors import NotPermitted as NotPermitted
from watcher.records.errors import ServiceNotFound as ServiceNotFound
from watcher.records.errors import TooManyCalls as TooManyCalls
from watcher.records.interface import DESCRIPTION as DESCRIPTION

SOCKET = INTERFACE
"""Name of the socket in the runtime directory: a Varlink service's entry point is called by its interface."""

MESSAGE_MAX = 16 * 1024 * 1024
"""Bytes of one reply; sd-varlink takes no longer ones (VARLINK_BUFFER_MAX)."""

# DESCRIPTION says what each field means, and in which unit.


@dataclass(frozen=True, slots=True)
class Which:
    """Outcomes that are asked for: those to which all of this applies.

    Attributes:
        outcomes: values of `Outcome`; (): any.
        since: microseconds since the epoch; 0: from the beginning.
        image: name of an image, with or without its version and `.raw`, or how its digest begins (8 characters at
            least); "": any.
    """

    outcomes: tuple[str, ...] = ()
    since: int = 0
    image: str = ""


ALL_OUTCOMES = Which()


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Content that a service must not get again."""

    service: str
    digest: str
    reason: str
    when: int
    source: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is so now of an image that somebody waits for (`rounds/answer.py`)."""

    kind: str
    status: int
    text: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Waited:
    """A reply of Wait."""

    event: Event
    answer: Answer


@dataclass(frozen=True, slots=True)
class CandidateStatus:
    """One file or tree that lies there, and what becomes of it."""

    path: str
    version: str
    digest: str
    kind: str
    reason: str = ""
    until: str = ""
    command: str = ""
    tries_left: int | None = None
    tries_done: int | None = None


@dataclass(frozen=True, slots=True)
class EntryStatus:
    """An entry with all its candidates, best first."""

    slot: str
    path: str
    kind: str
    declared: bool
    candidates: tuple[CandidateStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """A file of the host that a file of an image covers, and that has changed since the stack was accepted.

    Attributes:
        image: the layer that covers it, for people.
        change: "changed", "came" or "went".
    """

    path: str
    image: str
    change: str


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A service as it is now."""

    service: str
    manager: str
    state: str
    pid: int | None = None
    stack: str = ""
    accepted: str = ""
    layers: tuple[Layer, ...] = ()
    since: int | None = None
    last: Event | None = None
    pinned: str | None = None
    quarantined: tuple[Quarantined, ...] = ()
    settings: tuple[Setting, ...] = ()
    on_trial: bool = False
    not_allowed: tuple[Remark, ...] = ()
    newer: tuple[CandidateStatus, ...] = ()
    step: str = ""
    step_since: int | None = None
    entries: tuple[EntryStatus, ...] = ()
    remarks: tuple[Remark, ...] = ()
    drifted: tuple[Drift, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """What a look now would change for a service."""

    service: str
    changes: bool
    stack: str = ""
    wanted: str = ""
    layers: tuple[Layer, ...] = ()
    wanted_layers: tuple[Layer, ...] = ()
    reload: str = ""
    remarks: tuple[Remark, ...] = ()
    report: str | None = None
    check: str | None = None
