# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services without systemd: `confext-watcher exec` starts and registers them, the daemon follows them here.

A registration is one JSON file, `$RUNTIME_DIRECTORY/services/NAME.json`, written by rename before the program is
executed. It names the process by PID and start time, so that a file left over from before a crash can never point at
another process. It stays when the process has ended: the slots of a service that does not run are kept ready for its
next `exec`, which replaces the registration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import select
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import trio

from watcher.managers import command
from watcher.managers.base import Ended, Reloaded, Service
from watcher.managers.exec_context import ExecContext, context_of
from watcher.model import Declared, Entry, Interest, Kind, Later, Remark, shown
from watcher.mounts.process import Gone, Process, descendants, namespace_id
from watcher.mounts.workers import MountWorkers
from watcher.records import durable, journal
from watcher.resolve import sources
from watcher.settings import config, signals
from watcher.settings.config import ServiceSettings
from watcher.settings.syntax import Assignment
from watcher.watch.watcher import Watcher

# What a unit may be called (systemd.unit(5)), with or without its type; with room for what names of files add to it.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,240}")
_SUFFIX = ".json"
_OF_UNITS = {
    "Reload": "use --reload-signal or --reload-command",
    "Enabled": "a service that is not to take part needs no exec",
}
_RELOAD_SEC = 90.0
_AGAIN_SEC = 1.0
_PID_MAX = 2**22  # PID_MAX_LIMIT of 64-bit kernels


@dataclass(frozen=True, slots=True)
class Registration:
    """What `exec` tells the daemon.

    Attributes:
        name: of the service.
        pid: of its main process, as the daemon sees it.
        started: its start time, clock ticks since boot.
        namespace: device and inode of the mount namespace it was started in.
        user_namespace: likewise; () as older versions wrote it.
        environment: "NAME=VALUE", what it was started with.
        confext_dirs, images, directories: where its layers come from, absolute paths.
        reload_signal: name of a signal, "" for none.
        reload_command: words of a command that is run in the service's mount namespace as its user.
        check, health_check: command lines, as `Check=` and `HealthCheck=` have them.
        settings: others of `[X-Confext]`, "KEY=VALUE".
    """

    name: str
    pid: int
    started: int
    namespace: tuple[int, int]
    confext_dirs: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    reload_signal: str = ""
    reload_command: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    health_check: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    user_namespace: tuple[int, ...] = ()
    environment: tuple[str, ...] = ()

    @property
    def declared(self) -> Declared:
        return declared(self.images, self.directories, self.confext_dirs)


def declared(images: Sequence[str], directories: Sequence[str], confext_dirs: Sequence[str]) -> Declared:
    """The sources of a standalone service, from its paths as given on the command line."""
    return Declared(
        images=tuple(_entry(path, Kind.IMAGE) for path in images),
        directories=tuple(_entry(path, Kind.DIRECTORY) for path in directories),
        confext_dirs=tuple(confext_dirs),
    )


def _entry(path: str, kind: Kind) -> Entry:
    return sources.entry(path.removeprefix("-"), kind, optional=path.startswith("-"), declared=True)


def service_settings(
    settings: Iterable[str], check: Sequence[str] = (), health_check: Sequence[str] = ()
) -> tuple[ServiceSettings, tuple[Remark, ...]]:
    """Settings of a standalone service, and what is wrong with them."""
    pairs = [setting.partition("=")[::2] for setting in settings]
    pairs += [("Check", command) for command in check] + [
        ("HealthCheck", command) for command in health_check
    ]
    assignments = [
        Assignment(config.SERVICE_SECTION, key.strip(), value.strip(), "--set", line)
        for line, (key, value) in enumerate(pairs, 1)
    ]
    values, remarks = config.service_settings(assignments)
    useless = (one for one in assignments if one.key in _OF_UNITS)
    return values, (
        *remarks,
        *(one.remark(f"{one.key}= does nothing here: {_OF_UNITS[one.key]}") for one in useless),
    )


def valid_name(name: str) -> bool:
    """Whether a service may be called that: what systemd allows as the name of a unit."""
    return bool(_NAME.fullmatch(name)) and not name.startswith(".")


def register(runtime_directory: str, registration: Registration) -> None:
    """Write a registration, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    directory = services_directory(runtime_directory)
    temporary = os.path.join(directory, f".{registration.name}.{registration.pid}")
    # In a container every start may have the same PID, and the last one may have been killed right here.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "w") as file:
        json.dump(dataclasses.asdict(registration), file)
    os.rename(temporary, registration_path(runtime_directory, registration.name))


def unregister(runtime_directory: str, name: str) -> None:
    """Remove a registration."""
    os.unlink(registration_path(runtime_directory, name))


def services_directory(runtime_directory: str) -> str:
    """Where registrations lie; made if it is not there."""
    directory = services_path(runtime_directory)
    durable.make(directory, 0o700)
    return directory


def services_path(runtime_directory: str) -> str:
    """Where registrations lie, if there are any."""
    return os.path.join(runtime_directory, "services")


def registration_path(runtime_directory: str, name: str) -> str:
    """The file of one registration."""
    return os.path.join(services_path(runtime_directory), name + _SUFFIX)


def registered(runtime_directory: str, name: str) -> Registration | None:
    """The registration of a service, None where there is none.

    Raises:
        ValueError: the file is not one of ours.
        OSError: it cannot be read now.
    """
    path = registration_path(runtime_directory, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO):
            raise ValueError("not a regular file of ours") from error
        raise
    with open(fd, encoding="utf-8") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            raise ValueError("not a regular file of ours")
        return _registration(file.read(), name)


def _registration(text: str, name: str) -> Registration:
    try:
        data = json.loads(text)
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        made = Registration(**data | lists)
        good = made.name == name and _is_sound(made)
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a registration") from error
    if not good:
        raise ValueError("not a registration")
    if made.reload_signal:
        signals.signal_number(made.reload_signal)
    return made


def _is_sound(made: Registration) -> bool:
    """Whether everything is of its type, and possible."""
    for field in dataclasses.fields(made):
        value: object = getattr(made, field.name)
        items = value if isinstance(value, tuple) else (value,)
        kind = int if "int" in str(field.type) else str
        if isinstance(value, tuple) != str(field.type).startswith("tuple"):
            return False
        if isinstance(value, tuple) and kind is int and len(value) not in (0, 2):
            return False
        if any(type(item) is not kind or (isinstance(item, str) and not _is_text(item)) for item in items):
            return False
    return 0 < made.pid <= _PID_MAX and len(made.namespace) == 2


def _is_text(item: str) -> bool:
    """Whether it can be given to the system: no NUL, and no surrogates but those that stand for bytes."""
    try:
        return b"\0" not in os.fsencode(item)
    except UnicodeEncodeError:
        return False


def registrations(runtime_directory: str) -> Iterator[str]:
    """Names of all that are registered, running or not any more."""
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.listdir(services_path(runtime_directory))):
            if entry.endswith(_SUFFIX) and not entry.startswith("."):
                yield entry.removesuffix(_SUFFIX)


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
        self._run_for = run
        self._services: dict[str, Service] = {}
        self._registrations: dict[str, Registration] = {}
        # All pidfds in one epoll instance, so that one task waits for the end of any service.
        self._ends = select.epoll()
        self._names: dict[int, str] = {}
        self._remarks: set[Remark] = set()
        self._unread = trio.Event()

    @property
    def services(self) -> Mapping[str, Service]:
        return self._services

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None:
        """Follow registrations and the ends of processes; see `Manager.run`."""
        directory = services_directory(self._runtime_directory)
        with Watcher() as watcher:
            watcher.set("", [Interest(directory, pattern=r"[^.].*\.json")])
            self._look(lambda name: None)
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_ends, changed)
                nursery.start_soon(self._look_again, changed)
                async for _ in watcher.changes():
                    self._look(changed)

    def close(self) -> None:
        """Let go of all processes."""
        for service in self._services.values():
            if service.main is not None:
                service.main.close()
        self._services.clear()
        self._ends.close()

    async def learn(self, service: Service, entries: Sequence[Entry], sysexts: Sequence[Entry] = ()) -> None:
        """Nothing to do: `exec` looks for itself."""

    async def reload(self, service: Service) -> Reloaded:
        """Send the signal or run the command that the service was registered with."""
        registration = self._registrations.get(service.name)
        if service.main is None or registration is None:
            return Reloaded(ok=True)  # it is not running, or takes no part any more
        try:
            if registration.reload_signal:
                return await command.send_signal(
                    service.main, signals.signal_number(registration.reload_signal)
                )
            if registration.reload_command:
                return await self._run_command(service.main, registration)
        except Gone:
            return Reloaded(ok=False, told="reload", reason="its main process has ended")
        return Reloaded(ok=True)

    async def _run_command(self, main: Process, registration: Registration) -> Reloaded:
        words = registration.reload_command
        what = f"reload command {shown(shlex.join(words))}"
        namespace = main.namespace()
        try:
            ended = await self._run_like(main, registration, namespace, words, _RELOAD_SEC)
        except Later as error:
            raise Later(f"{what} {error}") from error
        finally:
            os.close(namespace)
        reason = f"{what} {ended.reason}" if ended.reason else ""
        return Reloaded(not reason, "reload", reason, ended.output)

    async def started(self, service: Service) -> bool:
        """Nobody says when its start is complete: it is when it has been executed."""
        return True

    async def revive(self, service: Service) -> Reloaded:
        """Whoever ran `exec` starts it again, or does not."""
        return Reloaded(ok=True)

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        """See `Manager.execute`."""
        registration = self._registrations.get(service.name)
        if service.main is None or registration is None:
            raise Gone(f"{service.name} is not running")
        return await self._run_like(service.main, registration, namespace, words, timeout_sec)

    async def _run_like(
        self,
        held: Process,
        registration: Registration,
        namespace: int,
        words: Sequence[str],
        timeout_sec: float,
    ) -> Ended:
        self._workers.check_foreign(namespace_id(namespace))
        with held.hold() as main:
            who = await command.aside(_who, main, registration)
            return await self._run_for(registration.name, main, namespace, who, words, timeout_sec)

    async def processes(self, service: Service) -> list[int]:
        if service.main is None:
            return []
        # A supervisor may have started another service, which has a stack of its own.
        mains = {other.main.pid for other in self._services.values() if other.main is not None}
        # There may be tens of thousands.
        return [service.main.pid, *await command.aside(descendants, service.main.pid, apart=mains)]

    async def _look_again(self, changed: Callable[[str], None]) -> None:
        """What could not be read for want of descriptors, say, nobody tells us of."""
        while True:
            await self._unread.wait()
            await trio.sleep(_AGAIN_SEC)
            self._unread = trio.Event()
            self._look(changed)

    def _look(self, changed: Callable[[str], None]) -> None:
        """Compare what is registered with what is known. What cannot be read now stays as it is, and is read again."""
        remarks: set[Remark] = set()
        try:
            names = set(registrations(self._runtime_directory))
        except OSError as error:
            remarks.add(self._not_read(services_path(self._runtime_directory), error))
        else:
            for name in sorted(names | set(self._registrations)):
                try:
                    if self._update(name, name in names, remarks):
                        changed(name)
                except OSError as error:
                    remarks.add(self._not_read(registration_path(self._runtime_directory, name), error))
        for remark in sorted(remarks - self._remarks, key=lambda remark: remark.path):
            journal.say(remark)
        self._remarks = remarks

    def _not_read(self, path: str, error: OSError) -> Remark:
        self._unread.set()
        return Remark("warning", path, f"cannot be read, it is tried again: {error.strerror}")

    def _update(self, name: str, there: bool, remarks: set[Remark]) -> bool:
        """Whether a service came, changed, or went.

        Raises:
            OSError: that cannot be found out now; nothing was changed.
        """
        registration = None
        try:
            registration = registered(self._runtime_directory, name) if there else None
        except ValueError as error:
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
        """Its process, and the end of that from now on."""
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
        # `exec` has refused what is wrong with them.
        settings, _ = service_settings(registration.settings, registration.check, registration.health_check)
        service = Service(
            name=registration.name,
            declared=registration.declared,
            manager="standalone",
            settings=settings,
        )
        if main is not None:
            invocation = f"{registration.pid}-{registration.started}"
            service = dataclasses.replace(service, main=main, invocation=invocation)
            self._names[main.pidfd] = registration.name
        self._services[registration.name] = service

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

    async def _follow_ends(self, changed: Callable[[str], None]) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ends.fileno())
            for fd, _ in self._ends.poll(0):
                service = self._services[self._names[fd]]
                self._let_go(service)
                # Why it ended only its parent is told.
                self._services[service.name] = dataclasses.replace(
                    service, main=None, invocation="", failed=True
                )
                changed(service.name)


def _who(main: Process, registration: Registration) -> ExecContext:
    """Whom a command for a service is to be like. Blocks.

    Raises:
        Gone: it has ended.
        Later: nothing may be run for it now; the message says why, and what to do.
    """
    if not registration.user_namespace:
        raise Later(
            "could not be run: start the service again with `exec`, it was registered by an older version"
        )
    pairs = (pair.partition("=") for pair in registration.environment)
    who = context_of(main, {name: value for name, _, value in pairs})
    # Afterwards: there is no way back, so what was found counts in the one that it was started in.
    if namespace_id(f"/proc/{main.pid}/ns/user") != registration.user_namespace:
        raise Later(
            "could not be run: its main process has left the user namespace that it was started in;"
            " let it stay there, or give it no commands"
        )
    return who
