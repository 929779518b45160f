# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager of services that systemd runs: over D-Bus, as `systemctl` does.

`Tracker` knows the services, `UnitJobs` has units reload, `DaemonReload` makes one daemon-reload of many requests. Here
they are wired to one connection. It may be lost at any time (the bus restarts, systemd executes itself anew), and is
then made again. Nothing waits for that: what could not be done ends its round, and with the next connection comes
another.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

import trio
from jeepney import HeaderFields

from watcher.managers import cgroup, command
from watcher.managers.base import Ended, Reloaded, Service
from watcher.managers.exec_context import context_of
from watcher.managers.systemd import dbus
from watcher.managers.systemd.daemon_reload import DaemonReload, ReloadRefused
from watcher.managers.systemd.exec_settings import of_next_start
from watcher.managers.systemd.held_starts import HeldStarts
from watcher.managers.systemd.jobs import UnitJobs, patiently
from watcher.managers.systemd.kill_reload import KillReloads
from watcher.managers.systemd.systemd1 import DAEMON_RELOAD_SEC, JobResults, Systemd1, is_known
from watcher.managers.systemd.tracker import Tracker
from watcher.managers.systemd.transient import Transient
from watcher.managers.systemd.unit_facts import Listed, listed, said_again, stale, started_as
from watcher.managers.systemd.unit_files import Index
from watcher.managers.systemd.unit_log import UnitLog
from watcher.managers.systemd.wire import Received
from watcher.model import Copy, Later, Unsupported
from watcher.mounts.process import Gone, Process
from watcher.records import journal
from watcher.settings import signals
from watcher.settings.config import Settings
from watcher.watch.patient import PatientWatcher

_RECONNECT_SEC = (0.1, 0.2, 0.5, 1.0, 2.0)


async def check() -> None:
    """Return if there is a systemd that this manager can work with.

    Raises:
        Unsupported: it is too old; `str()` is one line for the administrator.
        dbus.BusLost: it cannot be reached over the system bus.
    """
    failure: BaseException | None = None
    try:
        async with dbus.connect(lambda message: None) as bus:
            await Systemd1(bus).check_version()
    except* (Unsupported, dbus.BusLost, dbus.Error) as group:
        failure = group.exceptions[0]
    if isinstance(failure, dbus.Error):
        raise dbus.BusLost(f"systemd does not answer: {failure}") from failure
    if failure is not None:
        raise failure


class Systemd:
    """See `Manager`.

    While systemd's executor is on its way to becoming a service, `main` is None and `starting` is set: the executor's
    namespaces are the host's, or half made.

    Args:
        settings: the watcher's; its `state_directory` must be the one that the generator knows.
    """

    def __init__(self, settings: Settings) -> None:
        self._state_directory = settings.state_directory
        self._systemd: Systemd1 | None = None
        # Services for which something was not done, as when systemd cannot be reached: the next connection may help.
        self._cut_off: set[str] = set()
        # Services whose drop-in may still wait for a daemon-reload.
        self._unlearned: set[str] = set()
        self._tracker = Tracker(settings.state_directory)
        # Of the files of units.
        self._watcher: PatientWatcher | None = None
        self._job_results = JobResults()
        self._held_starts = HeldStarts(settings.runtime_directory)
        self._unit_jobs = UnitJobs(self._connection, self._job_results, self._held_starts.let_go)
        self._kill_reloads = KillReloads(self._connection, self._unit_jobs, settings.state_directory)
        self._log = UnitLog()
        self.transient = Transient(self._connection, self._job_results)
        self._reloads = DaemonReload(
            self._daemon_reload, settings.reload_limit_burst, settings.reload_limit_interval_usec / 1_000_000
        )
        # By which unit files the drop-ins of which units were found to be as they should, and what each lists.
        self._learned: tuple[Index, dict[str, Listed]] = self._tracker.index, {}
        # The drop-ins that units should have, and did not get by a daemon-reload: no second one is made for them.
        self._hopeless: dict[str, str] = {}
        # What the drop-in of each unit cannot say, as it was logged last.
        self._complaints: dict[str, list[str]] = {}

    @property
    def services(self) -> Mapping[str, Service]:
        return self._tracker.services

    def close(self) -> None:
        """Let go of all processes, and of what waits for us."""
        self._held_starts.close()
        self._tracker.close()

    async def run(
        self, changed: Callable[[str], None], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See `Manager.run`; call `check()` before."""
        self._tracker.changed = changed
        self._held_starts.begin()
        with PatientWatcher() as self._watcher:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reloads.run)
                nursery.start_soon(self._follow_files, self._watcher)
                await self._stay_connected(task_status)

    def learned(self, service: Service) -> bool:
        index, learned = self._learned
        now = listed(self._state_directory, service.name)
        # Else it is a new version of what is listed already.
        return index is self._tracker.index and now.settled and learned.get(service.name) == now

    async def current(self, name: str) -> Service | None:
        if self._tracker.is_outdated(name) and name not in await self._tracker.read_files():
            return None
        return self.services.get(name)

    async def learn(self, service: Service) -> None:
        """See `Manager.learn`; the generator reads what was accepted, and the sysexts, from the service's record."""
        self._unlearned.add(service.name)
        if self._learned[0] is not self._tracker.index:
            self._learned = self._tracker.index, {}
        learned = self._learned[1]
        now = await trio.to_thread.run_sync(listed, self._state_directory, service.name)
        if not now.settled or learned.get(service.name) != now:
            if await self._stale([service.name]):
                await self._reloaded(service)
            else:
                learned[service.name] = now
        self._unlearned.discard(service.name)

    async def _reloaded(self, service: Service) -> None:
        try:
            await self._reloads.request()
        except ReloadRefused as error:
            self._cut_off.add(service.name)
            raise Later(f"its drop-in waits for a daemon-reload: {error}") from error

    def tell(self, service: Service, main: Process) -> Reloaded | None:
        kind = service.settings.reload
        if not kind.startswith("signal:") or not self._unit_jobs.was_up(service.name, service.invocation):
            return None
        return command.signal_now(main, signals.signal_number(kind.removeprefix("signal:")))

    async def reload(self, service: Service) -> Reloaded:
        return await self._after_learning(service, self._reload, "reload")

    async def _after_learning(
        self, service: Service, do: Callable[[Service], Awaitable[Reloaded]], word: str
    ) -> Reloaded:
        """Have systemd do something once it knows the drop-in of a service: what it starts gets the slots of that."""
        try:
            if service.name in self._unlearned:
                await self.learn(service)
        except Later as error:
            return Reloaded(ok=False, told=word, reason=str(error), interrupted=True)
        done = await do(service)
        if done.interrupted:
            self._cut_off.add(service.name)
        return done

    async def _reload(self, service: Service) -> Reloaded:
        kind = service.settings.reload
        if kind == "none" or service.main is None:
            return Reloaded(
                ok=True, reason="it was not told to reload, as Reload=none says" if kind == "none" else ""
            )
        try:
            if kind.startswith("signal:"):
                number = signals.signal_number(kind.removeprefix("signal:"))
                return await self._signal(service, service.main, number)
            if kind == "restart":
                return await self._unit_jobs.restart(service.name)
            reloaded = await self._by_its_unit(service, service.main, may_signal=kind != "unit")
            if reloaded is None and kind == "reload-or-restart":
                return await self._unit_jobs.restart(service.name)
        except (dbus.Error, dbus.BusLost) as error:
            reason = f"reload could not be followed: {error}"
            return Reloaded(ok=False, told="reload", reason=reason, interrupted=True)
        if reloaded is None and kind == "unit":
            return Reloaded(ok=False, reason="Reload=unit is set, but its unit says no way to reload it")
        return reloaded or Reloaded(ok=True)

    async def _by_its_unit(self, service: Service, held: Process, *, may_signal: bool) -> Reloaded | None:
        """Have it reload as its unit says, within `ReloadSec=`; None if that says no way.

        Args:
            may_signal: if that is nothing but a signal, send it.
        """
        limit = service.settings.reload_usec / 1e6
        try:
            if may_signal and await self._unit_jobs.is_up(service.name, service.invocation):
                with held.hold() as main:
                    if reloaded := await self._kill_reloads.send(service.name, main, limit):
                        return reloaded
        except Gone:
            pass  # systemd knows best what has become of it
        return await self._unit_jobs.reload(service.name, service.invocation, limit)

    async def _signal(self, service: Service, held: Process, number: int) -> Reloaded:
        try:
            # The service may be started anew meanwhile, and the tracker then closes `held`.
            with held.hold() as main:
                if not await self._unit_jobs.is_up(service.name, service.invocation):
                    return Reloaded(ok=True)
                return await command.send_signal(main, number)
        except Gone:
            return Reloaded(
                False, signals.signal_name(number), "its main process has ended", interrupted=True
            )

    async def started(self, service: Service) -> bool:
        try:
            return await self._unit_jobs.is_up(service.name, service.invocation)
        except (dbus.Error, dbus.BusLost) as error:
            self._cut_off.add(service.name)
            raise Later(f"whether its start is complete could not be found out: {error}") from error

    async def revive(self, service: Service) -> Reloaded:
        try:
            return await self._after_learning(service, lambda one: self._unit_jobs.start(one.name), "start")
        finally:
            self._held_starts.let_go(service.name)

    def hold_start(self, service: Service, other: str | None) -> None:
        if other is None:
            self._held_starts.let_go(service.name)
            return
        try:
            self._held_starts.hold(service.name, other)
        except OSError as error:
            what = (
                "if its next start fails on its new stack, the service is put right only after that has ended"
            )
            journal.log.warning(f"{service.name}: {what}: {error}", service=service.name)

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        if service.main is None:
            raise Gone(f"{service.name} is not running")
        with service.main.hold() as main:
            context = await command.aside(context_of, main)
            try:
                return await self.transient.run(
                    service.name, main, namespace, context, words, timeout_sec, unit=service.name
                )
            except Later:
                self._cut_off.add(service.name)
                raise

    async def execute_at_start(
        self, service: Service, copies: Sequence[Copy], words: Sequence[str], timeout_sec: float
    ) -> Ended:
        unit = started_as(service.name, self.services.values())
        again = await trio.to_thread.run_sync(said_again, self._tracker.index, unit)
        slots = f"{self._state_directory}/units"  # an instance may have those of its template
        settings = partial(of_next_start, copies=copies, slots=slots, again=again)
        try:
            return await self.transient.run_at_start(unit, words, timeout_sec, settings)
        except Later:
            self._cut_off.add(service.name)
            raise

    def processes(self, service: Service) -> list[int]:
        return [] if service.main is None else cgroup.processes(service.main.pid, service.name)

    async def logged(self, service: Service, since: int) -> str:
        return await self._log.errors(service.name, since)

    # --- the connection ---

    async def _stay_connected(self, task_status: trio.TaskStatus[None]) -> None:
        failures = 0
        while True:
            lost: list[BaseException] = []
            try:
                async with dbus.connect(self._on_signal) as bus:
                    systemd = Systemd1(bus)
                    await self._begin(systemd)
                    if failures:
                        journal.log.info("systemd can be reached again")
                    failures = 0
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    while True:
                        await self._tracker.news()
                        await self._update(systemd)
            except* (dbus.BusLost, dbus.Error) as group:
                lost += group.exceptions
            self._systemd = None
            self._job_results.lost()
            if not failures:
                journal.log.warning(f"systemd cannot be reached, it is tried again: {lost[0]}")
            await trio.sleep(_RECONNECT_SEC[min(failures, len(_RECONNECT_SEC) - 1)])
            failures += 1

    async def _begin(self, systemd: Systemd1) -> None:
        await systemd.follow()
        self._systemd = systemd
        self._kill_reloads.forget()
        self._tracker.look_at_everything()
        await self._update(systemd)
        cut_off, self._cut_off = self._cut_off, set()
        for name in cut_off:
            self._tracker.changed(name)

    async def _update(self, systemd: Systemd1) -> None:
        if await patiently(lambda: self._tracker.update(systemd)):
            await self._files_were_read()

    async def _needs_daemon_reload(self) -> bool:
        try:
            return bool(await self._stale(self.services))
        except Exception:  # noqa: BLE001 -- the daemon-reload meets it again, logs it, and tries again
            return True

    def _connection(self) -> Systemd1:
        if self._systemd is None:
            raise dbus.BusLost("systemd cannot be reached over D-Bus")
        return self._systemd

    def _on_signal(self, message: Received) -> None:
        if not is_known(message):
            return
        member = message.header.fields[HeaderFields.member]
        if member == "JobRemoved":
            self._job_results.note(message)
            return
        if member in ("NameOwnerChanged", "Reloading"):
            self._kill_reloads.forget()
        if member == "NameOwnerChanged":
            self._job_results.lost()  # what systemd sent before it owned the name was not heard
        self._tracker.note(message)

    # --- the files of units ---

    async def _follow_files(self, watcher: PatientWatcher) -> None:
        """Notice what comes, goes or is written without a daemon-reload: a `<unit>.confext.d/`, settings."""
        await watcher.watch("", self._tracker.interests())
        async for _ in watcher.changes():
            await self._tracker.read_files()
            await self._files_were_read()

    async def _files_were_read(self) -> None:
        # What was not watched when it was read may have changed in between.
        while self._watcher is not None and await self._watcher.watch("", self._tracker.interests()):
            await self._tracker.read_files()
        if await self._needs_daemon_reload():
            self._reloads.ask()

    # --- drop-ins ---

    async def _stale(self, names: Iterable[str]) -> list[str]:
        """The units that need a daemon-reload, without those that it does not help."""
        complaints: dict[str, list[str]] = {}
        found = await self._look_for_stale(names, complaints)
        for name, lines in complaints.items():
            for line in set(lines) - set(self._complaints.get(name, ())):
                journal.log.warning(line, service=name)
        self._complaints |= complaints
        return [name for name, text in found.items() if self._hopeless.get(name) != text]

    async def _look_for_stale(
        self, names: Iterable[str], complaints: dict[str, list[str]] | None = None
    ) -> dict[str, str]:
        look = partial(stale, self._tracker.index, list(names), self._state_directory, complaints=complaints)
        return await trio.to_thread.run_sync(look)

    async def _daemon_reload(self) -> None:
        before = await self._look_for_stale(self.services)
        if all(self._hopeless.get(name) == text for name, text in before.items()):
            return  # another daemon-reload has done it meanwhile
        try:
            await self._connection().manager("Reload", timeout=DAEMON_RELOAD_SEC)
        except (dbus.BusLost, dbus.Error) as error:
            raise ReloadRefused(str(error)) from error
        after = await self._look_for_stale(before)
        after = {name: text for name, text in after.items() if before.get(name) == text}
        for name in after:
            journal.log.error(
                f"{name}: daemon-reload did not give it its drop-in, it will start on what it picks itself; "
                "is the generator installed?",
                service=name,
            )
        self._hopeless = after
