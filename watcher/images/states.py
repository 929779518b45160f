# SPDX-License-Identifier: LGPL-2.1-or-later
"""The records of the services: what is on the disk, and what could not be written yet.

**What decides is kept in memory until it is written.** So a full disk does not let a bad image back in: the next
change of the service that can be written takes along what is owed. **A damaged record never stops a service**: it is
set aside, and made anew (`rebuild.py`), with one warning.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from watcher.images import bundles, rebuild
from watcher.images.rebuild import Remains
from watcher.images.stacks import Stacks
from watcher.model import Entry, Event, Kind, Stack, shown
from watcher.records import journal
from watcher.records.ledger import LedgerError
from watcher.records.state import Damaged, State
from watcher.records.together import Gathering, done_alone

Change = Callable[[State], State]
History = Callable[[str], Sequence[Event]]


@dataclass(frozen=True, slots=True)
class _Unwritten:
    """What the disk does not have: the record that was there, and what was to take its place."""

    base: State
    wanted: State

    def on(self, disk: State) -> State:
        """The record that is there now, with what is owed. `exec` may have changed other parts of it meanwhile."""
        names = [field.name for field in dataclasses.fields(State)]
        changed = [name for name in names if getattr(self.base, name) != getattr(self.wanted, name)]
        return dataclasses.replace(disk, **{name: getattr(self.wanted, name) for name in changed})


class States:
    """The records of one state directory. Threads may share it.

    Args:
        state_directory: absolute path; made if it is not there.
        history: outcomes of a service, newest first; may raise LedgerError.
    """

    def __init__(self, state_directory: str, history: History) -> None:
        self.stacks = Stacks(state_directory, self._rebuild, _rebuilt)
        self._store = f"{state_directory}/store"
        self._history = history
        self._unwritten: dict[str, _Unwritten] = {}
        # What was read or written last: with no descriptor left, a change is made of this.
        self._seen: dict[str, State] = {}
        self._turns: dict[str, threading.Lock] = {}

    def state(self, unit: str) -> State:
        """See `Store.state()`. Raises OSError."""
        unwritten = self._unwritten.get(
            unit
        )  # before the disk: what another thread writes meanwhile is there
        try:
            found = self.stacks.read(unit)
        except Damaged as error:
            found = self._made_anew(unit, error)
        if found is None:
            self._seen.pop(unit, None)
        else:
            self._seen[unit] = found
        state = found or State()
        return unwritten.on(state) if unwritten else state

    def _made_anew(self, unit: str, damage: Damaged) -> State:
        try:
            return self.stacks.change(unit, lambda state: state)
        except OSError as error:
            # What is left is read as often as it is asked for, until there is room for a record.
            state, source = self._rebuild(self.stacks.remains(unit, damage))
            if unit not in self._seen:
                said = (
                    f"{damage}; what {source} says counts, until a new one can be written: {error.strerror}"
                )
                journal.log.warning(said, service=unit)
            return state

    def changing(self, unit: str, change: Change) -> Gathering[State]:
        """See `Store.changing()`. Raises OSError: it holds in memory."""
        made: list[_Unwritten] = []

        def changed(disk: State) -> State:
            made.append(_Unwritten(disk, change(unwritten.on(disk) if unwritten else disk)))
            return made[0].wanted

        with self._turn(unit):
            unwritten = self._unwritten.get(unit)
            try:
                self._seen[unit] = yield from self.stacks.changing(unit, changed)
            except OSError:
                if not made:
                    changed(self._seen.get(unit) or State())
                self._unwritten[unit] = made[0]
                raise
            self._unwritten.pop(unit, None)
            return self._seen[unit]

    change = done_alone(changing)

    def accepting(
        self, unit: str, stack: Stack, entries: Sequence[Entry], mounted: Mapping[str, str], change: Change
    ) -> Gathering[State]:
        """See `Store.accepting()`. Raises OSError: nothing of it holds, not in memory either."""
        with self._turn(unit):
            unwritten = self._unwritten.get(unit)
            self._seen[unit] = yield from self.stacks.accepting(
                unit,
                stack,
                entries,
                mounted,
                lambda state: change(unwritten.on(state) if unwritten else state),
            )
            self._unwritten.pop(unit, None)
            return self._seen[unit]

    def forget(self, unit: str) -> None:
        """See `Store.forget()`. Raises OSError."""
        if unit in self._unwritten:
            return  # something was decided about it, and will be written
        self.stacks.forget(unit)
        self._seen.pop(unit, None)

    def _turn(self, unit: str) -> threading.Lock:
        return self._turns.setdefault(unit, threading.Lock())

    def _rebuild(self, remains: Remains) -> tuple[State, str]:
        try:
            history = self._history(remains.unit.removesuffix(".exec"))
        except LedgerError:
            history = ()
        return rebuild.rebuilt(remains, history, self._kind)

    def _kind(self, digest: str) -> Kind:
        path = f"{self._store}/{digest}"
        return Kind.DIRECTORY if os.path.isdir(path) and not bundles.is_at(path) else Kind.IMAGE


def _rebuilt(remains: Remains, source: str, aside: str) -> None:
    kept = f"; kept as {shown(aside)}" if aside else ""
    said = f"{remains.error}{kept}; made anew from {source}: {rebuild.LOST}"
    journal.log.warning(said, service=remains.unit)
