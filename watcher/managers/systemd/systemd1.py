# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's D-Bus interface (org.freedesktop.systemd1(5)), as far as it is needed: units, their signals, jobs.

A job can end before the reply that names it has been read. So who starts one listens for the ends of all jobs from
before the call (`JobResults.listening`), and then looks up the one that the reply names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio
from jeepney import HeaderFields, MatchRule

from watcher.managers.systemd.dbus import CALL_SEC, PROPERTIES, Bus, Error, require
from watcher.managers.systemd.wire import Received
from watcher.model import Unsupported
from watcher.settings.config import SYSTEMD_OLDEST
from watcher.settings.unit_names import UnitName

NAME: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = f"{NAME}.Manager"
JOB: Final = f"{NAME}.Job"
UNIT: Final = f"{NAME}.Unit"
SERVICE: Final = f"{NAME}.Service"

DAEMON_RELOAD_SEC: Final = 300.0
UNKNOWN_OBJECT: Final = "org.freedesktop.DBus.Error.UnknownObject"
NO_SUCH_UNIT: Final = f"{NAME}.NoSuchUnit"
# From ReloadUnit(): the unit has no way to reload; a stop is queued.
NOT_APPLICABLE: Final = f"{NAME}.JobTypeNotApplicable"
DESTRUCTIVE: Final = f"{NAME}.TransactionIsDestructive"

_ALREADY_SUBSCRIBED: Final = f"{NAME}.AlreadySubscribed"

# Signatures of the answers of methods, and of properties. They are checked once; then the values are used unchecked.
_ANSWERS: Final = {
    "ListUnitsByNames": "a(ssssssouso)",
    "ListUnitsByPatterns": "a(ssssssouso)",
    "ReloadUnit": "o",
    "RestartUnit": "o",
    "StartTransientUnit": "o",
    "StartUnit": "o",
    "StopUnit": "o",
    "TryRestartUnit": "o",
}
_PROPERTIES: Final = {
    MANAGER: {"UnitPath": "as", "Version": "s"},
    UNIT: {
        "ActiveState": "s",
        "FreezerState": "s",
        "InvocationID": "ay",
        "Job": "(uo)",
        "LoadState": "s",
        "PropagatesReloadTo": "as",
        "RequiredBy": "as",
        "ReloadPropagatedFrom": "as",
        "SubState": "s",
        "TriggeredBy": "as",
        "WantedBy": "as",
    },
    SERVICE: {
        "ExecCondition": "a(sasbttttuii)",
        "ExecReload": "a(sasbttttuii)",
        "ExecReloadEx": "a(sasasttttuii)",
        "ExecReloadPost": "a(sasbttttuii)",
        "ExecStartPost": "a(sasbttttuii)",
        "ExecStartPre": "a(sasbttttuii)",
        "MainPID": "u",
        "NRestarts": "u",
        "ExecMainCode": "i",
        "ExecMainPID": "u",
        "ExecMainStatus": "i",
        "ReloadResult": "s",
        "Result": "s",
        "Type": "s",
    },
}


def unit_path(name: str) -> str:
    """Object path of a unit: each byte that is no letter, nor a digit after the first character, becomes _XX."""
    escaped = "".join(
        char if char.isascii() and (char.isalpha() or (char.isdigit() and index)) else _hex(char)
        for index, char in enumerate(name)
    )
    return f"{PATH}/unit/{escaped or '_'}"


def _hex(char: str) -> str:
    return "".join(f"_{byte:02x}" for byte in char.encode())


def properties_rule(unit: str | None) -> MatchRule:
    """Changes of one service, or of all.

    With each change systemd tells first what is the service's own, then what every unit has: send_changed_signal() in
    src/core/dbus-unit.c. The first says enough.
    """
    where = {"path_namespace": f"{PATH}/unit"} if unit is None else {"path": unit_path(unit)}
    rule = MatchRule(type="signal", sender=NAME, interface=PROPERTIES, member="PropertiesChanged", **where)
    rule.add_arg_condition(0, SERVICE)
    return rule


# Signatures of the signals that are followed (org.freedesktop.systemd1(5), the D-Bus Specification).
_SIGNALS: Final = {
    "JobRemoved": "uoss",
    "NameOwnerChanged": "sss",
    "PropertiesChanged": "sa{sv}as",
    "Reloading": "b",
    "UnitNew": "so",
}


def is_known(message: Received) -> bool:
    """Whether a signal is one of those that are followed, with the arguments that it should have."""
    fields = message.header.fields
    signature = _SIGNALS.get(fields.get(HeaderFields.member))
    return signature is not None and fields.get(HeaderFields.signature) == signature


class JobResults:
    """How jobs end, for tasks that wait for one."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    def note(self, message: Received) -> None:
        """A JobRemoved signal came."""
        if self._listeners:  # most jobs are nobody's here
            self.ended(message.body[1], message.body[3])

    def ended(self, job: str, result: str) -> None:
        """A job has ended."""
        for listener in self._listeners:
            listener.ended(job, result)

    def lost(self) -> None:
        """The connection was lost: no more ends will be heard of jobs that were started over it."""
        for listener in self._listeners:
            listener.lost()

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)


class Listener:
    """The jobs that have ended since it began to listen."""

    def __init__(self) -> None:
        self._results: dict[str, str] = {}
        self._awaited = ""
        self._news = trio.Event()
        self._deaf = False

    def ended(self, job: str, result: str) -> None:
        self._results[job] = result
        if job == self._awaited:  # 50 that wait are not woken by each other's jobs
            self._wake()

    def lost(self) -> None:
        self._deaf = True
        self._wake()

    async def result(self, job: str) -> str:
        """How a job ended ("done", "failed", "timeout", ...); "" if that can no longer be heard."""
        self._awaited = job
        while job not in self._results and not self._deaf:
            await self._news.wait()
        return self._results.get(job, "")

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


class Systemd1:
    """systemd at the other end of a bus. All methods raise `dbus.Error` and `dbus.BusLost`, as `Bus.call` does."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._matched: set[str | None] = set()

    async def manager(
        self, member: str, signature: str = "", *arguments: Any, timeout: float = CALL_SEC
    ) -> Any:
        """A method of the manager: its only result, or None."""
        answer = _ANSWERS.get(member)
        reply = await self._bus.call(
            NAME, PATH, MANAGER, member, signature, *arguments, answer=answer, timeout=timeout
        )
        return reply[0] if reply else None

    async def check_version(self) -> None:
        """
        Raises:
            Unsupported: too old.
        """
        version = str(await self._get(PATH, "Version"))
        number = re.match(r"v?([0-9]{1,9})(?:[.~ -]|\Z)", version)
        if number and int(number[1]) < SYSTEMD_OLDEST:
            raise Unsupported(
                f"systemd {version} has no configuration extensions for services:"
                f" {SYSTEMD_OLDEST} or newer is needed"
            )

    async def unit_paths(self) -> tuple[str, ...]:
        """The unit search path, highest precedence first."""
        return tuple(await self._get(PATH, "UnitPath"))

    async def follow(self) -> None:
        """Have the bus send the manager's signals."""
        await self._bus.hear(NAME)
        for member in ("JobRemoved", "Reloading", "UnitNew"):
            rule = MatchRule(type="signal", sender=NAME, interface=MANAGER, member=member, path=PATH)
            await self._bus.add_match(rule)
        await self.manager("Subscribe")

    async def subscribe(self) -> None:
        """Have systemd send signals. It may have been asked before."""
        try:
            await self.manager("Subscribe")
        except Error as error:
            if error.name != _ALREADY_SUBSCRIBED:
                raise

    async def follow_units(self, names: Iterable[str]) -> None:
        """Have the bus send the changes of exactly these units.

        By default the bus allows a connection 512 rules. With more units it sends the changes of all, and the tracker
        passes over those of others.
        """
        wanted: set[str | None] = set(names)
        if len(wanted) > 400:
            wanted = {None}
        for unit in wanted - self._matched:
            await self._bus.add_match(properties_rule(unit))
            self._matched.add(unit)
        for unit in self._matched - wanted:
            await self._bus.remove_match(properties_rule(unit))
            self._matched.discard(unit)

    async def loaded(self, patterns: Iterable[str]) -> dict[str, str]:
        """The loaded units among these names and shell patterns, with the ActiveState of each."""
        found = await self.manager("ListUnitsByPatterns", "asas", [], list(patterns))
        return {row[0]: row[3] for row in found}

    async def state_and_job(self, unit: str) -> tuple[str, int]:
        """ActiveState of a unit and the number of its job, 0 without one, at one moment."""
        found = await self.manager("ListUnitsByNames", "as", [unit])
        return (found[0][3], found[0][7]) if found else ("inactive", 0)

    async def cancel_job(self, job: str) -> str:
        """Cancel a job: its state at that moment, "waiting" or "running"; "" if it has just ended."""
        try:
            state = str(await self._bus.get(NAME, job, JOB, "State", "s"))
            await self._bus.call(NAME, job, JOB, "Cancel")
        except Error as error:
            if error.name != UNKNOWN_OBJECT:
                raise
            return ""
        return state

    async def job_type(self, unit: str) -> str:
        """What the job of a unit is to do, "restart"; "" if it has none."""
        number, path = await self.get(unit, "Job")
        try:
            return str(await self._bus.get(NAME, path, JOB, "JobType", "s")) if number else ""
        except Error as error:
            if error.name != UNKNOWN_OBJECT:
                raise
            return ""  # it has just ended

    async def get(self, unit: str, name: str) -> Any:
        """A property of a unit or a service. systemd loads the unit if it has to."""
        return await self._get(unit_path(unit), name)

    async def service_properties(self, unit: str) -> dict[str, Any]:
        """All properties that only services have, by name."""
        return {name: value for name, (_, value) in (await self.signed_properties(unit)).items()}

    async def signed_properties(self, unit: str) -> dict[str, tuple[str, Any]]:
        """All properties that only services have, by name, each with its signature."""
        reply = await self._bus.call(
            NAME, unit_path(unit), PROPERTIES, "GetAll", "s", SERVICE, answer="a{sv}"
        )
        found: dict[str, tuple[str, Any]] = reply[0]
        for name, (signature, _) in found.items():
            require(name, signature, _PROPERTIES[SERVICE].get(name))
        return found

    async def serves_one_connection(self, instance: str) -> bool:
        """Whether an instance serves one connection (`Accept=yes`). Such instances end soon and have a new name each
        time: they start on the stack of their template, and keep it."""
        socket = (UnitName(instance).template or "").replace("@.service", ".socket")
        return socket in await self.get(instance, "TriggeredBy")

    async def invocation(self, unit: str) -> str:
        """InvocationID, 32 hexadecimal digits."""
        return bytes(await self.get(unit, "InvocationID")).hex()

    async def socket_result(self, unit: str) -> str:
        """Why a socket has failed."""
        return str(await self._bus.get(NAME, unit_path(unit), f"{NAME}.Socket", "Result", "s"))

    async def _get(self, path: str, name: str) -> Any:
        (found,) = (item for item in _PROPERTIES.items() if name in item[1])
        interface, kinds = found
        return await self._bus.get(NAME, path, interface, name, kinds[name])
