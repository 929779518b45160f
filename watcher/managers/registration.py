# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registrations: what `confext-watcher exec` tells the daemon of a service that it starts.

A registration is one JSON file, `$RUNTIME_DIRECTORY/services/NAME.json`. `exec` writes it by rename before it executes
the program. It names the process by PID and start time: a file that was left over by a crash never points at another
process. It stays when the process has ended, so that the slots of the service are kept ready for its next `exec`, which
replaces the registration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from watcher.model import Declared, Remark
from watcher.records import durable
from watcher.resolve import sources
from watcher.settings import config, signals
from watcher.settings.config import ServiceSettings
from watcher.settings.syntax import Assignment

# The name of a unit (systemd.unit(5)), with or without its type. Names of files add to it.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,240}")
_SUFFIX = ".json"
_OF_UNITS = {
    "Reload": "use --reload-signal or --reload-command",
    "Enabled": "a service that is not to take part needs no exec",
}
_PID_MAX = 2**22  # PID_MAX_LIMIT of 64-bit kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What `exec` is told of a service.

    Attributes:
        name: of the service.
        confext_dirs, images, directories: where its layers come from, absolute paths; with "-" one may be missing.
        reload_signal: name of a signal, "" for none.
        reload_command: words of a command that is run as the service would run it.
        check, health_check: command lines, as `Check=` and `HealthCheck=` have them.
        settings: others of `[X-Confext]`, "KEY=VALUE".
    """

    name: str
    confext_dirs: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    reload_signal: str = ""
    reload_command: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    health_check: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def declared(self) -> Declared:
        """Where its layers come from."""
        return sources.declare(
            [(path.removeprefix("-"), "", path.startswith("-")) for path in self.images],
            [(path.removeprefix("-"), path.startswith("-")) for path in self.directories],
            self.confext_dirs,
        )

    @property
    def own_settings(self) -> ServiceSettings:
        """Its `[X-Confext]`; `exec` has refused what is wrong with it."""
        return service_settings(self.settings, self.check, self.health_check)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration(ServiceOptions):
    """The options of a service, and its process.

    Attributes:
        pid: of its main process, as the daemon sees it.
        started: its start time, clock ticks since boot.
        namespace: device and inode of the mount namespace that it was started in.
        user_namespace: likewise; () in a registration by an older version.
        environment: "NAME=VALUE", what it was started with.
    """

    pid: int
    started: int
    namespace: tuple[int, int]
    user_namespace: tuple[int, ...] = ()
    environment: tuple[str, ...] = ()


def service_settings(
    settings: Iterable[str], check: Sequence[str] = (), health_check: Sequence[str] = ()
) -> tuple[ServiceSettings, tuple[Remark, ...]]:
    """Settings of a standalone service, and what is wrong with them."""
    given = [("--set", *setting.partition("=")[::2]) for setting in settings]
    given += [("--check", "Check", line) for line in check]
    given += [("--health-check", "HealthCheck", line) for line in health_check]
    assignments = [
        Assignment(config.SERVICE_SECTION, key.strip(), value.strip(), option, line)
        for line, (option, key, value) in enumerate(given, 1)
    ]
    values, remarks = config.service_settings(assignments)
    useless = [
        one.remark(f"{one.key}= does nothing here: {_OF_UNITS[one.key]}")
        for one in assignments
        if one.key in _OF_UNITS
    ]
    return values, (*remarks, *useless)


def valid_name(name: str) -> bool:
    """Whether a service may have this name: systemd would allow it for a unit."""
    return bool(_NAME.fullmatch(name)) and not name.startswith(".")


# Of each value: its name, its type or that of its items, and whether there are several.
_KINDS = tuple(
    (field.name, int if "int" in str(field.type) else str, str(field.type).startswith("tuple"))
    for field in dataclasses.fields(Registration)
)


def register(runtime_directory: str, registration: Registration) -> None:
    """Write a registration, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    directory = services_directory(runtime_directory)
    temporary = os.path.join(directory, f".{registration.name}.{registration.pid}")
    # In a container `exec` may have the same PID at each start, and may have been killed here at the last one.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "w") as file:
        json.dump(dataclasses.asdict(registration), file)
    os.rename(temporary, registration_path(runtime_directory, registration.name))


def unregister(runtime_directory: str, name: str) -> None:
    """Remove a registration."""
    os.unlink(registration_path(runtime_directory, name))


def services_directory(runtime_directory: str) -> str:
    """Where registrations lie; it is made if it is missing."""
    directory = services_path(runtime_directory)
    durable.make(directory, 0o700)
    return directory


def services_path(runtime_directory: str) -> str:
    """Where registrations lie; it may be missing."""
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
        return parse(file.read(), name)


def parse(text: str, name: str) -> Registration:
    """The registration of a service, by the content of its file.

    Raises:
        ValueError: it is none.
    """
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
    """Whether each value has its type, and is possible."""
    for name, kind, several in _KINDS:
        value: object = getattr(made, name)
        if isinstance(value, tuple) != several:
            return False
        if isinstance(value, tuple) and kind is int and len(value) not in (0, 2):
            return False
        for item in value if isinstance(value, tuple) else (value,):
            if type(item) is not kind or (isinstance(item, str) and not _is_text(item)):
                return False
    return 0 < made.pid <= _PID_MAX and len(made.namespace) == 2


def _is_text(item: str) -> bool:
    """Whether it can be a path or an argument: no NUL, and no surrogates but those that stand for bytes."""
    try:
        return b"\0" not in os.fsencode(item)
    except UnicodeEncodeError:
        return False


def registrations(runtime_directory: str) -> Iterator[str]:
    """Names of all services that are registered, running or not."""
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.listdir(services_path(runtime_directory))):
            if entry.endswith(_SUFFIX) and not entry.startswith("."):
                yield entry.removesuffix(_SUFFIX)
