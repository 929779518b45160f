# SPDX-License-Identifier: LGPL-2.1-or-later
"""The log: entries with fields for journald, a coloured line for a terminal, logfmt for everything else.

All lines go through structlog; a mode is a list of processors and what stands at their end. `record()` turns an outcome
into an entry, which `units/confext-watcher.catalog` explains to the reader.

journald gets its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), not lines on standard error, because journalctl
finds entries by their fields: for `OBJECT_SYSTEMD_UNIT=`, `journalctl -u nginx` shows what happened to nginx's
configuration between nginx's own lines.

The logfmt is our own. For structlog's LogfmtRenderer a newline is the same as the two characters "\\n", and an empty
text the same as None; and it leaves tabs as they are.
"""

from __future__ import annotations

import atexit
import dataclasses
import enum
import errno
import fcntl
import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal, TextIO

from watcher.model import Event, Outcome, Remark, printable, shown
from watcher.records.backlog import Backlog, wait_for_room

# structlog loads rich where it is installed, for tracebacks that we do not print: 4 MiB, and 80 ms of every start.
# None in `sys.modules` tells Python that there is no rich. `confext-watcher status` loads it later all the same.
_modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
_rich = _modules.setdefault("rich", None)

import structlog  # noqa: E402

if _rich is None:
    del _modules["rich"]

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

Mode = Literal["auto", "console", "logfmt", "journal"]

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
IDENTIFIER: Final = "confext-watcher"

# One for each outcome, for ever; units/confext-watcher.catalog explains them.
MESSAGE_IDS: Final = {
    Outcome.APPLIED: "9470734ac2744b168fe05de4ec576843",
    Outcome.UNCHANGED: "c57e9c94a42d46d98feb2086dfe7bf67",
    Outcome.REFUSED: "ffdf6938850c4d21a6324cd5fcfef642",
    Outcome.INCOMPLETE: "ea026cefd44d423e88cb8b86f9b675f5",
    Outcome.FAILED: "702d676d676a409e9629aae14327a9a8",
    Outcome.ROLLED_BACK: "8f8d0f7909ee40cabe74ee9dbea9d8fd",
    Outcome.NEEDS_RESTART: "448b83599f8141cc87b4c1f1d905452d",
    Outcome.REQUESTED: "e95a7b60d19f4c1a9d1c8a4b7c2e6f03",
}

Level = Literal["debug", "info", "notice", "warning", "error", "critical"]

_PRIORITIES: Final = {"critical": 2, "error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}
_LEVELS: Final[dict[Outcome, Level]] = {
    Outcome.APPLIED: "info",
    Outcome.UNCHANGED: "info",
    Outcome.REFUSED: "warning",
    Outcome.INCOMPLETE: "warning",
    Outcome.FAILED: "error",
    Outcome.ROLLED_BACK: "warning",
    Outcome.NEEDS_RESTART: "notice",
    Outcome.REQUESTED: "notice",
}
# Of an event: the entry has a message and a time of its own, and the stack by its identity.
_NO_FIELDS: Final = ("message", "when", "layers")
_COLOURS: Final = {"critical": "\x1b[1;31m", "error": "\x1b[31m", "warning": "\x1b[33m", "notice": "\x1b[1m"}
_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"

# Seconds. What journald has not taken so long after the end goes to standard error.
_LAST_SEC: Final = 0.5

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
_detailed = False


def configure(mode: Mode = "auto", level: str = "info") -> None:
    """Decide where log lines go from now on.

    Args:
        mode: "journal" for entries with fields; "console" for people and "logfmt" for machines, both on
            standard error. "auto" is the journal if standard error leads there anyway (`$JOURNAL_STREAM`,
            systemd.exec(5)), "console" if it is a terminal, else "logfmt".
        level: the least important one to write: "debug", "info", "warning", "error" or "critical".
    """
    if mode == "auto":
        mode = "console" if sys.stderr.isatty() else "logfmt"
        there = os.path.exists(JOURNAL_SOCKET)
        if there and leads_to_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", "")):
            mode = "journal"
    global _detailed, _journal
    if _journal:
        _journal.close()
        _journal = None
    end: Processor = _render_logfmt
    factory: Callable[..., WrappedLogger] = structlog.PrintLoggerFactory(sys.stderr)
    if mode == "journal":
        journal = _journal = _Journal()
        end, factory = _render_journal, lambda *args: journal
    elif mode == "console":
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        end = functools.partial(_render_console, sys.stderr.isatty() and not plain)
    structlog.configure(
        processors=[_level, structlog.processors.format_exc_info, _printable, end],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )
    _detailed = level == "debug"


def is_detailed() -> bool:
    """Whether lines of level "debug" are written."""
    return _detailed


def say(remark: Remark) -> None:
    """Write the line of a remark."""
    getattr(log, remark.level)(f"{shown(remark.path)}: {remark.text}")


def record(event: Event, level: Level | None = None) -> None:
    """Write the one entry of an outcome.

    Args:
        event: what happened; its `message` is the sentence that is shown.
        level: instead of the outcome's own ("critical" for a rollback that failed too).
    """
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    present = {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in fields.items()
        if name not in _NO_FIELDS and value not in ("", None)
    }
    if event.trust is not None:
        present["trust"] = event.trust.protection.value
        if event.trust.signer:
            present["signer"] = event.trust.signer
            present["signer_fingerprint"] = event.trust.fingerprint
    chosen = level or _LEVELS[event.outcome]
    # structlog has no "notice": the processor `_level` puts it back.
    write = log.info if chosen == "notice" else getattr(log, chosen)
    write(event.message, message_id=MESSAGE_IDS[event.outcome], notice=chosen == "notice", **present)


def leads_to_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether `stream` is the one that `$JOURNAL_STREAM` ("DEVICE:INODE") names: a child may have another."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{stat.st_dev}:{stat.st_ino}"


def _level(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["level"] = "notice" if event.pop("notice", False) else method
    return event


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Make every text harmless: strangers choose names of files, and programs print what they like."""
    for key, value in event.items():
        if isinstance(value, str | bytes):
            # A message is one line, so that no name of a file can look like another message.
            event[key] = printable(os.fsdecode(value), keep="" if key == "event" else "\n\t")
    return event


def _render_console(colours: bool, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """`09:41:07  nginx.service: web 1.3 -> 1.4 applied in 2 ms`, coloured by importance."""

    def paint(colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if colours and colour and text else text

    line = paint(_COLOURS.get(event.pop("level"), ""), str(event.pop("event")))
    exception = event.pop("exception", None)
    output = event.pop("output", "")
    # The message of an outcome says all of its fields already.
    if not event.pop("message_id", None) and event:
        line += "  " + paint(_DIM, _pairs(event))
    below = "".join(f"\n    {text}" for text in str(output or "").splitlines())
    if exception:
        below += f"\n{exception}"
    return f"{paint(_DIM, time.strftime('%H:%M:%S'))}  {line}{below}"


def _render_logfmt(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return _pairs({"time": now, "level": event.pop("level"), "msg": event.pop("event"), **event})


def _pairs(fields: Mapping[str, object]) -> str:
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)


def _quoted(value: object) -> str:
    """A logfmt value: bare where that is unambiguous, else in quotes, always on one line."""
    text = str(value)
    if text and re.fullmatch(r'[^\s"=\\]+', text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _render_journal(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    """One entry in the native protocol; `service` and `message_id` get the names that journald knows."""
    message = str(event.pop("event"))
    if exception := event.pop("exception", None):
        message += f"\n{exception}"
    fields: list[tuple[str, object]] = [
        ("MESSAGE", message),
        ("PRIORITY", _PRIORITIES[event.pop("level")]),
        ("SYSLOG_IDENTIFIER", IDENTIFIER),
    ]
    if message_id := event.pop("message_id", None):
        fields.append(("MESSAGE_ID", message_id))
    if service := event.get("service"):
        fields.append(("OBJECT_SYSTEMD_UNIT", service))
    fields += [(f"CONFEXT_{key.upper()}", value) for key, value in event.items() if value is not None]
    return serialize(fields)


def serialize(fields: Iterable[tuple[str, object]]) -> bytes:
    """Fields as a native-protocol entry.

    A value with a newline goes as name, newline, 64-bit little-endian length, value, newline; any other as NAME=value,
    newline. A name has upper case letters, digits and underscores, no digit or underscore first, 64 at most.
    """
    entry = bytearray()
    for name, value in fields:
        key = re.sub(r"[^A-Z0-9_]", "_", name)[:64].encode()
        data = str(value).encode("utf-8", "backslashreplace")
        if b"\n" in data:
            entry += key + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            entry += key + b"=" + data + b"\n"
    return bytes(entry)


class _Journal:
    """structlog's logger in journal mode: sends what the last processor rendered. Usable from any thread."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._backlog = Backlog(
            self._send, lambda: wait_for_room(self._socket or self._connect()), _to_standard_error, _lost
        )
        atexit.register(self.close)

    def msg(self, entry: bytes) -> None:
        self._backlog.put(entry)

    debug = info = warning = error = critical = msg

    def close(self) -> None:
        atexit.unregister(self.close)
        for entry in self._backlog.flush(_LAST_SEC):
            _to_standard_error(entry, BlockingIOError(errno.EAGAIN, "it takes nothing"))
        self._disconnect()

    def _disconnect(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    def _send(self, entry: bytes) -> None:
        try:
            self._send_once(entry)
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, FileNotFoundError):
            # systemd restarted the socket unit, and our end leads nowhere. A new one may lead to journald.
            self._disconnect()
            self._send_once(entry)

    def _send_once(self, entry: bytes) -> None:
        sock = self._socket or self._connect()
        try:
            sock.send(entry)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            _send_sealed(sock, entry)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)  # the loop that logs also feeds the watchdog, and must not wait
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self._socket = sock
        return sock


def _to_standard_error(entry: bytes, error: OSError) -> None:
    """Standard error, wherever that leads, gets what journald did not take: no entry is lost in silence."""
    text = entry.decode("utf-8", "backslashreplace").replace("\n", " ")
    print(f"journald did not take an entry ({error}): {text}", file=sys.stderr, flush=True)


def _lost(count: int) -> bytes:
    message = f"journald was too slow: {count} entries of confext-watcher are lost"
    return serialize(
        [("MESSAGE", message), ("PRIORITY", _PRIORITIES["warning"]), ("SYSLOG_IDENTIFIER", IDENTIFIER)]
    )


def _send_sealed(sock: socket.socket, entry: bytes) -> None:
    """Send an entry that no datagram holds: as a memfd, sealed, so that it cannot change while journald reads it."""
    fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(entry)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        socket.send_fds(sock, [b""], [fd])
    finally:
        os.close(fd)


_journal: _Journal | None = None
