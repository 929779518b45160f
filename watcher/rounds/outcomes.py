# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes what became of a round into the journal and the history.

`Outcomes` remembers what it has said, and says it once for as long as it lasts. Nothing is decided by that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import trio

from watcher.model import Event, KeptOut, Later, Refused, Unsafe, printable, problem, shown
from watcher.records import journal
from watcher.records.ledger import Ledger, LedgerError
from watcher.records.together import Gathering, Together
from watcher.rounds import messages
from watcher.rounds.choose import Passed
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Facts

_Key = tuple[object, ...]


class Outcomes:
    """Writes down outcomes.

    Args:
        ledger: where history is kept.
        settle: after it, a power cut undoes nothing that is told; blocks, may raise Later.
        told: called with every outcome, after it was recorded.
    """

    def __init__(
        self,
        ledger: Ledger,
        settle: Callable[[], None],
        told: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._ledger = ledger
        self._settle = settle
        self._told = told
        self._unwritten: list[Event] = []
        self._writing = trio.Lock()
        self._said: dict[str, frozenset[_Key]] = {}
        # Outcomes of looks, which threads have made: the next `record_found()` takes them.
        self._found: dict[str, list[Event]] = {}
        self._recorded: dict[str, list[Event]] = {}
        self._not_placed: dict[str, str] = {}
        self._needs_restart: dict[str, tuple[str, str]] = {}
        self._refused: dict[str, object] = {}

    def forget(self, service: str) -> None:
        """Forget what was said of a service."""
        for memory in (self._said, self._found, self._not_placed, self._needs_restart, self._refused):
            memory.pop(service, None)

    async def outcome(self, event: Event, *, critical: bool = False) -> None:
        """One entry in the journal, one line of history.

        While the disk is busy with one commit, the outcomes of other services gather for the next.
        """
        journal.record(event, "critical" if critical else None)
        self._unwritten.append(event)
        with trio.CancelScope(shield=True):  # it has happened, even if the watcher is about to end
            async with self._writing:
                await self._write()
        self._told(event)

    async def _write(self) -> None:
        events, self._unwritten = self._unwritten, []
        if not events:
            return  # another service's outcome has taken this one along
        await trio.to_thread.run_sync(self._append, events)

    def _append(self, events: Sequence[Event]) -> None:
        try:
            self._settle()
        except Later as error:
            journal.log.error(f"a power cut may undo what is said to be done: {error}")
        try:
            self._ledger.append(*events)
        except LedgerError as error:
            journal.log.error(f"history: {error}")

    def recording(self, event: Event) -> Gathering[None]:
        """`outcome()` in a thread: the next `record_found()` tells of it. Of a burst, all are in one commit."""
        journal.record(event, None)
        yield Together(self._append, event, last=True)
        self._recorded.setdefault(event.service, []).append(event)

    def placed(self, service: str) -> None:
        """Its stack was put in place, or its next start gets it: what was said of a restart before is over."""
        self._needs_restart.pop(service, None)

    def came_through(self, service: str) -> None:
        """Its round came to its end: what prevented that before is over."""
        self._not_placed.pop(service, None)

    async def not_placed(self, service: str, error: Exception) -> None:
        """Its round could not come to its end, or has to wait. Says so once for as long as it lasts."""
        reason = printable(problem(error))
        if self._not_placed.get(service) == reason:
            return
        self._not_placed[service] = reason
        if isinstance(error, Later):
            say("warning", service, f"{reason}; it is tried again by itself")
        else:
            # What is refused is not tried again by itself.
            await self.outcome(messages.not_placed(service, reason, again=not isinstance(error, Refused)))

    async def needs_restart(self, service: str, invocation: str, reason: str, stack: str = "") -> None:
        """Its main process shares the host's namespace. Says so once for each start of the service.

        Args:
            stack: what a restart brings; of another one it is said again.
        """
        if self._needs_restart.get(service) != (invocation, stack):
            self._needs_restart[service] = invocation, stack
            await self.outcome(messages.needs_restart(service, reason))

    async def check_failed(self, event: Event, about: object) -> None:
        """A check has refused a stack. Says the same once, however often the host's files have it checked again.

        Args:
            about: the files that it comes from, and when each was changed: whoever acts on one is answered.
        """
        what = (event.stack, event.reason, about)
        if self._refused.get(event.service) == what:
            say("debug", event.service, f"refused again: {event.reason}")
            return
        self._refused[event.service] = what
        await self.outcome(event)

    async def record_found(self, service: str) -> None:
        """Record what the looks have found, and tell what was recorded."""
        for event in self._recorded.pop(service, ()):
            self._told(event)
        for event in self._found.pop(service, ()):
            await self.outcome(event)

    def look(self, service: str, facts: Facts, desired: Desired) -> None:
        """Say what a look found that is worth a line, unless it was said already and has been so ever since.

        Outcomes are recorded by `record_found()`. Blocks.
        """
        before = self._said.get(service, frozenset())
        # Where the look was incomplete, what was said before may still be so.
        said: set[_Key] = set(before) if desired.look.unknown else set()
        key: _Key
        for remark in desired.look.remarks:
            key = (remark.path, remark.text)
            if key not in before:
                say(remark.level, service, f"{shown(remark.path)}: {remark.text}")
            said.add(key)
        for passed in desired.passed:
            key = (
                passed.candidate.path,
                str(passed.reason),
                *desired.signatures.get(passed.candidate.path, ()),
            )
            if key not in before:
                self._passed(service, passed, facts, desired)
            said.add(key)
        if facts.has_nothing_whole and desired.lost:
            key = ("damaged", *desired.lost)
            if key not in before:
                event = messages.nothing_whole(service, facts.accepted, desired.lost)
                self._found.setdefault(service, []).append(event)
            said.add(key)
        if facts.excused and facts.suspicion and not (facts.doubtful and facts.unstartable != ""):
            key = ("excused", facts.excused)
            if key not in before:
                say("warning", service, f"went down, not by its stack: {facts.excused}")
            said.add(key)
        if facts.pinned is not None and facts.wanted.id != facts.pinned.id:
            key = ("pinned", facts.wanted.id)
            if key not in before:
                waits = "stays on the stack that it was put on by hand; `rollback --forget`"
                say("warning", service, f"{waits} lets it have what was dropped since")
            said.add(key)
        self._said[service] = frozenset(said)

    def _passed(self, service: str, passed: Passed, facts: Facts, desired: Desired) -> None:
        path = shown(passed.candidate.path)
        # This very file was said to be bad when it was put into the quarantine.
        known = any(one.source == passed.candidate.path for one in facts.state.quarantine)
        is_known = isinstance(passed.reason, KeptOut) and known
        if is_known or passed.slot in {entry.slot for entry in desired.sysexts}:
            say("debug", service, f"{path} {passed.reason}")
        elif isinstance(passed.reason, Refused):
            kept = next((one for one in facts.target.layers if one.slot == passed.slot), None)
            event = messages.refused(service, passed, kept, facts.target)
            self._found.setdefault(service, []).append(event)
        elif isinstance(passed.reason, Later):
            say("warning", service, f"{path} has to wait, it is tried again by itself: {passed.reason}")
        else:
            say("debug", service, f"{path} has to wait: {passed.reason}")


def signatures(passed: Sequence[Passed]) -> dict[str, tuple[int, ...]]:
    """Of the files that were passed over, by path: another file by the same name is said again. Blocks."""
    # An unsafe link may lead to what its owner cannot see. Not even that it changes is to be told.
    return {
        one.candidate.path: _signature(one.candidate.path, follow=not isinstance(one.reason, Unsafe))
        for one in passed
    }


def _signature(path: str, *, follow: bool) -> tuple[int, ...]:
    try:
        status = os.stat(path, follow_symlinks=follow)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def say(level: str, service: str, line: str | Callable[[], str]) -> None:
    """One line about a service; with level "debug", a step of its round and what that decided.

    Args:
        line: or what makes it, where that costs something.
    """
    if level == "debug" and not journal.is_detailed():
        return
    text = line if isinstance(line, str) else line()
    getattr(journal.log, level)(f"{service}: {text}", service=service)
