# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an older version has left in the state directory becomes records: once, before anything else is opened.

What is decided about a service was in several files, each by its name (`Sources`). All of it goes into the record of
its accepted stack, in one rename for each service. Only when every record is on the disk are the old files removed, and
`trials/`, which tells that there is something to do, comes last. So whenever this is killed, the next call goes on: a
service that has a record is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from watcher.images import rebuild, record_files
from watcher.images.rebuild import Remains
from watcher.images.record_files import identity
from watcher.images.stacks import LOCKS, Stacks
from watcher.images.unit_locks import UnitLocks
from watcher.model import Entry, Kind, Later, Layer, Remark, Stack, Verdict, printable, problem, shown
from watcher.records import database, durable, ledger, schema
from watcher.records.ledger import LedgerError
from watcher.records.state import STACK, Accepted, Damaged, Quarantine, State, Trial, Undoing

_RECORD = ".stack.json"
_FORMAT = 1
# It is there as long as there is something to do.
_LAST = "trials"
_EXEC = ".exec"
# No unit has a name that begins with a dot.
_LOCK = ".upgrade"


def upgrade(state_directory: str, runtime_directory: str) -> list[Remark]:
    """Make records of what an older version has left; what there is to say of that.

    Blocks, for as long as another process does the same.

    Args:
        state_directory, runtime_directory: absolute paths; they need not exist.

    Raises:
        Later: the daemon of the older version still runs, or the machine does not let us.
    """
    if not _is_old(state_directory):
        return []
    try:
        if _daemon_runs(runtime_directory):
            raise Later("the running daemon is of an older version: restart it first")
        durable.make(f"{state_directory}/stacks", 0o700)
        locks = UnitLocks(f"{state_directory}/stacks/{LOCKS}")
        with locks.held(_LOCK):
            remarks = _Upgrade(state_directory, runtime_directory).run() if _is_old(state_directory) else []
            locks.remove(_LOCK)
        return remarks
    except (OSError, sqlite3.Error) as error:
        raise Later(
            f"{state_directory}: an older version's state cannot be taken over: {problem(error)}"
        ) from error


def _is_old(state_directory: str) -> bool:
    return os.path.lexists(f"{state_directory}/{_LAST}")


def _daemon_runs(runtime_directory: str) -> bool:
    """Whether another process has the daemon's lock."""
    try:
        fd = os.open(f"{runtime_directory}/lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return not _have_opened(os.fstat(fd), but=fd)
    finally:
        os.close(fd)
    return False


def _have_opened(file: os.stat_result, but: int) -> bool:
    """Whether this process has a file open, and so is the daemon itself."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the one of the listing
            if fd != but and os.path.samestat(os.fstat(fd), file):
                return True
    return False


class Sources:
    """What the older version has written, as records without a stack, by the names of slots.

    `trials/SERVICE`, `counted/SERVICE` and, in the runtime directory, `pending/SERVICE` are links whose targets are the
    text; `sysexts/UNIT` has a path on each line; the ledger had quarantine and pins.
    """

    def __init__(self, state_directory: str, runtime_directory: str, units: frozenset[str]) -> None:
        self._state_directory = state_directory
        self._runtime_directory = runtime_directory
        self._units = units
        self.states: dict[str, State] = {}

    def read(self, quarantine: list[schema.Quarantined], pins: dict[str, str]) -> None:
        """Raises OSError."""
        for name, text in _notes(f"{self._state_directory}/{_LAST}"):
            self._put(name, trial=_trial(text))
        for name, text in _notes(f"{self._state_directory}/counted"):
            self._put(name, counted=_counted(text))
        for name, text in _notes(f"{self._runtime_directory}/pending"):
            self._put(name, owed=text)
        for unit, sysexts in self._sysexts():
            self.states[unit] = replace(self.states.get(unit, State()), sysexts=sysexts)
        for one in quarantine:
            added = Quarantine(one.digest, one.reason, one.when, one.source)
            for slots in self._slots(one.service):
                state = self.states.get(slots, State())
                self.states[slots] = replace(state, quarantine=(*state.quarantine, added))
        for name, stack in pins.items():
            self._put(name, pin=stack)

    def _put(self, service: str, **fields: object) -> None:
        for slots in self._slots(service):
            self.states[slots] = replace(self.states.get(slots, State()), **fields)  # type: ignore[arg-type]

    def _slots(self, service: str) -> list[str]:
        """The slots of a service of this name: the unit's, the standalone one's, or both."""
        # No unit's name ends like that.
        names = [service + _EXEC] if service.endswith(_EXEC) else [service + _EXEC, service]
        found = [name for name in names if name in self._units]
        registered = os.path.lexists(f"{self._runtime_directory}/services/{service}.json")
        return found or [names[0] if registered else names[-1]]

    def _sysexts(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        directory = f"{self._state_directory}/sysexts"
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if not name.endswith(".tmp"):
                lines = Path(directory, name).read_bytes().splitlines()
                with contextlib.suppress(UnicodeError):  # damaged: the next round finds them again
                    yield (
                        name,
                        tuple(os.fsdecode(line.decode("unicode_escape").encode("latin-1")) for line in lines),
                    )


def _counted(text: str) -> dict[str, int]:
    pairs = (word.partition(":") for word in text.split())
    return {digits: int(done) for digits, _, done in pairs if done.isdigit()}


def _notes(directory: str) -> Iterator[tuple[str, str]]:
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        path = f"{directory}/{name}"
        if not name.startswith(".") and os.path.islink(path):
            yield name, os.readlink(path)


def _trial(text: str) -> Trial:
    stack, _, flag = text.partition(" ")
    # Why it was bad was not noted.
    verdict = Verdict.RELOAD_FAILED if flag == "bad" else None
    return Trial("" if stack == "-" else stack, was_down=flag == "failed", verdict=verdict)


class _Upgrade:
    def __init__(self, state_directory: str, runtime_directory: str) -> None:
        self._state_directory = state_directory
        self._runtime_directory = runtime_directory
        self._stacks = Stacks(state_directory, self._rebuild, self._say_rebuilt)
        self._decided: dict[str, State] = {}
        self._remarks: list[Remark] = []

    def run(self) -> list[Remark]:
        units = frozenset(self._stacks.links.units())
        # What only holds a record was made by a call that was killed: who gets what is to be decided as it was then.
        stacks = frozenset(filter(self._has_stack, units))
        sources = Sources(self._state_directory, self._runtime_directory, stacks)
        with self._opened(Path(self._state_directory, ledger.NAME)) as db:
            sources.read(*(database.decisions(db) if db else ([], {})))
            self._decided = sources.states
            services = sorted(units | self._decided.keys())
            for unit in services:
                self._make_record(unit, new=unit not in units)
            self._remove_old(db)
        if services:
            text = f"the state of {len(services)} services was taken over from an older version"
            self._remarks.append(Remark("info", self._state_directory, text))
        return self._remarks

    def _has_stack(self, unit: str) -> bool:
        try:
            state = self._stacks.read(unit)
        except Damaged:
            return True
        return state is None or state.accepted.when > 0

    @contextmanager
    def _opened(self, path: Path) -> Iterator[sqlite3.Connection | None]:
        """The ledger; None if there is none. It is converted, and keeps what decides until `_remove_old()`."""
        if not os.path.lexists(path):
            yield None
            return
        try:
            db = database.open_to_write(path)
        except database.Unusable as error:
            # `Ledger` sets it aside.
            lost = f"{error}: what it had in quarantine, and who was put on a stack by hand, is lost"
            self._remarks.append(Remark("warning", str(path), lost))
            yield None
            return
        with contextlib.closing(db):
            yield db

    def _make_record(self, unit: str, *, new: bool) -> None:
        decided = self._decided.get(unit, State())
        if new:
            self._stacks.change(unit, lambda state: replace(decided, accepted=state.accepted))
            return

        def record(stack: str, current: bool) -> State | None:
            try:
                accepted = _accepted(stack)
            except Damaged:
                return None  # an older stack that cannot be read is none to go back to
            return self._with_decisions(accepted, unit) if current else State(accepted=accepted)

        self._stacks.write_missing(unit, record)
        try:
            self._stacks.read(unit)
        except Damaged:
            self._stacks.change(unit, lambda state: state)

    def _with_decisions(self, accepted: Accepted, unit: str) -> State:
        state = replace(self._decided.get(unit, State()), accepted=accepted)
        older = [one.stack for one in self._stacks.history(unit)]
        return replace(state, undoing=_undoing(state, older))

    def _rebuild(self, remains: Remains) -> tuple[State, str]:
        unit = remains.unit
        try:
            history = ledger.Reader(self._state_directory).history(unit.removesuffix(_EXEC), 10_000)
        except LedgerError:
            history = []
        made, source = rebuild.rebuilt(remains, history, self._kind)
        path = f"{self._state_directory}/units/{unit}/{_RECORD}"
        record_files.set_aside(path, self._state_directory, unit, "damaged")
        return self._with_decisions(made.accepted, unit), source

    def _say_rebuilt(self, remains: Remains, source: str, aside: str) -> None:
        said = f"{remains.error}; made anew from {source}"
        self._remarks.append(Remark("warning", f"{self._state_directory}/units/{remains.unit}", said))

    def _kind(self, digest: str) -> Kind:
        is_tree = os.path.isdir(f"{self._state_directory}/store/{digest}")
        return Kind.DIRECTORY if is_tree else Kind.IMAGE

    def _remove_old(self, db: sqlite3.Connection | None) -> None:
        """All records are on the disk."""
        directories = []
        for unit in os.listdir(self._stacks.directory):
            for name in os.listdir(f"{self._stacks.directory}/{unit}") if not unit.startswith(".") else ():
                directory = f"{self._stacks.directory}/{unit}/{name}"
                if os.path.lexists(f"{directory}/{_RECORD}"):
                    os.unlink(f"{directory}/{_RECORD}")
                    directories.append(directory)
        durable.fsync(*directories)
        _remove(self._state_directory, "counted", "sysexts")
        _remove(self._runtime_directory, "pending")
        if db is not None:
            database.drop_decisions(db)
        durable.fsync(self._state_directory)
        _remove(self._state_directory, _LAST)
        durable.fsync(self._state_directory)


def _remove(directory: str, *names: str) -> None:
    if not os.path.isdir(directory):
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            durable.remove(name, fd)
    finally:
        os.close(fd)


def _undoing(state: State, older: list[Stack]) -> Undoing | None:
    """The bad stack that was being taken out: the accepted one, or the one on trial. Not from one that is pinned."""
    accepted = state.accepted.stack
    if state.pin in (accepted.id, *(stack.id for stack in older)):
        return None
    reasons = {one.digest: one.reason for one in state.quarantine}
    tried = [stack for stack in older if state.trial is not None and stack.id == state.trial.stack]
    for stack in (accepted, *tried):
        for key in (STACK + stack.id, *stack.digests):
            if key in reasons:
                return Undoing(stack, Verdict.RELOAD_FAILED, reasons[key])
    return None


def _accepted(directory: str) -> Accepted:
    """The accepted stack of an older version's record, with its directory."""
    path = f"{directory}/{_RECORD}"
    try:
        record = json.loads(Path(path).read_bytes().decode("ascii"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']} is not known")
        stack = Stack(tuple(schema.from_dict(Layer, layer) for layer in record["layers"]))
        entries = tuple(schema.from_dict(Entry, entry) for entry in record["entries"])
        mounted = {str(key): str(place) for key, place in record.get("mounted", {}).items()}
        accepted = Accepted(stack, entries, int(record["when"]), mounted)
        if identity(State(accepted=accepted)) != os.path.basename(directory).partition("-")[2]:
            raise ValueError("it is that of another stack")
        return accepted
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"the record of the accepted stack cannot be read: {printable(str(error))}"
        raise Damaged(f"{shown(path)}: {what}") from error
    except OSError as error:
        if error.errno not in record_files.DAMAGE:
            raise
        raise Damaged(f"{shown(path)}: cannot be read: {error.strerror}") from error
