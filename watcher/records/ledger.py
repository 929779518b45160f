# SPDX-License-Identifier: LGPL-2.1-or-later
"""History, quarantine and pins: what the kernel's mount table cannot remember; `$STATE_DIRECTORY/ledger.sqlite`.

**What decides is kept in memory.** Quarantine and pins are read at the start and written through: a full disk must not
let a bad image back in, round after round. What could not be written is written with the next round that can be.
There is one writer of these two, the daemon; `exec` only ever adds to the history beside it.

**A broken ledger never stops a service.** One that is corrupt, unreadable or from a newer version is set aside under
another name and a new one is begun, with one remark. Writes that fail raise LedgerError, to be logged and gone on
from. What a kill or a full disk leaves behind, and why a reader needs nothing but to read: `database.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from watcher.model import Event, Outcome, Remark, shown
from watcher.records import database, schema
from watcher.records.schema import Quarantined, text

NAME = "ledger.sqlite"

HISTORY_MAX = 10_000
OUTPUT_MAX = 64 * 1024
"""Characters of a check's output that are kept."""
OUTPUTS_KEPT = 256
"""How many of the newest outputs are kept: with OUTPUT_MAX, what bounds the file's size."""

_TABLES = """
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    service TEXT NOT NULL, outcome TEXT NOT NULL, message TEXT NOT NULL, "when" INTEGER NOT NULL,
    stack TEXT NOT NULL, previous TEXT NOT NULL, image TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    source TEXT NOT NULL, reason TEXT NOT NULL, output TEXT NOT NULL,
    swap_usec INTEGER, total_usec INTEGER, layers TEXT NOT NULL
);
CREATE INDEX history_service ON history (service, id);
CREATE INDEX history_output ON history (id) WHERE output <> '';
CREATE TABLE quarantine (
    service TEXT NOT NULL, digest TEXT NOT NULL, reason TEXT NOT NULL, "when" INTEGER NOT NULL, source TEXT NOT NULL,
    PRIMARY KEY (service, digest)
) WITHOUT ROWID;
CREATE TABLE pins (service TEXT PRIMARY KEY, stack TEXT NOT NULL) WITHOUT ROWID;
"""

_FORMAT = database.Format(application=0x43464558, version=1, tables=_TABLES)
"""A new column, table or value of Outcome makes the version one more, with a step that brings old files up to it."""

_COLUMNS = tuple(field.name for field in dataclasses.fields(Event))
_KEYS = tuple(schema.to_dict(Event("", Outcome.APPLIED, "", 0)))
_SELECTED = ", ".join(f'"{column}"' for column in _COLUMNS)
_APPEND = f"INSERT INTO history ({_SELECTED}) VALUES ({', '.join('?' * len(_COLUMNS))})"
# Those that are about another image than the ones in the stack have not swapped anything.
_PLACED = """SELECT max("when") FROM history WHERE service = ? AND stack = ? AND swap_usec IS NOT NULL
    AND outcome IN ('applied', 'failed', 'rolled-back')"""
_PRUNE = "DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?"
_PRUNE_OUTPUTS = """UPDATE history SET output = '' WHERE output <> '' AND id <=
    (SELECT id FROM history WHERE output <> '' ORDER BY id DESC LIMIT 1 OFFSET ?)"""
_ALL_QUARANTINE = 'SELECT service, digest, reason, "when", source FROM quarantine ORDER BY "when"'
_ALL_PINS = "SELECT service, stack FROM pins"
_QUARANTINE = "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)"
_FORGET = "DELETE FROM quarantine WHERE service = ? AND digest = ?"
_PIN = "INSERT OR REPLACE INTO pins VALUES (?, ?)"
_UNPIN = "DELETE FROM pins WHERE service = ?"

_LIMIT_MAX = 2**31
_Statement = tuple[str, Sequence[object]]


class LedgerError(Exception):
    """The ledger could not be read or written: one line that names the file. To be logged and gone on from."""


class _Reading:
    """What can be asked; `_rows()` is how."""

    def _rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        raise NotImplementedError

    def history(self, service: str | None = None, limit: int = 100) -> list[Event]:
        """Outcomes of a service, or of all, newest first.

        Raises:
            LedgerError: it cannot be read.
        """
        where, parameters = ("WHERE service = ?", [text(service)]) if service is not None else ("", [])
        sql = f"SELECT {_SELECTED} FROM history {where} ORDER BY id DESC LIMIT ?"
        return [_event(row) for row in self._rows(sql, [*parameters, min(max(limit, 0), _LIMIT_MAX)])]

    def newest(self) -> dict[str, Event]:
        """The newest outcome of each service, without outputs, which may be megabytes. Raises LedgerError."""
        columns = _SELECTED.replace('"output"', "''")
        sql = f"SELECT {columns} FROM history WHERE id IN (SELECT max(id) FROM history GROUP BY service)"
        return {event.service: event for event in map(_event, self._rows(sql))}

    def placed(self, service: str, stack: str) -> int | None:
        """When the service was last given a stack, microseconds since the epoch; None: not known.

        Raises:
            LedgerError: it cannot be read.
        """
        return next((when for (when,) in self._rows(_PLACED, [text(service), stack])), None)


class Reader(_Reading):
    """The ledger for one that only reads: without the daemon, without write permission, without a ledger being there.

    Opened anew for each question, so that no lock outlives one.
    """

    def __init__(self, state_directory: str) -> None:
        self._path = Path(state_directory, NAME)

    def quarantined(self, service: str | None = None) -> list[Quarantined]:
        """What is in quarantine for a service, or for all, oldest first. Raises LedgerError."""
        return _of(service, _quarantine_in(self._rows(_ALL_QUARANTINE)))

    def is_quarantined(self, service: str, digest: str) -> bool:
        """Whether the service must not get this content. Raises LedgerError."""
        return any(content.digest == digest for content in self.quarantined(service))

    def pins(self) -> dict[str, str]:
        """Service to the identity of the stack it was put on by hand. Raises LedgerError."""
        return dict(self._rows(_ALL_PINS))

    def _rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        # Not by opening it: closing a descriptor drops the locks of any Ledger in this process (fcntl_locking(2)).
        if not os.path.lexists(self._path):
            return []
        try:
            with contextlib.closing(database.open_to_read(self._path, _FORMAT)) as db:
                return db.execute(sql, parameters).fetchall()
        except (sqlite3.Error, database.Unusable, OSError) as error:
            if not os.access(self._path, os.R_OK):
                raise LedgerError(f"{shown(str(self._path))}: this user may not read it") from error
            raise _error(self._path, "cannot be read", error) from error


class Round:
    """What one round has to record; written in one commit when its `with` block ends. Made by `Ledger.round()`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._statements: list[_Statement] = []

    def append(self, event: Event) -> None:
        """Adds an outcome to the history."""
        self._statements.append((_APPEND, _event_row(event)))

    def quarantine(self, content: Quarantined) -> None:
        """Keeps content out of a service, at once and from now on, whether or not it can be written down."""
        self._ledger._put_quarantined(content)

    def forget(self, service: str, digest: str | None = None) -> list[Quarantined]:
        """Lets one content, or everything, of a service back in; returns what was let in."""
        return self._ledger._drop_quarantined(service, digest)

    def pin(self, service: str, stack: str) -> None:
        """Remembers that the service was put on this stack by hand."""
        self._ledger._put_pin(service, stack)

    def unpin(self, service: str) -> bool:
        """Forgets the pin; whether there was one."""
        return self._ledger._drop_pin(service)


class Ledger(_Reading):
    """The ledger for its writer, the daemon; every method may be called from any thread.

    Attributes:
        remarks: what the administrator should be told about the file (set aside, cannot be made); the caller logs and
            clears it.
    """

    def __init__(self, state_directory: str, history_max: int = HISTORY_MAX) -> None:
        """Opens or makes the ledger. Does not raise: what cannot be opened is tried again with every write."""
        self.remarks: list[Remark] = []
        self._path = Path(state_directory, NAME)
        self._history_max = history_max
        # The database is one thread's at a time; what is in memory is replaced, never changed, and read without it.
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._loaded = False
        self._quarantine: dict[tuple[str, str], Quarantined] = {}
        self._pins: dict[str, str] = {}
        # By what they are about, so that a disk that stays full does not make them grow.
        self._owed: dict[tuple[str, ...], _Statement] = {}
        with self._lock:
            try:
                self._open()
            except LedgerError as error:
                self.remarks.append(Remark("warning", str(self._path), str(error)))

    def close(self) -> None:
        with self._lock:
            self._close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def round(self) -> Iterator[Round]:
        """Gathers what is to be recorded, and writes it in one commit at the end of the block.

        Raises:
            LedgerError: at the end of the block; quarantine and pins hold all the same, history entries are lost.
        """
        made = Round(self)
        try:
            yield made
        finally:
            self._commit(made._statements)

    def append(self, *events: Event) -> None:
        """Adds outcomes to the history, in one commit. Raises LedgerError."""
        with self.round() as made:
            for event in events:
                made.append(event)

    def quarantine(self, content: Quarantined) -> None:
        """Keeps content out of a service; holds even when it raises LedgerError."""
        with self.round() as made:
            made.quarantine(content)

    def forget(self, service: str, digest: str | None = None) -> list[Quarantined]:
        """Lets content of a service back in, and returns what; holds even when it raises LedgerError."""
        with self.round() as made:
            return made.forget(service, digest)

    def pin(self, service: str, stack: str) -> None:
        """Remembers that the service was put on this stack by hand; holds even when it raises LedgerError."""
        with self.round() as made:
            made.pin(service, stack)

    def unpin(self, service: str) -> bool:
        """Forgets the pin; whether there was one. Holds even when it raises LedgerError."""
        with self.round() as made:
            return made.unpin(service)

    def is_quarantined(self, service: str, digest: str) -> bool:
        """Whether the service must not get this content; from memory."""
        return (text(service), digest) in self._quarantine

    def quarantined(self, service: str | None = None) -> list[Quarantined]:
        """What is in quarantine for a service, or for all, oldest first; from memory."""
        return _of(service, self._quarantine.values())

    def pinned(self, service: str) -> str | None:
        """The stack that the service was put on by hand; from memory."""
        return self._pins.get(text(service))

    def pins(self) -> dict[str, str]:
        """Service to the stack it was put on by hand; from memory."""
        return dict(self._pins)

    def _put_quarantined(self, content: Quarantined) -> None:
        clean = schema.from_dict(Quarantined, schema.to_dict(content))
        key = (clean.service, clean.digest)
        with self._lock:
            self._quarantine = {**self._quarantine, key: clean}
            self._owed["quarantine", *key] = (_QUARANTINE, dataclasses.astuple(clean))

    def _drop_quarantined(self, service: str, digest: str | None) -> list[Quarantined]:
        with self._lock:
            gone = {
                key: content
                for key, content in self._quarantine.items()
                if key[0] == text(service) and digest in (None, key[1])
            }
            self._quarantine = {key: left for key, left in self._quarantine.items() if key not in gone}
            self._owed.update({("quarantine", *key): (_FORGET, key) for key in gone})
        return list(gone.values())

    def _put_pin(self, service: str, stack: str) -> None:
        with self._lock:
            self._pins = {**self._pins, text(service): stack}
            self._owed["pin", text(service)] = (_PIN, (text(service), stack))

    def _drop_pin(self, service: str) -> bool:
        with self._lock:
            pinned = text(service) in self._pins
            self._pins = {name: stack for name, stack in self._pins.items() if name != text(service)}
            if pinned:
                self._owed["pin", text(service)] = (_UNPIN, (text(service),))
        return pinned

    def _commit(self, statements: Sequence[_Statement]) -> None:
        if statements:
            statements = [*statements, (_PRUNE, (self._history_max,)), (_PRUNE_OUTPUTS, (OUTPUTS_KEPT,))]
        with self._lock:
            if not statements and not self._owed:
                return
            try:
                self._write(statements)
            except sqlite3.Error as error:
                if not database.is_lost(error):
                    raise _error(self._path, "cannot be written", error) from error
                # Found out only now: what was in the file is lost, what is in memory is not.
                try:
                    self._write(statements)
                except sqlite3.Error as again:
                    raise _error(self._path, "cannot be written", again) from again

    def _write(self, statements: Sequence[_Statement]) -> None:
        db = self._opened()
        try:
            db.execute("BEGIN IMMEDIATE")
            for sql, parameters in [*self._owed.values(), *statements]:
                db.execute(sql, parameters)
            db.execute("COMMIT")
        except sqlite3.Error:
            # A connection whose write failed half-way is not worth trusting; opening it anew plays the journal back.
            self._close()
            raise
        self._owed.clear()

    def _rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._opened().execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                self._close()
                raise _error(self._path, "cannot be read", error) from error

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            self._open()
        assert self._db is not None
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> None:
        try:
            try:
                self._db = database.open_to_write(self._path, _FORMAT)
            except database.Unusable as error:
                aside = database.set_aside(self._path, error.suffix)
                said = f"{shown(str(self._path))}: {error}; kept as {aside.name}, and a new one begun"
                self.remarks.append(Remark("warning", str(self._path), said))
                self._db = database.open_to_write(self._path, _FORMAT)
            self._load(self._db)
        except (sqlite3.Error, database.Unusable, OSError) as error:
            self._close()
            raise _error(self._path, "cannot be opened", error) from error

    def _load(self, db: sqlite3.Connection) -> None:
        if self._loaded:
            # Opened again, perhaps another file: what is in memory is what counts.
            self._owe_everything()
            return
        stored = {
            (content.service, content.digest): content
            for content in _quarantine_in(db.execute(_ALL_QUARANTINE))
        }
        pins = dict(db.execute(_ALL_PINS))
        # What was decided before the file could be opened is newer than what the file says.
        for about, *key in self._owed:
            if about == "pin":
                pins.pop(key[0], None)
            else:
                stored.pop((key[0], key[1]), None)
        self._quarantine = {**stored, **self._quarantine}
        self._pins = {**pins, **self._pins}
        self._loaded = True

    def _owe_everything(self) -> None:
        for key, content in self._quarantine.items():
            self._owed["quarantine", *key] = (_QUARANTINE, dataclasses.astuple(content))
        for pin in self._pins.items():
            self._owed["pin", pin[0]] = (_PIN, pin)


def _quarantine_in(rows: Iterable[Any]) -> list[Quarantined]:
    return [Quarantined(*row) for row in rows]


def _error(path: Path, what: str, error: Exception) -> LedgerError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return LedgerError(f"{shown(str(path))}: {what}: {why}")


def _of(service: str | None, contents: Iterable[Quarantined]) -> list[Quarantined]:
    return [content for content in contents if service is None or content.service == text(service)]


def _event_row(event: Event) -> list[object]:
    values = {column: getattr(event, column) for column in _COLUMNS}
    values["outcome"] = event.outcome.value
    values["output"] = event.output[:OUTPUT_MAX]
    values["layers"] = json.dumps(schema.to_dict(event.layers))
    return [text(value) if isinstance(value, str) else value for value in values.values()]


def _event(row: Sequence[Any]) -> Event:
    try:
        values = dict(zip(_KEYS, row, strict=True))
        return schema.from_dict(Event, values | {"layers": json.loads(values["layers"])})
    except (ValueError, TypeError, RecursionError) as error:
        raise LedgerError(f"{NAME}: an entry of the history cannot be understood: {error}") from error
