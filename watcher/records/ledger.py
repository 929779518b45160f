# SPDX-License-Identifier: LGPL-2.1-or-later
"""The history, which no mount table remembers: `$STATE_DIRECTORY/ledger.sqlite`.

What decides is not here, but in the record of each service (`state.py`): history may be lost without harm.

**A broken ledger never stops a service.** The daemon sets a file aside that is corrupt, unreadable or from a newer
version, begins a new one, and says so in one remark. A write that fails raises LedgerError, which the caller logs.
`database.py` says what a kill or a full disk leaves behind, and why a reader needs no write permission.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from watcher.model import Event, Outcome, Remark, shown
from watcher.records import database, schema
from watcher.records.schema import ALL_OUTCOMES, Which, utf8

NAME = "ledger.sqlite"

OUTPUT_MAX = 64 * 1024
"""Characters of a check's output that are kept."""
OUTPUTS_KEPT = 256
"""Outputs that are kept, the newest: with OUTPUT_MAX, what bounds the file's size."""

_COLUMNS = tuple(field.name for field in dataclasses.fields(Event))
_KEYS = tuple(schema.to_dict(Event("", Outcome.APPLIED, "", 0)))
_SELECTED = ", ".join(f'"{column}"' for column in _COLUMNS)
_APPEND = f"INSERT INTO history ({_SELECTED}) VALUES ({', '.join('?' * len(_COLUMNS))})"
# An outcome about an image outside the stack has swapped nothing.
_PLACED = """SELECT max("when") FROM history WHERE service = ? AND stack = ? AND swap_usec IS NOT NULL
    AND outcome IN ('applied', 'failed', 'rolled-back')"""
_PRUNE = "DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?"
_PRUNE_OUTPUTS = """UPDATE history SET output = '' WHERE output <> '' AND id <=
    (SELECT id FROM history WHERE output <> '' ORDER BY id DESC LIMIT 1 OFFSET ?)"""
_LIMIT_MAX = 2**31
_INTEGER_MAX = 2**63 - 1
# So much of a digest is no other word.
_DIGEST_LEAST = 8
_Row = Sequence[object]


def _where(service: str | None, which: Which) -> tuple[str, list[object]]:
    """A condition in SQL, and its parameters."""
    conditions = ['"when" >= ?']
    parameters: list[object] = [min(which.since, _INTEGER_MAX)]
    if service is not None:
        conditions.append("service = ?")
        parameters.append(utf8(service))
    if which.outcomes:
        conditions.append(f"outcome IN ({', '.join('?' * len(which.outcomes))})")
        parameters += map(utf8, which.outcomes)
    if which.image:
        label = utf8(which.image.removesuffix(".raw"))
        conditions.append("(? IN (image, image || '_' || version) OR substr(digest, 1, ?) = ?)")
        parameters += [label, max(len(label), _DIGEST_LEAST), label]
    return " AND ".join(conditions), parameters


class LedgerError(Exception):
    """The ledger could not be read or written: `str()` is one line that names the file. Log it and go on."""


class _Reading:
    """The questions; `_rows()` of a subclass gets the answers."""

    def _rows(self, sql: str, parameters: _Row = ()) -> list[Any]:
        raise NotImplementedError

    def history(
        self, service: str | None = None, limit: int = 100, which: Which = ALL_OUTCOMES
    ) -> list[Event]:
        """Outcomes of a service, or of all, newest first. Raises LedgerError."""
        where, parameters = _where(service, which)
        sql = f"SELECT {_SELECTED} FROM history WHERE {where} ORDER BY id DESC LIMIT ?"
        return [_event(row) for row in self._rows(sql, [*parameters, min(max(limit, 0), _LIMIT_MAX)])]

    def newest(self) -> dict[str, Event]:
        """The newest outcome of each service, without outputs, which may be megabytes. Raises LedgerError."""
        columns = _SELECTED.replace('"output"', "''")
        sql = f"SELECT {columns} FROM history WHERE id IN (SELECT max(id) FROM history GROUP BY service)"
        return {event.service: event for event in map(_event, self._rows(sql))}

    def placed(self, service: str, stack: str) -> int | None:
        """When the service last got a stack, in microseconds since the epoch; None: not known. Raises LedgerError."""
        return next((when for (when,) in self._rows(_PLACED, [utf8(service), stack])), None)


class Reader(_Reading):
    """The ledger for one that only reads: it needs no daemon, no write permission, and no file.

    It opens the file anew for each question, so that no lock outlives one.
    """

    def __init__(self, state_directory: str) -> None:
        self._path = Path(state_directory, NAME)

    def _rows(self, sql: str, parameters: _Row = ()) -> list[Any]:
        # Not open(2): closing a descriptor drops the locks of any Ledger in this process (fcntl_locking(2)).
        if not os.path.lexists(self._path):
            return []
        try:
            with contextlib.closing(database.open_to_read(self._path)) as db:
                return db.execute(sql, parameters).fetchall()
        except (sqlite3.Error, database.Unusable, OSError) as error:
            if not os.access(self._path, os.R_OK):
                raise LedgerError(f"{shown(str(self._path))}: only root may read it: use sudo") from error
            raise _error(self._path, "cannot be read", error) from error


class Ledger(_Reading):
    """The ledger for its writer, the daemon; every method may be called from any thread.

    Attributes:
        remarks: about the file, for the administrator (set aside, cannot be made); the caller logs them.
    """

    def __init__(self, state_directory: str, history_max: int = 10_000) -> None:
        """Opens or makes the ledger. Does not raise: what cannot be opened is tried again with every write."""
        self.remarks: list[Remark] = []
        self._path = Path(state_directory, NAME)
        self._history_max = history_max
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        with self._lock:
            try:
                self._opened()
            except LedgerError as error:
                self.remarks.append(Remark("warning", str(self._path), str(error)))

    def close(self) -> None:
        with self._lock:
            self._close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, *events: Event) -> None:
        """Adds outcomes to the history, in one commit. Raises LedgerError: they are lost."""
        rows = [_event_row(event) for event in events]
        if not rows:
            return
        with self._lock:
            try:
                self._write(rows)
            except sqlite3.Error as error:
                if not database.is_lost(error):
                    raise _error(self._path, "cannot be written", error) from error
                try:
                    self._write(rows)  # into a new file
                except sqlite3.Error as again:
                    raise _error(self._path, "cannot be written", again) from again

    def _write(self, events: Sequence[_Row]) -> None:
        db = self._opened()
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(_APPEND, events)
            db.execute(_PRUNE, (self._history_max,))
            db.execute(_PRUNE_OUTPUTS, (OUTPUTS_KEPT,))
            db.execute("COMMIT")
        except sqlite3.Error:
            # This connection may hold half a write; opening the file anew plays the journal back.
            self._close()
            raise

    def _rows(self, sql: str, parameters: _Row = ()) -> list[Any]:
        with self._lock:
            try:
                return self._opened().execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                self._close()
                raise _error(self._path, "cannot be read", error) from error

    def _opened(self) -> sqlite3.Connection:
        if self._db is not None:
            return self._db
        try:
            try:
                db = self._db = database.open_to_write(self._path)
            except database.Unusable as error:
                aside = database.set_aside(self._path, error.suffix)
                said = f"{shown(str(self._path))}: {error}; kept as {aside.name}, and a new one begun"
                self.remarks.append(Remark("warning", str(self._path), said))
                db = self._db = database.open_to_write(self._path)
        except (sqlite3.Error, database.Unusable, OSError) as error:
            self._close()
            raise _error(self._path, "cannot be opened", error) from error
        return db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _error(path: Path, what: str, error: Exception) -> LedgerError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return LedgerError(f"{shown(str(path))}: {what}: {why}")


def _event_row(event: Event) -> list[object]:
    values = schema.to_dict(dataclasses.replace(event, output=event.output[:OUTPUT_MAX]))
    text = {"layers": json.dumps(values["layers"]), "verdict": values["verdict"] or ""}
    return [*(values | text).values()]


def _event(row: Sequence[Any]) -> Event:
    try:
        values = dict(zip(_KEYS, row, strict=True))
        given = {"layers": json.loads(values["layers"]), "verdict": values["verdict"] or None}
        return schema.from_dict(Event, values | given)
    except (ValueError, TypeError, RecursionError) as error:
        raise LedgerError(f"{NAME}: an entry of the history cannot be understood: {error}") from error
