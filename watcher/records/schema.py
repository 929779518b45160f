# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the control socket says and `--json` prints: one schema.

Three things that must agree stand side by side here: the interface description that `varlinkctl introspect` shows, the
data classes of the answers, and the errors. `to_dict()` makes the JSON of any of them: with Varlink's spelling
(`swap_usec` becomes `swapUSec`) and with all keys, `null` where there is no value. `from_dict()` is the way back, and
passes over keys that a newer daemon has added. Standard library only: the command line starts with this.

A new version may add fields and types. It never takes one away: a reader may rely on all that is here.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from watcher.model import Event, Layer, Remark

INTERFACE = "io.confext.Watcher"
SOCKET = INTERFACE
"""Name of the socket in the runtime directory: a Varlink service's entry point is called by its interface."""

MESSAGE_MAX = 16 * 1024 * 1024
"""Bytes of one reply; sd-varlink takes no longer ones (VARLINK_BUFFER_MAX)."""

DESCRIPTION = """\
# Services whose /etc is kept at the newest good configuration extension (confext) images.
# Reading calls are open to everybody, changing calls (Rollback, Forget, Reload) to root and to the
# user that the watcher runs as. All times are microseconds since the epoch, all durations microseconds.
#
# Reasons, paths and outputs are for root, the watcher's own user and the members of the group confext-watcher:
# what a command has printed may be a password, and which paths there are is not for everybody. Others get
# `redacted: true`, and of these fields the empty value: source, reason, output; remarks; and a message that
# only says the outcome. To Wait for an image by its path is for them to wait for it by its file name.
interface io.confext.Watcher

# One admitted image or directory tree in a stack.
# slot: its name under units/SERVICE/ in the state directory.
# digest: SHA-256 of its content.
# kind: "image" or "directory".
# source: the path that it was dropped at.
type Layer (
  slot: string,
  name: string,
  version: string,
  digest: string,
  kind: string,
  source: string
)

# One outcome.
# outcome: "applied", "unchanged", "refused", "incomplete", "failed", "rolled-back" or "needs-restart".
# message: a sentence for people.
# stack, previous: identities of the stacks after and before.
# output: what the check or the reload printed; History and Wait have it.
type Event (
  service: string,
  outcome: string,
  message: string,
  when: int,
  stack: string,
  previous: string,
  image: string,
  version: string,
  digest: string,
  source: string,
  reason: string,
  output: string,
  swapUSec: ?int,
  totalUSec: ?int,
  layers: []Layer
)

# Content that a service must not get again.
type Quarantined (
  service: string,
  digest: string,
  reason: string,
  when: int,
  source: string
)

# Something seen while looking. level: "debug", "info" or "warning".
type Remark (
  level: string,
  path: string,
  text: string
)

# manager: "systemd" or "standalone".
# state: "running", "stopped" or "needs-restart".
# stack: what its main process runs on, by its layers (bottom to top); empty is its own /etc.
# accepted: the stack that its next start gets.
# since: when the stack was put in place.
# last: its newest outcome.
# pinned: the stack that it was rolled back to by hand, and stays on.
type ServiceStatus (
  service: string,
  manager: string,
  state: string,
  pid: ?int,
  stack: string,
  accepted: string,
  layers: []Layer,
  since: ?int,
  last: ?Event,
  pinned: ?string,
  quarantined: []Quarantined
)

# What a look now would change.
# reload: how the service would be told, "" if nothing changes.
type PlannedChange (
  service: string,
  changes: bool,
  stack: string,
  wanted: string,
  layers: []Layer,
  wantedLayers: []Layer,
  reload: string,
  remarks: []Remark
)

# The services that take part, or one of them.
method Status(service: ?string) -> (services: []ServiceStatus, redacted: bool)

# Outcomes, newest first: at most `limit` (100 if not given).
# truncated: there were more of them than one reply can hold.
method History(service: ?string, limit: ?int) -> (events: []Event, truncated: bool, redacted: bool)

# What a look now would change, without doing it.
method Plan(service: ?string) -> (changes: []PlannedChange, redacted: bool)

# Replies once the image is applied to the service or refused for it: at once if it is already.
# With `more`, what happens to it on the way is told as well. Ends with the connection.
method Wait(service: string, image: string) -> (event: Event, redacted: bool)

# Back to the stack before, or to the given one, and stay there.
method Rollback(service: string, to: ?string) -> (event: Event)

# Lets content back in: all of it that the service has in quarantine, or one digest. Undoes Rollback as well.
method Forget(service: string, digest: ?string) -> (forgotten: []Quarantined)

# Reads the settings again, and looks at every service.
method Reload() -> ()

# No service of this name takes part.
error ServiceNotFound (service: string)

# The service has never been on this stack, or its copy is gone. An empty `stack` means that there is none before.
error NoSuchStack (service: string, stack: string)

# Only root and the watcher's own user may do this.
error NotPermitted (method: string)

# So many calls of Wait by this user wait already: there is room for another when one of them ends.
error TooManyCalls (uid: int, limit: int)

# It was tried and did not work. The reason is empty for those who are not told reasons.
error Failed (reason: string)
"""


# DESCRIPTION says what each field means, and in which unit.


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Content that a service must not get again."""

    service: str
    digest: str
    reason: str
    when: int
    source: str = ""


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
    service: str

    def __str__(self) -> str:
        return f"{utf8(self.service)}: no service of this name takes part"


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


def to_dict(value: Any) -> Any:
    """The JSON value of an answer: data classes become objects, tuples arrays, enumerations their values."""
    if isinstance(value, dict):
        return {utf8(key): to_dict(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _camel(field.name): to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
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
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, data)
    if issubclass(kind, enum.Enum):
        return kind(data)
    if type(data) is not kind:
        raise ValueError(f"not of type {kind.__name__}: {data!r}")
    return data


def _read_object(cls: Any, data: Any) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"not an object: {data!r}")
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
