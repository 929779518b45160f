# SPDX-License-Identifier: LGPL-2.1-or-later
"""The accepted stacks of each unit, and the slots that a start of the unit goes by.

    stacks/UNIT/00000007-STACKID/        one accepted stack; its links never change
        SLOT -> ../../../store/DIGEST    one link per layer; for what lies beside an image see bundles.py
        .state.json                      what is decided about the unit (`records/state.py`); of an older stack only
                                         `accepted` matters
    stacks/.locks/UNIT                   held while the unit's stacks are changed; mode 0600
    units/UNIT -> ../stacks/UNIT/00000007-STACKID
    set-aside/                           records that could not be read

`units/UNIT/SLOT` is what a unit's drop-in names. A stack has several slots, and a start between two renames would
see half of the old stack and half of the new one; so the slots of a stack are never touched once made, and
replacing the one link `units/UNIT` by rename(2) is the single atomic step from the whole old stack to the whole new
one. A kill at any moment leaves one of the two. The record of the accepted stack is replaced in the same way where
it lies; with another stack comes another record, so that what is decided with a stack is decided in that one step.

A power cut: POSIX promises neither that what was done first is on the disk first, nor that a file has its content when
it has its name. So all that a stack is made of (copies and their names, links, record) is on the disk before the link
leads to it, and the link before anybody is told of the stack (`UnitLinks.settle()`): a power cut before that leaves
the one before, and what was dropped is found again. A stack that is removed is gone from the disk before its copies
are. A stack with a higher number than the accepted one was never accepted: it is cleared away.

A unit that has a record, and never had a stack, has the empty one, with `when` 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from watcher.images import bundles, record_files
from watcher.images.rebuild import Remains
from watcher.images.record_files import DAMAGE, EMPTY, RECORD, RecordFiles, identity
from watcher.images.unit_links import UnitLinks
from watcher.images.unit_locks import UnitLocks
from watcher.model import Entry, Stack, shown
from watcher.records import durable
from watcher.records.state import Accepted, Damaged, State
from watcher.records.together import Gathering, Together, alone, done_alone

TEMPORARY = ".tmp-"
LOCKS = ".locks"
"""No unit has that name."""
_DIGITS = 8
# In the directory of a unit's stacks.
_NEW_LINK = f"{TEMPORARY}link"
_NEW_RECORD = f"{TEMPORARY}record"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _no_rebuild(remains: Remains) -> tuple[State, str]:
    raise remains.error


class Stacks:
    """`stacks/` and `units/` below the state directory. Several processes may use them at once.

    Args:
        state_directory: absolute path; made if it is not there.
        rebuild: makes a new record of what is left, and says from what; without it a change raises Damaged.
        rebuilt: is told when that is written: from what it was, and where the damaged one is now ("": nowhere).

    Attributes:
        directory: path of `stacks/`. Its owner alone can open it: records name what others may not see.
        links: `units/`.
    """

    def __init__(
        self,
        state_directory: str,
        rebuild: Callable[[Remains], tuple[State, str]] = _no_rebuild,
        rebuilt: Callable[[Remains, str, str], None] = lambda remains, source, aside: None,
    ) -> None:
        self._path = state_directory
        self._rebuild = rebuild
        self._rebuilt = rebuilt
        self.directory = f"{state_directory}/stacks"
        self._records = RecordFiles()
        durable.make(state_directory)
        durable.make(self.directory, 0o700)
        self._locks = UnitLocks(f"{self.directory}/{LOCKS}")
        self.links = UnitLinks(state_directory)

    def read(self, unit: str) -> State | None:
        """The record of a unit, None if it has none. An unchanged one costs two system calls.

        Raises:
            Damaged: there is one, but it cannot be read, or is not that of the stack beside it.
            OSError: not now.
        """
        return self._read(unit, name) if (name := self.links.stack(_checked(unit))) else None

    def history(self, unit: str) -> tuple[Accepted, ...]:
        """The stacks that are kept, newest first, each once; without those whose record cannot be read."""
        found: dict[str, Accepted] = {}
        current = self.links.stack(unit)
        for name in self._numbered(unit):
            if _is_beyond(name, current):
                continue
            try:
                accepted = self._read(unit, name).accepted
            except Damaged:
                continue  # nobody can go back to it
            if accepted.when:
                found.setdefault(accepted.stack.id, accepted)
        return tuple(found.values())

    def changing(self, unit: str, change: Callable[[State], State]) -> Gathering[State]:
        """Replace the record of a unit, if `change` makes another of it; the new one, which is on the disk.

        Raises:
            OSError: it could not be written; the old one stays.
        """
        with self._locked(unit) as directory:
            old = self._mended(unit, directory)
            new = change(old)
            if new != old:
                yield from self._write(unit, directory, new)
            elif not self.links.stack(unit):
                self._remove(unit)
            return new

    change = done_alone(changing)

    def accepting(
        self,
        unit: str,
        stack: Stack,
        entries: Sequence[Entry],
        mounted: Mapping[str, str] | None = None,
        change: Callable[[State], State] = lambda state: state,
    ) -> Gathering[State]:
        """Make `stack` the accepted one, and with it what `change` makes of the record; the new record.

        A power cut may leave the old one until `UnitLinks.settle()` has returned. What is accepted already, with the
        same names, entries and places, keeps its `when`, and its slots if they fit.

        Raises:
            ValueError: two layers share a slot, or the name of a unit or slot cannot be a file name.
            OSError: it could not be written; the old one stays.
        """
        slots = [_checked(layer.slot) for layer in stack.layers]
        if len(set(slots)) != len(slots):
            raise ValueError(f"{unit}: slots are not unique: {slots}")
        with self._locked(unit) as directory:
            old = self._mended(unit, directory)
            accepted = Accepted(stack, tuple(entries), time.time_ns() // 1000, mounted or {})
            same = bool(old.accepted.when) and replace(accepted, when=old.accepted.when) == old.accepted
            new = change(old if same else replace(old, accepted=accepted))
            if not same or not bundles.fits(f"{self._path}/units/{unit}"):
                yield from self._place(unit, directory, new)
            elif new != old:
                yield from self._write(unit, directory, new)
            else:
                yield from self.links.sync(unit)
            return new

    accept = done_alone(accepting)

    def write_missing(self, unit: str, record: Callable[[str, bool], State | None]) -> None:
        """Give each kept stack that has no record, oldest first, the one that `record` makes of its path.

        Args:
            record: called with the path, and whether that stack is the accepted one; None: it stays without.
        """
        with self._locked(unit) as directory:
            current = self.links.stack(unit)
            for name in reversed(self._numbered(unit)):
                path = f"{self.directory}/{unit}/{name}"
                is_there = os.path.lexists(f"{path}/{RECORD}")
                if not is_there and (state := record(path, name == current)) is not None:
                    alone(self._records.replacing(path, state, directory, _NEW_RECORD))
            alone(self.links.sync(unit))

    def without_layers(self) -> tuple[str, ...]:
        """The units whose accepted stack is the empty one, in no order."""
        return tuple(unit for unit in self.links.units() if self.links.stack(unit).endswith(EMPTY))

    def forget(self, unit: str) -> None:
        """Drop the slots, the record and the history of a unit that is gone.

        Not if its accepted stack has layers, or if something is kept out of it, or if it was put on a stack by hand.
        """
        with self._locked(unit) as directory:
            state = self._mended(unit, directory)
            if state.accepted.stack.layers or state.quarantine or state.pin is not None:
                return
            self.links.remove(unit)
            for name in self._numbered(unit):
                self._remove_stack(f"{self.directory}/{unit}/{name}")
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
                continue  # LOCKS
            with self._locked(unit):
                kept, surplus = self._sorted(unit, keep)
                if surplus and not changed:
                    # Otherwise, after a power cut, an older link could lead to a stack that is gone.
                    self.links.sync_all()
                for name in surplus:
                    self._remove_stack(f"{self.directory}/{unit}/{name}")
                for name in kept:
                    used |= set(bundles.slots(f"{self.directory}/{unit}/{name}").values())
                if not kept:
                    self._remove(unit)
                elif surplus:
                    changed.append(f"{self.directory}/{unit}")
        durable.fsync(self.directory, *changed)
        return frozenset(used)

    def _sorted(self, unit: str, keep: int) -> tuple[list[str], list[str]]:
        """Names of the stacks to keep, and of the others."""
        kept, surplus, ids = list[str](), list[str](), set[str]()
        current = self.links.stack(unit)
        for name in self._numbered(unit):
            one = name.partition("-")[2]
            needed = one not in ids and len(ids) < keep and not self._only_holds(unit, name)
            if name == current or needed:
                kept.append(name)
                ids.add(one)
            else:
                surplus.append(name)
        return kept, surplus

    def _only_holds(self, unit: str, name: str) -> bool:
        """Whether a stack was never accepted, but held the record before the first one was."""
        if not name.endswith(EMPTY):
            return False
        try:
            return not self._read(unit, name).accepted.when
        except Damaged:
            return False

    @contextmanager
    def _locked(self, unit: str) -> Iterator[int]:
        """The directory of a unit's stacks, locked against other threads and processes; made if it is not there."""
        path = f"{self.directory}/{_checked(unit)}"
        with self._locks.held(unit):
            try:
                directory = os.open(path, _DIRECTORY)
            except FileNotFoundError:
                os.mkdir(path, 0o755)
                directory = os.open(path, _DIRECTORY)
            try:
                self._clear(unit, directory)
                yield directory
            finally:
                os.close(directory)

    def _remove(self, unit: str) -> None:
        """Remove the directory of a unit that has no stacks, and its lock, which the caller holds."""
        os.rmdir(f"{self.directory}/{unit}")
        self._locks.remove(unit)

    def _numbered(self, unit: str) -> list[str]:
        """Names of the stacks of a unit, newest first."""
        try:
            names = os.listdir(f"{self.directory}/{_checked(unit)}")
        except FileNotFoundError:
            return []
        return sorted((name for name in names if name[:_DIGITS].isdigit()), reverse=True)

    def _clear(self, unit: str, directory: int) -> None:
        """Remove what was never accepted: a process was killed, or failed, while it made it."""
        current = self.links.stack(unit)
        for name in os.listdir(directory):
            if name in (_NEW_LINK, _NEW_RECORD):
                os.unlink(name, dir_fd=directory)
            elif name.startswith(TEMPORARY) or _is_beyond(name, current):
                self._remove_stack(f"/proc/self/fd/{directory}/{name}")

    def _read(self, unit: str, name: str) -> State:
        return self._records.read(f"{self.directory}/{unit}/{name}")

    def _mended(self, unit: str, directory: int) -> State:
        """The record, made anew if it is damaged. The caller has the lock."""
        try:
            return self.read(unit) or State()
        except Damaged as error:
            remains = self.remains(unit, error)
            state, source = self._rebuild(remains)
            path = f"{self._path}/units/{unit}/{RECORD}"
            aside = record_files.set_aside(path, self._path, unit, error.suffix)
            alone(self._write(unit, directory, state))
            self._rebuilt(remains, source, aside)
            return state

    def remains(self, unit: str, error: Damaged) -> Remains:
        """What is left of a unit whose record cannot be read."""
        name = self.links.stack(unit)
        path = f"{self.directory}/{unit}/{name}"
        number, _, of_stack = name.partition("-")
        try:
            links, when = bundles.slots(path), os.stat(path).st_mtime_ns // 1000
        except OSError as gone:
            if gone.errno not in DAMAGE:
                raise
            links, when, of_stack = {}, 0, EMPTY
        first = number.isdigit() and int(number) == 1
        of_stack = "" if of_stack == EMPTY else of_stack
        return Remains(unit, error, of_stack, links, when, first, self.history(unit))

    def _write(self, unit: str, directory: int, state: State) -> Gathering[None]:
        """Put a record in the place of the one of the accepted stack."""
        name = self.links.stack(unit)
        path = f"{self.directory}/{unit}/{name}"
        if name.partition("-")[2] == identity(state) and os.path.isdir(path):
            yield from self._records.replacing(path, state, directory, _NEW_RECORD)
        else:
            yield from self._place(unit, directory, state)
        yield from self.links.sync(unit)

    def _place(self, unit: str, directory: int, state: State) -> Gathering[None]:
        """Make the stack of a record the accepted one."""
        yield Together(durable.fsync_all, self._made_of(unit, name := self._build(unit, directory, state)))
        # The temporary one in the unit's directory, which is locked: `_clear()` of the next removes what is left of it.
        self.links.lead(unit, name, f"{self.directory}/{unit}/{_NEW_LINK}")

    def _build(self, unit: str, directory: int, state: State) -> str:
        numbers = [int(name[:_DIGITS]) for name in self._numbered(unit)]
        name = f"{max(numbers, default=0) + 1:0{_DIGITS}}-{identity(state)}"
        temporary = TEMPORARY + name
        os.mkdir(temporary, 0o755, dir_fd=directory)
        fd = os.open(temporary, _DIRECTORY, dir_fd=directory)
        try:
            for layer in state.accepted.stack.layers:
                for slot, target in bundles.links(f"{self._path}/store", layer):
                    os.symlink(target, slot, dir_fd=fd)
            self._records.create(f"{self.directory}/{unit}/{name}", state, fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        return name

    def _made_of(self, unit: str, name: str) -> list[str]:
        """The paths of all that a stack is made of."""
        path, store = f"{self.directory}/{unit}", f"{self._path}/store"
        paths = [f"{path}/{name}/{RECORD}", f"{path}/{name}", path]
        if os.path.isdir(store):
            # Another process may have made a copy a moment ago, whose name is not on the disk yet.
            paths.append(store)
        if not self.links.stack(unit):
            paths += [self.directory, self._path]  # perhaps these are new, too
        return paths

    def _remove_stack(self, path: str) -> None:
        self._records.forget(path)
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)


def _is_beyond(name: str, current: str) -> bool:
    """Whether a stack has a higher number than the accepted one ("": there is none), and so was never accepted."""
    return name[:_DIGITS].isdigit() and name > current


def _checked(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"{shown(name)!r} cannot be the name of a unit or slot")
    return name
