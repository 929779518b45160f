# SPDX-License-Identifier: LGPL-2.1-or-later
"""The accepted stacks of each unit, and the slots that a start of the unit goes by.

    stacks/UNIT/00000007-STACKID/        one accepted stack, never changed again
        SLOT -> ../../../store/DIGEST    one link per layer
        .stack.json                      the layers with their names, in order; the entries; where all was mounted
    stacks/.locks/UNIT                   held while the unit's stacks are changed; mode 0600
    units/UNIT -> ../stacks/UNIT/00000007-STACKID

`units/UNIT/SLOT` is what a unit's drop-in names. A stack has several slots, and a start between two renames would
see half of the old stack and half of the new one; so the slots of a stack are never touched once made, and
replacing the one link `units/UNIT` by rename(2) is the single atomic step from the whole old stack to the whole new
one. A kill at any moment leaves one of the two.

A power cut: POSIX promises neither that what was done first is on the disk first, nor that a file has its content when
it has its name. So all that a stack is made of (copies and their names, links, record) is on the disk before the link
leads to it, and the link before `accept()` returns. A stack that is removed is gone from the disk before its copies
are. A stack with a higher number than the accepted one was never accepted: it is cleared away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from watcher.model import Entry, Layer, Stack, printable, shown
from watcher.records import durable, schema

TEMPORARY = ".tmp-"
# No slot has that name: scan.py ignores hidden entries.
_RECORD = ".stack.json"
# No unit has that name.
_LOCKS = ".locks"
# In the place of a stack's identity.
_EMPTY = "empty"
_FORMAT = 1
_DIGITS = 8

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOCK = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Damaged(Exception):
    """A record of an accepted stack cannot be read: `str()` is one line for the administrator."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A stack as it was accepted.

    Attributes:
        stack: its layers, bottom to top.
        entries: all entries the unit had then, also those without a layer.
        when: microseconds since the epoch.
        mounted: see `unmounted.noted()`.
    """

    stack: Stack
    entries: tuple[Entry, ...]
    when: int
    mounted: Mapping[str, str] = field(default_factory=dict)


class Stacks:
    """`stacks/` and `units/` below the state directory. Several processes may use them at once.

    Attributes:
        directory: path of `stacks/`. Its owner alone can open it: records name what others may not see.
    """

    def __init__(self, state_directory: str) -> None:
        self._path = state_directory
        self.directory = f"{state_directory}/stacks"
        durable.make(state_directory)
        for private in (self.directory, f"{self.directory}/{_LOCKS}"):
            durable.make(private, 0o700)
        durable.make(f"{state_directory}/units")

    def units(self) -> tuple[str, ...]:
        """The units with an accepted stack, in no order."""
        return tuple(name for name in os.listdir(f"{self._path}/units") if not name.startswith("."))

    def current(self, unit: str) -> Accepted | None:
        """The stack that was accepted last, None if there never was one.

        Raises:
            Damaged: there is one, but its record cannot be read.
        """
        path = f"{self._path}/units/{_checked(unit)}"
        return _read(path) if os.path.lexists(path) else None

    def history(self, unit: str) -> tuple[Accepted, ...]:
        """The stacks that are kept, newest first, each once; without those whose record cannot be read."""
        found: dict[str, Accepted] = {}
        current = self._pointed(unit)
        for name in self._numbered(unit):
            if _is_beyond(name, current):
                continue
            try:
                accepted = _read(f"{self.directory}/{unit}/{name}")
            except Damaged:
                continue  # prune() removes it
            found.setdefault(accepted.stack.id, accepted)
        return tuple(found.values())

    def accept(
        self,
        unit: str,
        stack: Stack,
        entries: Sequence[Entry],
        mounted: Mapping[str, str] | None = None,
        after: Sequence[str] = (),
    ) -> bool:
        """Make `stack` the accepted one; False if it was already, with the same names, entries and places.

        Args:
            after: directories whose entries have to be on the disk before it is.

        Raises:
            ValueError: two layers share a slot, or the name of a unit or slot cannot be a file name.
            OSError: it could not be written; the old one stays.
        """
        slots = [_checked(layer.slot) for layer in stack.layers]
        if len(set(slots)) != len(slots):
            raise ValueError(f"{unit}: slots are not unique: {slots}")
        with self._locked(unit) as directory:
            accepted = Accepted(stack, tuple(entries), time.time_ns() // 1000, mounted or {})
            new = not self._is_current(unit, accepted)
            if new:
                name = self._build(unit, directory, accepted)
                self._fsync(unit, name, after)
                self._point(unit, name)
            durable.fsync(f"{self._path}/units")
        return new

    def without_layers(self) -> tuple[str, ...]:
        """The units whose accepted stack is the empty one, in no order."""
        return tuple(unit for unit in self.units() if self._pointed(unit).endswith(_EMPTY))

    def forget(self, unit: str) -> None:
        """Drop the slots and the history of a unit that is gone, unless its accepted stack has layers."""
        with self._locked(unit):
            if self._pointed(unit) and not self._pointed(unit).endswith(_EMPTY):
                return  # accepted meanwhile
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._path}/units/{unit}")
            durable.fsync(f"{self._path}/units")
            for name in self._numbered(unit):
                _remove_stack(f"{self.directory}/{unit}/{name}")
            self._remove(unit)

    def prune(self, keep: int) -> frozenset[str]:
        """Remove all but the current one and the last `keep` different stacks of each unit.

        Returns:
            The digests that the remaining ones refer to. No stack on the disk refers to any other.
        """
        used: set[str] = set()
        changed: list[str] = []
        for unit in os.listdir(self.directory):
            if unit.startswith("."):
                continue  # _LOCKS
            with self._locked(unit):
                kept, surplus = self._sorted(unit, keep)
                if surplus and not changed:
                    # Otherwise, after a power cut, an older link could lead to a stack that is gone.
                    durable.fsync(f"{self._path}/units")
                for name in surplus:
                    _remove_stack(f"{self.directory}/{unit}/{name}")
                for name in kept:
                    used |= _digests(f"{self.directory}/{unit}/{name}")
                if not kept:
                    self._remove(unit)
                elif surplus:
                    changed.append(f"{self.directory}/{unit}")
        durable.fsync(self.directory, *changed)
        return frozenset(used)

    def _sorted(self, unit: str, keep: int) -> tuple[list[str], list[str]]:
        """Names of the stacks to keep, and of the others."""
        kept: list[str] = []
        surplus: list[str] = []
        ids: set[str] = set()
        current = self._pointed(unit)
        for name in self._numbered(unit):
            identity = name.partition("-")[2]
            if name == current or (identity not in ids and len(ids) < keep):
                kept.append(name)
                ids.add(identity)
            else:
                surplus.append(name)
        return kept, surplus

    @contextmanager
    def _locked(self, unit: str) -> Iterator[int]:
        """The directory of a unit's stacks, locked against other threads and processes; made if it is not there."""
        path = f"{self.directory}/{_checked(unit)}"
        with self._lock(unit):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755)
            directory = os.open(path, _DIRECTORY)
            try:
                self._clear(unit, directory)
                yield directory
            finally:
                os.close(directory)

    @contextmanager
    def _lock(self, unit: str) -> Iterator[None]:
        while True:
            lock = os.open(self._lock_path(unit), _LOCK, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.fstat(lock).st_nlink:
                    yield
                    return
                # Else the process that held it has removed the unit, and this file with it.
            finally:
                os.close(lock)

    def _remove(self, unit: str) -> None:
        """Remove the directory of a unit that has no stacks, and its lock, which the caller holds."""
        os.rmdir(f"{self.directory}/{unit}")
        os.unlink(self._lock_path(unit))

    def _lock_path(self, unit: str) -> str:
        return f"{self.directory}/{_LOCKS}/{unit}"

    def _numbered(self, unit: str) -> list[str]:
        """Names of the stacks of a unit, newest first."""
        try:
            names = os.listdir(f"{self.directory}/{_checked(unit)}")
        except FileNotFoundError:
            return []
        return sorted((name for name in names if name[:_DIGITS].isdigit()), reverse=True)

    def _pointed(self, unit: str) -> str:
        try:
            return os.path.basename(os.readlink(f"{self._path}/units/{unit}"))
        except FileNotFoundError:
            return ""

    def _is_current(self, unit: str, accepted: Accepted) -> bool:
        try:
            current = self.current(unit)
        except Damaged:
            return False
        return current is not None and replace(current, when=accepted.when) == accepted

    def _clear(self, unit: str, directory: int) -> None:
        """Remove stacks that were never accepted: a process was killed, or failed, while it made them."""
        current = self._pointed(unit)
        for name in os.listdir(directory):
            if name == f"{TEMPORARY}link":
                os.unlink(name, dir_fd=directory)
            elif name.startswith(TEMPORARY) or _is_beyond(name, current):
                _remove_stack(f"/proc/self/fd/{directory}/{name}")

    def _build(self, unit: str, directory: int, accepted: Accepted) -> str:
        numbers = [int(name[:_DIGITS]) for name in self._numbered(unit)]
        name = f"{max(numbers, default=0) + 1:0{_DIGITS}}-{accepted.stack.id or _EMPTY}"
        temporary = TEMPORARY + name
        os.mkdir(temporary, 0o755, dir_fd=directory)
        fd = os.open(temporary, _DIRECTORY, dir_fd=directory)
        try:
            for layer in accepted.stack.layers:
                os.symlink(f"../../../store/{layer.digest}", layer.slot, dir_fd=fd)
            record = os.open(_RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
            with open(record, "w", encoding="ascii") as file:
                file.write(encoded(accepted))
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        return name

    def _fsync(self, unit: str, name: str, after: Sequence[str]) -> None:
        """Bring all that a stack is made of to the disk."""
        path, store = f"{self.directory}/{unit}", f"{self._path}/store"
        paths = [f"{path}/{name}/{_RECORD}", f"{path}/{name}", path, *after]
        if os.path.isdir(store):
            # Another process may have made a copy a moment ago, whose name is not on the disk yet.
            paths.append(store)
        if not self._pointed(unit):
            paths += [self.directory, self._path]  # perhaps these are new, too
        durable.fsync(*paths)

    def _point(self, unit: str, name: str) -> None:
        # In the unit's directory, which is locked: if this process is killed here, `_clear()` of the next removes it.
        temporary = f"{self.directory}/{unit}/{TEMPORARY}link"
        os.symlink(f"../stacks/{unit}/{name}", temporary)
        os.rename(temporary, f"{self._path}/units/{unit}")


def _is_beyond(name: str, current: str) -> bool:
    """Whether a stack has a higher number than the accepted one ("": there is none), and so was never accepted."""
    return name[:_DIGITS].isdigit() and name > current


def _checked(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"{shown(name)!r} cannot be the name of a unit or slot")
    return name


def _remove_stack(path: str) -> None:
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


def _digests(path: str) -> set[str]:
    """What the links of a stack lead to: a start goes by these, not by the record."""
    names = (name for name in os.listdir(path) if name != _RECORD)
    return {os.path.basename(os.readlink(f"{path}/{name}")) for name in names}


def encoded(accepted: Accepted) -> str:
    """The record of a stack: JSON, in ASCII."""
    return json.dumps(
        {
            "format": _FORMAT,
            "when": accepted.when,
            "layers": [asdict(layer) for layer in accepted.stack.layers],
            "entries": [asdict(entry) for entry in accepted.entries],
            "mounted": dict(accepted.mounted),
        },
        default=lambda kind: kind.value,
    )


def decoded(content: bytes, path: str) -> Accepted:
    """The stack of a record, each value of its type.

    Args:
        path: for the message.

    Raises:
        Damaged: this is no such record.
    """
    try:
        return _parse(json.loads(content.decode("ascii")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> Damaged:
    return Damaged(f"{shown(path)}: the record of the accepted stack cannot be read: {printable(str(error))}")


def _read(path: str) -> Accepted:
    try:
        # One lookup of the link: the record belongs to the stack that is accepted at this moment.
        directory = os.open(path, _DIRECTORY)
        try:
            fd = os.open(_RECORD, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        with open(fd, "rb") as file:
            content = file.read()
    except OSError as error:
        raise _damaged(path, error) from error
    return decoded(content, path)


def _parse(record: dict[str, object]) -> Accepted:
    if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']} is not known")
    layers, entries, when = record["layers"], record["entries"], record["when"]
    mounted = record.get("mounted", {})  # an older version did not write it
    if not isinstance(layers, list) or not isinstance(entries, list) or type(when) is not int:
        raise TypeError("it has another shape")
    if not isinstance(mounted, dict) or not all(isinstance(value, str) for value in mounted.values()):
        raise TypeError("it has another shape")
    return Accepted(
        Stack(tuple(schema.from_dict(Layer, layer) for layer in layers)),
        tuple(schema.from_dict(Entry, entry) for entry in entries),
        when,
        mounted,
    )
