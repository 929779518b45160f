# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps what is known of systemd's services current.

Which units take part, and with which settings, is read from their files (unit_files.py), as by the generator: what
stands there counts, whether systemd has loaded it or not. systemd is asked for what only it knows: where unit files
are, which instances there are, the main process of each, and its start. A signal only says what to ask about again, so
no single one matters: after a loss of the connection or any daemon-reload, everything is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import trio
from jeepney import HeaderFields

from watcher.managers.base import Service
from watcher.managers.systemd import dbus, unit_watch
from watcher.managers.systemd.executor import is_executor
from watcher.managers.systemd.systemd1 import Systemd1, unit_path
from watcher.managers.systemd.unit_ends import UnitEnds, has_failed
from watcher.managers.systemd.unit_facts import UnitFacts, all_facts, units_with_slots
from watcher.managers.systemd.unit_files import Index, Unit
from watcher.managers.systemd.wire import Received
from watcher.model import Interest, Remark
from watcher.mounts.process import Gone, Process
from watcher.records import journal
from watcher.settings.unit_names import UNIT_PATHS, UnitName, is_template

# The executor is looked at less and less often: it may wait for long (for a terminal, or with Type=idle). When it has
# become the service, that is noticed late by at most a quarter of the time that it took.
_POLL_SEC, _POLL_GROWTH, _POLL_MAX_SEC = 0.002, 1.25, 10.0
_RETRY_SEC = 5.0
_ACTIVE = frozenset({"active", "reloading", "refreshing"})


@dataclass(frozen=True, slots=True)
class _Start:
    """A start of a unit: its main process, InvocationID and NRestarts."""

    process: Process | None = None
    invocation: str = ""
    restarts: int = 0


_NOT_RUNNING = _Start()


class Tracker:
    """The services that take part, as of the last `update()`.

    Attributes:
        changed: called with the name of every service that appeared, changed or went away.
    """

    def __init__(self, state_directory: str) -> None:
        self.changed: Callable[[str], None] = lambda name: None
        self.services: dict[str, Service] = {}
        self.index = Index(())
        self._state_directory = state_directory
        self._facts: dict[str, UnitFacts] = {}
        self._reading = trio.Lock()
        self._units: dict[str, Unit] = {}  # also those with `Enabled=no`
        # The names of units by their object paths.
        self._names: dict[str, str] = {}
        self._said: set[Remark] = set()
        # Loaded instances that serve one connection each, and take no part.
        self._per_connection: set[str] = set()
        self._ends = UnitEnds()
        # Starts whose process is still systemd's executor.
        self._starting: dict[str, _Start] = {}
        # What to look at again, and the event that says so.
        self._everything = True
        self._dirty: dict[str, None] = {}  # first come, first served
        self._new_instances: set[str] = set()
        self._resubscribe = False
        self._news = trio.Event()
        # Why each unit ("": the files) could not be looked at, and when all of these are looked at again.
        self._failures: dict[str, str] = {}
        self._retry_at = math.inf

    def close(self) -> None:
        """Let go of all processes."""
        for name in list(self.services):
            self._drop(name)

    # --- what to look at again ---

    def look_at_everything(self) -> None:
        self._everything = True
        self._news.set()

    def look_at(self, name: str) -> None:
        self._dirty[name] = None
        self._news.set()

    def note(self, message: Received) -> None:
        """A signal of systemd came."""
        member = message.header.fields.get(HeaderFields.member)
        if member == "PropertiesChanged":
            name = self._names.get(message.header.fields.get(HeaderFields.path, ""))
            if name and not self._has_main(name, message.changed_number("MainPID")):
                self.look_at(name)
        elif member == "Reloading" and not message.body[0]:
            self.look_at_everything()
        elif member == "NameOwnerChanged" and message.body[2]:
            self._resubscribe = True
            self.look_at_everything()
        elif member == "UnitNew":
            self._note_unit(message.body[0])

    def _has_main(self, name: str, pid: int | None) -> bool:
        """Whether the main process of a service is the one that is known already: then nothing else that is kept of it
        can have changed. With each reload systemd tells its state twice."""
        main = self.services[name].main if name in self.services else None
        return main is not None and main.pid == pid and main.alive()

    def _note_unit(self, name: str) -> None:
        """systemd has loaded a unit: an instance takes part if its template does."""
        known = name in self.services or name in self._facts or name in self._per_connection
        if known or not name.endswith(".service"):
            return
        try:
            template = UnitName(name).template
        except ValueError:
            return  # no unit that takes part can have this name
        if template in self._facts:
            self._new_instances.add(name)
            self._news.set()

    async def news(self) -> None:
        """Wait until there is something to look at.

        No signal says when systemd's executor has become the service: so it is polled.
        """
        delay = _POLL_SEC
        while True:
            poll_at = trio.current_time() + delay if self._starting else math.inf
            with trio.move_on_at(min(poll_at, self._retry_at)):
                await self._news.wait()
            delay = min(delay * _POLL_GROWTH, _POLL_MAX_SEC)
            for name, start in self._starting.items():
                if start.process and not is_executor(start.process.pid):
                    self.look_at(name)
            if trio.current_time() >= self._retry_at:
                self._try_again()
            if self._news.is_set():
                return

    # --- looking ---

    async def update(self, systemd: Systemd1) -> bool:
        """Look at all that is due. If that fails for one unit alone, this is logged, and tried again later.

        Returns:
            Whether the unit files were read again.

        Raises:
            dbus.BusLost, dbus.Error: systemd cannot be reached. The next call looks at everything.
        """
        # All is struck off before it is looked at: a signal that comes meanwhile makes it due again.
        self._news = trio.Event()
        resubscribe, self._resubscribe = self._resubscribe, False
        everything, self._everything = self._everything, False
        new, self._new_instances = self._new_instances, set()
        try:
            if resubscribe:
                await systemd.subscribe()
            if not everything:
                everything = await self._has_own(systemd, new)
            if everything:
                with self._trying(""):
                    await self._look_at_files(systemd)
            while self._dirty:
                name = next(iter(self._dirty))
                del self._dirty[name]
                with self._trying(name):
                    await self._look_at_unit(systemd, name)
        except BaseException:
            self._everything = True
            self._resubscribe |= resubscribe
            raise
        return everything

    # --- what could not be looked at ---

    @contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """An error with one unit, or a bug that shows with it, must not keep the others from being looked at."""
        try:
            yield
        except Exception as error:
            if dbus.is_lost(error):
                raise
            self._put_off(name, error)
        else:
            self._failures.pop(name, None)

    def _put_off(self, name: str, error: Exception) -> None:
        self._retry_at = min(self._retry_at, trio.current_time() + _RETRY_SEC)
        if self._failures.get(name) == repr(error):
            return  # it is logged already
        self._failures[name] = repr(error)
        what = f"{name}: what became of it" if name else "which units take part"
        if isinstance(error, (OSError, dbus.Error)):
            journal.log.error(f"{what} cannot be found out, it is tried again: {error}")
        else:
            journal.log.exception(f"{what} cannot be found out, it is tried again: a bug in confext-watcher")

    def _try_again(self) -> None:
        self._retry_at = math.inf
        for name in self._failures:
            if name:
                self.look_at(name)
            else:
                self.look_at_everything()

    # --- what is found ---

    def interests(self) -> tuple[Interest, ...]:
        """Where a change may make other services take part, or give them other settings."""
        return unit_watch.interests(self.index.search_path or UNIT_PATHS, self._units.values())

    def is_outdated(self, name: str) -> bool:
        """See `UnitFacts.is_outdated()`. Quick."""
        facts = self._facts.get(name)
        return facts is not None and facts.is_outdated(self.index, self._state_directory)

    async def read_files(self) -> Collection[str]:
        """Read the unit files again: what stands there counts at once. Returns the units that take part; if these are
        others now, systemd is asked next."""
        known = set(self._facts)
        with self._trying(""):
            async with self._reading:
                facts = await self._read_files(self.index.search_path, dict.fromkeys(self._facts, False))
                if facts.keys() != self._facts.keys():
                    self.look_at_everything()
                known = set(self._facts).intersection(facts)
                self._facts.update({name: facts[name] for name in known})
            self._say(remark for each in self._facts.values() for remark in each.remarks)
            for name in known & self.services.keys():
                before = self.services[name]
                self.services[name] = replace(before, **facts[name].fields(before.main))
                if self.services[name] != before:
                    self.changed(name)
        return known

    async def _read_files(self, paths: Sequence[str], known: Mapping[str, bool]) -> dict[str, UnitFacts]:
        self.index = await trio.to_thread.run_sync(Index, paths)
        self._units.clear()
        slots = await trio.to_thread.run_sync(units_with_slots, self._state_directory)
        return await self._facts_in_files({**known, **slots})

    async def _facts_in_files(self, known: Mapping[str, bool]) -> dict[str, UnitFacts]:
        facts = await trio.to_thread.run_sync(all_facts, self.index, known)
        self._units.update((name, one.unit) for name, one in facts.items())
        return {name: one for name, one in facts.items() if one.settings.enabled}

    async def _look_at_files(self, systemd: Systemd1) -> None:
        paths = await systemd.unit_paths()
        async with self._reading:
            # Set before anything is asked: `_note_unit()` then recognises an instance that is loaded from now on.
            self._facts = facts = await self._read_files(paths or UNIT_PATHS, {})
        patterns = [name.replace("@.", "@*.") for name in facts if is_template(name)]
        found = await systemd.loaded(patterns) if patterns else {}
        instances = [name for name in found if name not in facts]
        if instances:
            own = await self._own_instances(systemd, instances)
            facts |= await self._facts_in_files(dict.fromkeys(own, False))
        self._say(remark for each in facts.values() for remark in each.remarks)
        self._names = {unit_path(name): name for name in facts}
        await systemd.follow_units(name for name in facts if not is_template(name))
        # Asked only now: the bus has sent no signal of what happened before it was asked to.
        states = await systemd.loaded(facts) if facts else {}
        for name in [name for name in self.services if name not in facts]:
            self._drop(name)
            self.changed(name)
        for name in facts:
            if states.get(name, "inactive") == "inactive":
                self._put(name)
            else:
                self._dirty[name] = None

    async def _has_own(self, systemd: Systemd1, instances: Iterable[str]) -> bool:
        """Whether one of the instances that were loaded just now takes part in its own right."""
        for name in await systemd.loaded(instances) if instances else ():
            if not await systemd.serves_one_connection(name):
                return True
        return False

    async def _own_instances(self, systemd: Systemd1, names: Sequence[str]) -> list[str]:
        """The instances that take part in their own right, of all that are loaded."""
        self._per_connection.intersection_update(names)
        for name in names:
            if name not in self._per_connection and await systemd.serves_one_connection(name):
                self._per_connection.add(name)
        return [name for name in names if name not in self._per_connection]

    async def _look_at_unit(self, systemd: Systemd1, name: str) -> None:
        if name not in self._facts:
            return
        start = await self._main(systemd, name)
        failed, headless, preparing = False, False, False
        failed_start: str | None = ""
        if start.process is None:
            state = await systemd.get(name, "ActiveState")
            failed = await has_failed(systemd, name, state)
            if failed and (failed_start := await self._ends.look(systemd, name)) is None:
                await self._look_at_unit(systemd, name)
                return
            headless = not failed and state in _ACTIVE and await systemd.get(name, "SubState") != "exited"
            preparing = state == "activating" and not failed  # ExecStartPre=
            if headless or state == "deactivating":
                start = await self._main(systemd, name)
                headless = headless and start.process is None  # else it was started since
                start = start if start.process else _Start(None, await systemd.invocation(name))
        self._put(name, start, preparing, failed=failed, failed_start=failed_start, headless=headless)

    async def _main(self, systemd: Systemd1, name: str) -> _Start:
        """The main process that a unit has now, and its start."""
        while pid := int(await systemd.get(name, "MainPID")):
            if (held := self._held(name, pid)) is not None:
                return held
            try:
                process = Process(pid)
            except Gone:
                await trio.sleep(_POLL_SEC)  # systemd notices it in a moment
                continue
            invocation = await systemd.invocation(name)
            restarts = int(await systemd.get(name, "NRestarts"))
            # systemd still has this PID: it has not reaped the process in between, so it is the one that we hold.
            if int(await systemd.get(name, "MainPID")) == pid and invocation:
                return _Start(process, invocation, restarts)
            process.close()
        return _NOT_RUNNING

    def _held(self, name: str, pid: int) -> _Start | None:
        """The start whose process has this PID, if it is held already."""
        service = self.services.get(name)
        held = self._starting.get(name)
        if service is not None and service.main is not None:
            held = _Start(service.main, service.invocation, service.restarts)
        if held is None or held.process is None or held.process.pid != pid or not held.process.alive():
            return None
        return held

    def _put(
        self,
        name: str,
        start: _Start = _NOT_RUNNING,
        preparing: bool = False,
        *,
        failed: bool = False,
        **more: Any,
    ) -> None:
        """Enter what is known of a service now. From here on the tracker owns the process of its start."""
        process, facts = start.process, self._facts[name]
        unfinished = process is not None and is_executor(process.pid)
        main = None if unfinished else process
        service = Service(
            name=name,
            main=main,
            invocation=start.invocation,
            restarts=start.restarts,
            blameless=self._ends.blameless(name, start.restarts, failed=failed),
            starting=unfinished or preparing,
            failed=failed,
            **more,
            **facts.fields(main),
        )
        before = self.services.get(name)
        self._close(name, but=process)
        if unfinished:
            self._starting[name] = start
        self.services[name] = service
        if before != service:
            self.changed(name)

    def _drop(self, name: str) -> None:
        self._close(name)
        self._ends.forget(name)
        self.services.pop(name, None)

    def _close(self, name: str, but: Process | None = None) -> None:
        """Let go of the processes that are held for a service, but for one."""
        service = self.services.get(name)
        for process in (service.main if service else None, self._starting.pop(name, _NOT_RUNNING).process):
            if process is not None and process is not but:
                process.close()

    def _say(self, remarks: Iterable[Remark]) -> None:
        """Log each remark once for as long as it holds."""
        present = set(remarks)
        for remark in present - self._said:
            journal.say(remark)
        self._said = present
