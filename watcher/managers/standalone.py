# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager of services without systemd: `confext-watcher exec` starts and registers them, here they are followed."""

from __future__ import annotations

import dataclasses
import os
import select
import shlex
from collections.abc import Callable, Mapping, Sequence

import trio

from watcher.managers import command
from watcher.managers.base import Ended, NoShadow, Reloaded, Service
from watcher.managers.exec_context import ExecContext, context_of
from watcher.managers.registration import (
    Registration,
    registered,
    registration_path,
    registrations,
    services_directory,
    services_path,
)
from watcher.model import Copy, Interest, Later, Remark, shown
from watcher.mounts.process import Gone, Process, descendants, namespace_id
from watcher.mounts.workers import MountWorkers
from watcher.records import journal
from watcher.settings import signals
from watcher.watch.watcher import Watcher

_AGAIN_SEC = 1.0


class Standalone:
    """The manager of services that were started with `confext-watcher exec`.

    Args:
        run: runs their checks and reload commands.
    """

    def __init__(
        self, runtime_directory: str, workers: MountWorkers, run: command.Run = command.run_as_child
    ) -> None:
        self._runtime_directory = runtime_directory
        self._workers = workers
        self._run = run
        self._changed: Callable[[str], None] = lambda name: None
        self._services: dict[str, Service] = {}
        self._registrations: dict[str, Registration] = {}
        # epoll(7) of all pidfds, so that one task can wait for the end of any service.
        self._ends = select.epoll()
        self._names: dict[int, str] = {}
        self._remarks: set[Remark] = set()
        self._unwatched: set[Remark] = set()
        self._unread = trio.Event()

    @property
    def services(self) -> Mapping[str, Service]:
        return self._services

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None:
        """Follow registrations and the ends of processes; see `Manager.run`."""
        directory = services_directory(self._runtime_directory)
        with Watcher() as watcher:
            watcher.set("", [Interest(directory, pattern=r"[^.].*\.json")])
            self._say_unwatched(watcher)
            self._look()
            self._changed = changed
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_ends)
                nursery.start_soon(self._look_again)
                async for _ in watcher.changes():
                    self._say_unwatched(watcher)
                    self._look()

    def _say_unwatched(self, watcher: Watcher) -> None:
        """Say, once for as long as it lasts, if new services are only found by looking from time to time."""
        unwatched = set(watcher.remarks())
        for remark in unwatched - self._unwatched:
            journal.say(remark)
        self._unwatched = unwatched

    def close(self) -> None:
        """Let go of all processes."""
        for service in self._services.values():
            if service.main is not None:
                service.main.close()
        self._services.clear()
        self._ends.close()

    async def current(self, name: str) -> Service | None:
        return self._services.get(name)

    async def learn(self, service: Service) -> None:
        """Nothing to do: `exec` looks for itself."""

    def learned(self, service: Service) -> bool:
        return True

    def tell(self, service: Service, main: Process) -> Reloaded | None:
        registration = self._registrations.get(service.name)
        if registration is None or not registration.reload_signal:
            return None
        return command.signal_now(main, signals.signal_number(registration.reload_signal))

    async def reload(self, service: Service) -> Reloaded:
        """Send the signal or run the command that the service was registered with."""
        registration = self._registrations.get(service.name)
        if service.main is None or registration is None:
            return Reloaded(ok=True)  # it is not running, or takes no part any more
        try:
            if registration.reload_signal:
                number = signals.signal_number(registration.reload_signal)
                return await command.send_signal(service.main, number)
            if registration.reload_command:
                return await self._run_reload_command(service.main, registration)
        except Gone:
            return Reloaded(ok=False, told="reload", reason="its main process has ended")
        return Reloaded(ok=True)

    async def _run_reload_command(self, main: Process, registration: Registration) -> Reloaded:
        words = registration.reload_command
        what = f"reload command {shown(shlex.join(words))}"
        namespace = main.namespace()
        try:
            seconds = registration.own_settings.reload_usec / 1e6
            ended = await self._execute(main, registration, namespace, words, seconds)
        except Later as error:
            raise Later(f"{what} {error}") from error
        finally:
            os.close(namespace)
        reason = f"{what} {ended.reason}" if ended.reason else ""
        return Reloaded(not reason, "reload", reason, ended.output)

    async def started(self, service: Service) -> bool:
        """Its start is complete once it has been executed: it has no way to say otherwise."""
        return True

    async def revive(self, service: Service) -> Reloaded:
        """Nothing to do: who ran `exec` may run it again."""
        return Reloaded(ok=True)

    def hold_start(self, service: Service, other: str | None) -> None:
        """Nothing to do: we start nothing again."""

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        registration = self._registrations.get(service.name)
        if service.main is None or registration is None:
            raise Gone(f"{service.name} is not running")
        return await self._execute(service.main, registration, namespace, words, timeout_sec)

    async def execute_at_start(
        self, service: Service, copies: Sequence[Copy], words: Sequence[str], timeout_sec: float
    ) -> Ended:
        raise NoShadow("what it is started with is known to `confext-watcher exec` alone")

    async def _execute(
        self,
        held: Process,
        registration: Registration,
        namespace: int,
        words: Sequence[str],
        timeout_sec: float,
    ) -> Ended:
        self._workers.check_foreign(namespace_id(namespace))
        with held.hold() as main:
            context = await command.aside(_context_of, main, registration)
            return await self._run(registration.name, main, namespace, context, words, timeout_sec)

    async def logged(self, service: Service, since: int) -> str:
        return ""

    def processes(self, service: Service) -> list[int]:
        if service.main is None:
            return []
        # A supervisor may have started another service, which has a stack of its own.
        return [service.main.pid, *descendants(service.main.pid, self._mains)]

    def _mains(self) -> set[int]:
        return {one.main.pid for one in list(self._services.values()) if one.main is not None}

    async def _look_again(self) -> None:
        """Read again what could not be read, for want of descriptors say: no event will say when it can be."""
        while True:
            await self._unread.wait()
            await trio.sleep(_AGAIN_SEC)
            self._unread = trio.Event()
            self._look()

    def _look(self) -> None:
        """Compare what is registered with what is known. What cannot be read now stays as it is until it can be."""
        remarks: set[Remark] = set()
        try:
            names = set(registrations(self._runtime_directory))
        except OSError as error:
            remarks.add(self._not_read(services_path(self._runtime_directory), error))
        else:
            for name in sorted(names | set(self._registrations)):
                try:
                    if self._update(name, remarks):
                        self._changed(name)
                except OSError as error:
                    remarks.add(self._not_read(registration_path(self._runtime_directory, name), error))
        for remark in sorted(remarks - self._remarks, key=lambda remark: remark.path):
            journal.say(remark)
        self._remarks = remarks

    def _not_read(self, path: str, error: OSError) -> Remark:
        self._unread.set()
        return Remark("warning", path, f"cannot be read, it is tried again: {error.strerror}")

    def _update(self, name: str, remarks: set[Remark]) -> bool:
        """Whether a service came, changed, or went.

        Raises:
            OSError: it cannot be read now; nothing was changed.
        """
        try:
            registration = registered(self._runtime_directory, name)
        except ValueError as error:
            registration = None
            text = f"ignored, start the service again with `exec`: {error}"
            remarks.add(Remark("warning", registration_path(self._runtime_directory, name), text))
        if registration == self._registrations.get(name):
            return False
        main = self._hold(registration) if registration is not None else None
        self._forget(name)
        if registration is not None:
            self._adopt(registration, main)
        return True

    def _hold(self, registration: Registration) -> Process | None:
        """Its process, whose end is noticed from now on; None: it has ended."""
        try:
            main = Process(registration.pid, registration.started, registration.namespace)
        except Gone:
            return None
        try:
            self._ends.register(main.pidfd, select.EPOLLIN)
        except OSError:
            main.close()
            raise
        return main

    def _adopt(self, registration: Registration, main: Process | None) -> None:
        self._registrations[registration.name] = registration
        self._services[registration.name] = Service(
            name=registration.name,
            declared=registration.declared,
            settings=registration.own_settings,
            main=main,
            invocation=f"{registration.pid}-{registration.started}" if main else "",
            manager="standalone",
        )
        if main is not None:
            self._names[main.pidfd] = registration.name

    def _forget(self, name: str) -> None:
        self._registrations.pop(name, None)
        service = self._services.pop(name, None)
        if service is not None:
            self._let_go(service)

    def _let_go(self, service: Service) -> None:
        if service.main is not None:
            self._ends.unregister(service.main.pidfd)
            del self._names[service.main.pidfd]
            service.main.close()

    async def _follow_ends(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ends.fileno())
            for fd, _ in self._ends.poll(0):
                service = self._services[self._names[fd]]
                self._let_go(service)
                # The kernel tells only its parent why it ended.
                self._services[service.name] = dataclasses.replace(
                    service, main=None, invocation="", failed=True
                )
                self._changed(service.name)


def _context_of(main: Process, registration: Registration) -> ExecContext:
    """What a command for a service gets. Blocks.

    Raises:
        Gone: it has ended.
        Later: no command may be run for it now; the message says why, and what to do.
    """
    if not registration.user_namespace:
        raise Later(
            "could not be run: start the service again with `exec`, it was registered by an older version"
        )
    pairs = (pair.partition("=") for pair in registration.environment)
    context = context_of(main, {name: value for name, _, value in pairs})
    # Asked afterwards: no process comes back to a user namespace, so it was in this one before, too.
    if namespace_id(f"/proc/{main.pid}/ns/user") != registration.user_namespace:
        raise Later(
            "could not be run: its main process has left the user namespace that it was started in;"
            " let it stay there, or give it no commands"
        )
    return context
