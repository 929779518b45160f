# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command for a service in a unit of its own: outside our sandbox, inside the limits of the service.

A child of the watcher would have the watcher's system call filter and private network: `nginx -t` or a health check
would fail for reasons that have nothing to do with the configuration. And the watcher would need the right to become
any user. A transient unit has what systemd gives every unit, and systemd kills all of its processes at its end.

A command is a check, a health check, or the reload command of a service that `exec` has started. It enters the
namespaces of a service that runs. For one that does not, systemd makes them anew, as for its next start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from watcher.managers import enter
from watcher.managers.base import Ended, NoShadow
from watcher.managers.command import PROGRAM, file_of, gather, namespaces, path_of, too_long
from watcher.managers.exec_context import ExecContext, ExecOrder
from watcher.managers.systemd import dbus, ends
from watcher.managers.systemd.exec_settings import Property, Value, limits
from watcher.managers.systemd.systemd1 import JobResults, Systemd1
from watcher.managers.systemd.unit_files import CHECKS
from watcher.model import Later
from watcher.mounts.process import Process
from watcher.settings.signals import reason_of

# Seconds for systemd to start and to end the command, besides what the command may take.
_GRACE_SEC: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Command:
    """What is run in a transient unit.

    Attributes:
        service: what it is run for.
        begin: a row of ExecStart, `(sasb)`.
        properties: of the unit, beside those of each.
        input: path of what it reads on standard input; "": nothing.
        at_start: systemd itself makes what the command sees. If that fails, it is no verdict of the command.
    """

    service: str
    begin: tuple[str, list[str], bool]
    timeout_sec: float
    properties: Callable[[Systemd1], Awaitable[list[Property]]]
    input: str = ""
    at_start: bool = False


class Transient:
    """Runs commands in transient units.

    Args:
        systemd: gives the connection. Raises BusLost: there is none now.
        results: is told of the end of every job.
    """

    def __init__(self, systemd: Callable[[], Systemd1], results: JobResults) -> None:
        self._systemd = systemd
        self._results = results

    async def run(
        self,
        service: str,
        main: Process,
        namespace: int,
        context: ExecContext,
        words: Sequence[str],
        timeout_sec: float,
        unit: str = "",
    ) -> Ended:
        """See `command.Run`; Later also if systemd does not tell how the command ended.

        Args:
            unit: the unit whose limits the command gets; "": none but those of any unit.
        """
        with namespaces(main, namespace) as paths, file_of(ExecOrder(paths, context, words)) as path:
            begin = (PROGRAM[0], [*PROGRAM, path], False)

            async def properties(systemd: Systemd1) -> list[Property]:
                return limits(await systemd.signed_properties(unit)) if unit else []

            return await self._gathered(_Command(service, begin, timeout_sec, properties))

    async def run_at_start(
        self,
        unit: str,
        words: Sequence[str],
        timeout_sec: float,
        layers: Callable[[Mapping[str, Value]], list[Property]],
    ) -> Ended:
        """Run a command as a process of the unit's next start would be run, see `exec_settings.of_next_start()`.

        Args:
            layers: that function, with all but its first argument.

        Raises:
            NoShadow: what systemd does before the command begins has failed.
            Later: as `run()`.
        """

        async def properties(systemd: Systemd1) -> list[Property]:
            if (state := await systemd.get(unit, "LoadState")) != "loaded":
                raise NoShadow(f"its unit is {state}")
            return layers(await systemd.signed_properties(unit))

        # systemd would put variables in; whoever wrote the check means the words as they are.
        begin = (words[0], [word.replace("$", "$$") for word in words], False)
        return await self._gathered(_Command(unit, begin, timeout_sec, properties, at_start=True))

    async def run_aside(
        self, service: str, words: Sequence[str], text: bytes, environment: Sequence[str], timeout_sec: float
    ) -> Ended:
        """Run a command that is about a service and not of it, as root.

        Args:
            text: what it reads on standard input.
            environment: "NAME=VALUE", beside what systemd gives any unit.

        Raises:
            Later: as `run()`.
        """
        with open(os.memfd_create("confext-watcher-text", os.MFD_CLOEXEC), "wb", buffering=0) as file:
            file.write(text)

            async def properties(_: Systemd1) -> list[Property]:
                return [("Environment", ("as", list(environment)))]

            begin = (words[0], [word.replace("$", "$$") for word in words], False)
            command = _Command(service, begin, timeout_sec, properties, path_of(file.fileno()))
            return await self._gathered(command)

    async def start(self, unit: str, timeout_sec: float) -> str:
        """Start a unit, and wait until that is done; why not, in words that follow the unit's name, or "".

        Raises:
            Later: systemd does not tell.
        """
        try:
            with self._results.listening() as listener, trio.fail_after(timeout_sec):
                job = await self._systemd().manager("StartUnit", "ss", unit, "fail")
                result = await listener.result(job)
        except (dbus.Error, dbus.BusLost) as error:
            raise Later(f"could not be started: {error}") from error
        except trio.TooSlowError as error:
            raise Later(f"was not started within {timeout_sec:g} s, as {unit}") from error
        if not result:
            raise Later("could not be followed to its end: systemd cannot be reached")
        return "" if result == "done" else f"could not be started as {unit}: {result}"

    async def _gathered(self, command: _Command) -> Ended:
        """Run it, with what it prints."""
        output = bytearray()
        failure: Exception | None = None
        reason = ""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stream = trio.lowlevel.FdStream(reading)
        with contextlib.closing(stream), open(writing, "wb", buffering=0) as printed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gather, stream, output)
                try:
                    reason = await self._attempt(command, path_of(writing))
                except (Later, NoShadow) as error:
                    failure = error
                printed.close()
                # A process that the command has left running may hold the pipe open.
                nursery.cancel_scope.deadline = trio.current_time() + 0.1
        if failure is not None:
            raise failure
        return Ended(reason, output.decode(errors="replace"))

    async def _attempt(self, command: _Command, output: str) -> str:
        try:
            return await self._follow(command, output)
        except (dbus.Error, dbus.BusLost) as error:
            raise Later(f"could not be run: {error}") from error
        except trio.TooSlowError as error:
            raise Later("could not be run: systemd did not start or end it in time") from error

    async def _follow(self, command: _Command, output: str) -> str:
        systemd = self._systemd()
        name = f"{CHECKS}{secrets.token_hex(8)}.service"
        own: list[Property] = [
            ("Description", ("s", f"Command of confext-watcher for {command.service}")),
            ("Type", ("s", "oneshot")),
            ("ExecStart", ("a(sasb)", [command.begin])),
            ("StandardInputFile", ("s", command.input))
            if command.input
            else ("StandardInput", ("s", "null")),
            ("StandardOutputFile", ("s", output)),
            ("StandardError", ("s", "inherit")),
            ("TimeoutStartUSec", ("t", round(command.timeout_sec * 1_000_000))),
            ("TimeoutStopUSec", ("t", 1_000_000)),
            ("CollectMode", ("s", "inactive-or-failed")),
            # systemd keeps the unit until we have asked how it ended, or are gone.
            ("AddRef", ("b", True)),
        ]
        with self._results.listening() as listener, trio.fail_after(command.timeout_sec + _GRACE_SEC):
            try:
                properties = [*await command.properties(systemd), *own]
                job = await systemd.manager(
                    "StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", properties, []
                )
            except dbus.Error as error:
                if command.at_start and error.name != dbus.FAILED:
                    raise NoShadow(f"systemd does not take its settings: {error}") from error
                raise
            result = await listener.result(job)
            try:
                if command.at_start:
                    await _require_as_given(systemd, name, dict(properties))
                return await _reason(systemd, name, result, command)
            finally:
                with (
                    contextlib.suppress(dbus.Error, dbus.BusLost),
                    trio.move_on_after(_GRACE_SEC, shield=True),
                ):
                    await systemd.manager("UnrefUnit", "s", name)


async def _require_as_given(systemd: Systemd1, name: str, given: Mapping[str, Value]) -> None:
    """Raise Later where the command may not have been run as its unit was given it, or without its layers.

    A daemon-reload has systemd read the file of a transient unit, and that is not all as it was: 257 writes
    `ExtensionImages=` without the paths (`systemctl cat` shows it), and 262 a "$$" of the command as four. Whether the
    command had begun before is not known.
    """
    found = await systemd.service_properties(name)
    for key in ("ExtensionImages", "ExtensionDirectories", "ExecStart"):
        if _heads(found[key]) != _heads(given[key][1]):
            raise Later("could not be run: systemd has read its units anew at the same time (daemon-reload)")


def _heads(value: Any) -> list[Any]:
    """What each row begins with: a path, or a command and its words."""
    return [one if isinstance(one, str) else (one[0], one[1]) for one in value]


async def _reason(systemd: Systemd1, name: str, result: str, command: _Command) -> str:
    if result == "done":
        return ""
    if result == "timeout":
        return too_long(command.timeout_sec)
    if result == "failed":
        values = await systemd.service_properties(name)
        if values["Result"] == "timeout":
            return too_long(command.timeout_sec)
        if values["Result"] == "oom-kill":
            return "was killed: it took more memory than the service may have"
        status = int(values["ExecMainStatus"])
        if command.at_start and status != enter.EXIT_EXEC and (why := ends.blameless(values)):
            raise NoShadow(why)
        if values["Result"] == "exit-code":
            return "cannot be started" if status == enter.EXIT_EXEC else reason_of(status)
        if values["Result"] in ("signal", "core-dump"):
            return reason_of(-status)
        return f"failed: {values['Result']}"
    # It was canceled, by a shutdown say: that is no verdict of the command.
    raise Later(f"could not be followed to its end: {result or 'systemd cannot be reached'}")
