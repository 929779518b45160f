# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens the ledger's SQLite file, to write or to read only, and says when it is broken.

**Rollback journal, not WAL.** The command line reads the ledger without the daemon, and may not be able to write
anything. So it cannot read a WAL database: the `-shm` file has to be there, or the reader makes it
(sqlite.org/wal.html, "Read-Only Databases"). With a rollback journal it needs a read lock and nothing else. The price:
while a reader reads, no commit ends. So a reader fetches each answer whole, before it prints anything. And only the
owner can open the file, mode 0600: a user who can read it could hold a read lock for as long as he likes. All others
ask the daemon.

One case is left: a writer that was killed between its first write to the database and the end of its commit. The next
one plays the journal back first. A reader may not write, so it plays it back in a copy (SQLITE_READONLY_ROLLBACK).

`journal_mode=TRUNCATE` with `synchronous=FULL` makes a commit durable, and keeps the name of the journal in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import tempfile
import time
import urllib.parse
from pathlib import Path

from watcher.records.schema import Quarantined

BUSY_SEC = 5.0

_APPLICATION = 0x43464558
"""PRAGMA application_id, which tells our files from all others."""
_VERSION = 2
"""PRAGMA user_version: a change of the tables, or a new value of an enumeration, raises it, and needs a step in
`_convert()`."""
_TABLES = """
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    service TEXT NOT NULL, outcome TEXT NOT NULL, message TEXT NOT NULL, "when" INTEGER NOT NULL,
    stack TEXT NOT NULL, previous TEXT NOT NULL, image TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    source TEXT NOT NULL, reason TEXT NOT NULL, output TEXT NOT NULL,
    swap_usec INTEGER, total_usec INTEGER, layers TEXT NOT NULL, verdict TEXT NOT NULL DEFAULT ''
);
CREATE INDEX history_service ON history (service, id);
CREATE INDEX history_output ON history (id) WHERE output <> '';
"""


class Unusable(Exception):
    """This file will never do: set it aside with `suffix`. `str()` says what is wrong with it."""

    def __init__(self, suffix: str, why: str) -> None:
        super().__init__(why)
        self.suffix = suffix


def open_to_write(path: Path) -> sqlite3.Connection:
    """Opens the file, or makes it, mode 0600. SQLite plays back the journal of a writer that was killed.

    Raises:
        Unusable: corrupt, unreadable, not ours, or from a newer version.
        OSError, sqlite3.Error: not now (no space, no descriptor, no directory, ...).
    """
    _make(path)
    db: sqlite3.Connection | None = None
    try:
        db = _connect(path, "rw")
        # KiB, which an idle daemon keeps.
        db.execute("PRAGMA cache_size = -256")
        db.execute("PRAGMA synchronous = FULL")
        _check_version(db)
        (complaint,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if complaint != "ok":
            raise Unusable("corrupt", f"corrupt ({complaint})")
        db.execute("PRAGMA journal_mode = TRUNCATE")
        _convert(db)
        if _is_empty(db):
            db.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} PRAGMA application_id = {_APPLICATION};"
                f"PRAGMA user_version = {_VERSION}; COMMIT;"
            )
    except (sqlite3.Error, Unusable) as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.Error):
            _complain(path, error)
        raise
    return db


def open_to_read(path: Path) -> sqlite3.Connection:
    """Opens an existing file and writes nothing: not beside it, not into it.

    Raises:
        Unusable: not ours, or from a newer version.
        OSError, sqlite3.Error: it cannot be read.
    """
    db = _connect(path, "ro")
    try:
        try:
            _check_version(db)
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            db.close()
            db = _played_back(path)
            _check_version(db)
        if _is_empty(db):
            # Its writer was killed before it made the tables.
            db.close()
            db = sqlite3.connect(":memory:", isolation_level=None)
            db.executescript(_TABLES)
        elif _version(db) < _VERSION:
            written, db = db, sqlite3.connect(":memory:", isolation_level=None)
            with contextlib.closing(written):
                written.backup(db)
            _convert(db)
    except (sqlite3.Error, Unusable, OSError):
        db.close()
        raise
    return db


def decisions(db: sqlite3.Connection) -> tuple[list[Quarantined], dict[str, str]]:
    """What version 1 had beside the history: the quarantine, oldest first, and by service the pin."""
    if not _has_decisions(db):
        return [], {}
    rows = db.execute('SELECT service, digest, reason, "when", source FROM quarantine ORDER BY "when"')
    return [Quarantined(*row) for row in rows], dict(db.execute("SELECT service, stack FROM pins"))


def drop_decisions(db: sqlite3.Connection) -> None:
    """They have another place now (`images/upgrade.py`). In one commit. Raises sqlite3.Error; close it then."""
    if _has_decisions(db):
        db.executescript("BEGIN IMMEDIATE; DROP TABLE quarantine; DROP TABLE pins; COMMIT;")


def _has_decisions(db: sqlite3.Connection) -> bool:
    sql = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('quarantine', 'pins')"
    return bool(db.execute(sql).fetchone()[0])


def _convert(db: sqlite3.Connection) -> None:
    """Bring an older version's history to this one, in one commit. What decides stays, for `decisions()`."""
    if _version(db) != 1:
        return
    db.execute("BEGIN IMMEDIATE")
    if _version(db) == 1:  # else `exec` has done it a moment ago
        db.execute("ALTER TABLE history ADD COLUMN verdict TEXT NOT NULL DEFAULT ''")
        db.execute(f"PRAGMA user_version = {_VERSION}")
    db.execute("COMMIT")


def set_aside(path: Path, suffix: str) -> Path:
    """Renames the file and its journal, which must never meet another database; returns the new path."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.{suffix}-{moment}-{time.time_ns() % 1_000_000_000:09d}")
    # The journal first: if the daemon is killed in between, the next one sets a file without a journal aside.
    if os.path.lexists(_journal(path)):
        _journal(path).rename(_journal(aside))
    path.rename(aside)
    return aside


def is_lost(error: sqlite3.Error) -> bool:
    """Whether the open file is broken, or another one is at its path by now: opening it anew helps."""
    return _is_broken(error) or _code(error) == sqlite3.SQLITE_READONLY_DBMOVED


def _make(path: Path) -> None:
    # SQLite itself would make it 0644, and what a check printed may tell what an image holds. SQLite gives the journal
    # the mode of its database.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise Unusable("unreadable", "not a regular file")
        if stat.S_IMODE(mode) & 0o077:
            path.chmod(0o600)
            with contextlib.suppress(FileNotFoundError):
                _journal(path).chmod(0o600)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{urllib.parse.quote(os.fsencode(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_SEC,
        isolation_level=None,
        check_same_thread=False,
    )


def _check_version(db: sqlite3.Connection) -> None:
    version = _version(db)
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != _APPLICATION and not _is_empty(db):
        raise Unusable("corrupt", "a database of something else")
    if version > _VERSION:
        known = f"schema {version}, this program knows {_VERSION}"
        raise Unusable("newer", f"written by a newer confext-watcher ({known})")


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_empty(db: sqlite3.Connection) -> bool:
    return not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()


def _complain(path: Path, error: sqlite3.Error) -> None:
    """Raises Unusable where it does not help to try again."""
    if _is_broken(error):
        raise Unusable("corrupt", f"corrupt ({error})") from error
    if _code(error) == sqlite3.SQLITE_CANTOPEN and not os.access(path, os.R_OK):
        raise Unusable("unreadable", "no permission to read it") from error


def _code(error: sqlite3.Error) -> int:
    # Errors that Python's module finds itself (text that is not UTF-8) have none.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)


def _is_broken(error: sqlite3.Error) -> bool:
    reading = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS)
    code = _code(error)
    return code in reading or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _played_back(path: Path) -> sqlite3.Connection:
    files = (path, _journal(path))
    with tempfile.TemporaryDirectory(prefix="confext-watcher-") as directory:
        try:
            before = [_signature(file) for file in files]
            for file in files:
                shutil.copyfile(file, Path(directory, file.name))
            unchanged = before == [_signature(file) for file in files]
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            # A daemon has started meanwhile, and has played the journal back.
            return _connect(path, "ro")
        with contextlib.closing(_connect(Path(directory, path.name), "rw")) as copy:
            db = sqlite3.connect(":memory:", isolation_level=None)
            copy.backup(db)
            return db


def _signature(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _journal(path: Path) -> Path:
    return path.with_name(path.name + "-journal")
