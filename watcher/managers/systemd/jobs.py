# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking systemd to reload or restart a unit, and following that to its end.

The job's mode is "fail": "replace" would cancel a stop that is queued already, and `systemctl stop` would seem to do
nothing. Where a job cannot be, because the unit is stopping or not running, nothing has to be told: its next start is
on the new stack anyway.
"""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import trio

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus, sd_notify
from watcher.managers.systemd.systemd1 import DESTRUCTIVE, NO_SUCH_UNIT, NOT_APPLICABLE, Jobs, Systemd1

OUTPUT_MAX: Final = 64 * 1024
_JOURNAL_SEC: Final = 5.0
_POLL_SEC: Final = 0.1

# How each way for a job to end reads in a sentence that begins with "reload" or "restart".
_ENDS: Final = {
    "failed": "failed",
    "timeout": "timed out",
    "canceled": "was canceled by another job",
    "dependency": "was not tried, a dependency failed",
    "assert": "was not tried, an assertion failed",
    "unsupported": "is not supported",
    "frozen": "was not tried, the unit is frozen",
    "concurrency": "was not tried, too many are running in its slice",
}
# How it took the job. Any other end came about without the unit: somebody stopped it, the host went down.
_VERDICTS: Final = frozenset({"failed", "timeout"})
# The unit was no longer running when it came to it.
_POINTLESS: Final = frozenset({"skipped", "invalid", "collected", "once"})
_NOT_THERE: Final = frozenset({NO_SUCH_UNIT, DESTRUCTIVE})
_COMMANDS: Final = ("ExecReload", "ExecReloadPost")  # the second in newer systemd only
_RUNNING: Final = frozenset({"active", "reloading", "refreshing"})
_CLD_EXITED: Final = 1


@dataclass(frozen=True, slots=True)
class Command:
    """The last run of one command of a unit, as ExecReload= shows it on the bus."""

    path: str
    pid: int
    begun_usec: int
    code: int
    status: int
    ignored: bool

    @property
    def failed(self) -> bool:
        return self.pid > 0 and not self.ignored and self.code != 0 and self.status != 0

    @property
    def end(self) -> str:
        how = "exited with status" if self.code == _CLD_EXITED else "was killed by signal"
        return f"{self.path} {how} {self.status}"


class _Ordered(Exception):
    """The unit has a job that waits for us to have started: another one would be merged with it, and wait as well."""

    def __init__(self) -> None:
        super().__init__("another job of it waits for confext-watcher to have started")


class UnitJobs:
    """Jobs of units.

    Args:
        systemd: gives the connection, waiting for one if there is none.
        jobs: told of the end of every job.
    """

    def __init__(self, systemd: Callable[[], Awaitable[Systemd1]], jobs: Jobs) -> None:
        self._systemd = systemd
        self._jobs = jobs
        # The invocation of each unit that was seen to have started.
        self._up: dict[str, str] = {}

    async def reload(self, unit: str, invocation: str) -> Reloaded | None:
        """Have it reload as its unit says; None if that says nothing.

        Args:
            invocation: of the process that is meant.
        """
        try:
            if not await self.is_up(unit, invocation):
                return Reloaded(ok=True)
            return await self._judge(unit, await self._follow(unit, "ReloadUnit"))
        except dbus.Error as error:
            if error.name == NOT_APPLICABLE:
                return None
            if error.name in _NOT_THERE:
                return Reloaded(ok=True)
            return _not_possible("reload", error)
        except _Ordered as error:
            return _not_possible("reload", error)

    async def restart(self, unit: str) -> Reloaded:
        """Restart it, unless it has been stopped meanwhile."""
        try:
            return await self._run(unit, "TryRestartUnit", "restart")
        except _Ordered as error:
            return _not_possible("restart", error)

    async def start(self, unit: str) -> Reloaded:
        """Start it again, also if it failed too often."""
        try:
            await (await self._systemd()).manager("ResetFailedUnit", "s", unit)
        except dbus.Error as error:
            if error.name != NO_SUCH_UNIT:
                return _not_possible("start", error)
        except dbus.BusLost as error:
            return _not_possible("start", error)
        try:
            return await self._run(unit, "StartUnit", "start")
        except _Ordered:
            return Reloaded(ok=True)  # it is started as soon as we are

    async def _run(self, unit: str, member: str, word: str) -> Reloaded:
        try:
            result = await self._follow(unit, member)
        except (dbus.Error, dbus.BusLost) as error:
            if isinstance(error, dbus.Error) and error.name in _NOT_THERE:
                return Reloaded(ok=True)
            return _not_possible(word, error)
        if result == "done" or result in _POINTLESS:
            return Reloaded(ok=True, told=word)
        return _ended_badly(word, result)

    async def _follow(self, unit: str, member: str) -> str:
        """The result of a job. If it can no longer be heard: by what the unit looks like afterwards."""
        job = ""
        while not job:
            try:
                with self._jobs.listening() as listener:
                    systemd = await self._systemd()
                    job = await systemd.manager(member, "ss", unit, await self._mode(systemd, unit))
                    return await listener.result(job) or await self._afterwards(unit, member)
            except dbus.BusLost:
                # Whether systemd heard it is not known. Twice reloaded does no harm, not at all would.
                await trio.sleep(_POLL_SEC)
            except dbus.Error as error:
                if error.name not in dbus.DISCONNECTED:
                    raise
                await trio.sleep(_POLL_SEC)
        return await self._afterwards(unit, member)

    async def _mode(self, systemd: Systemd1, unit: str) -> str:
        """ "fail", unless our own start is not complete: units that take part are ordered after it, and so are all of
        their jobs; the reload would wait for us, and we for it. ("ignore-dependencies" would cancel a queued stop.)"""
        if not sd_notify.is_starting():
            return "fail"
        if (await systemd.unit(unit, "Job"))[0]:
            raise _Ordered
        return "ignore-dependencies"

    async def _afterwards(self, unit: str, member: str) -> str:
        while (await self._patiently("unit", unit, "Job"))[0]:
            await trio.sleep(_POLL_SEC)
        result = await self._patiently(
            "service", unit, "ReloadResult" if member == "ReloadUnit" else "Result"
        )
        return {"success": "done", "timeout": "timeout"}.get(str(result), "failed")

    async def _patiently(self, kind: Literal["unit", "service"], unit: str, name: str) -> Any:
        """A property, also across a loss of the connection."""
        while True:
            try:
                systemd = await self._systemd()
                return await (systemd.unit(unit, name) if kind == "unit" else systemd.service(unit, name))
            except dbus.BusLost:
                await trio.sleep(_POLL_SEC)
            except dbus.Error as error:
                if error.name not in dbus.DISCONNECTED:
                    raise
                await trio.sleep(_POLL_SEC)

    async def is_up(self, unit: str, invocation: str) -> bool:
        """Whether it runs, having waited while it is still starting: it may have read the old files already, and a
        reload that is asked for during the start is taken as part of that, without anything being reloaded."""
        if self._up.get(unit) == invocation:
            return True
        while (state := await self._patiently("unit", unit, "ActiveState")) == "activating":
            await trio.sleep(_POLL_SEC)
        if state in _RUNNING:
            self._up[unit] = invocation
        return state in _RUNNING

    async def _judge(self, unit: str, result: str) -> Reloaded:
        if result == "done":
            return Reloaded(ok=True, told="reload")
        if result in _POINTLESS:
            return Reloaded(ok=True)
        reloaded = _ended_badly("reload", result)
        if reloaded.interrupted:
            return reloaded
        try:
            values = await (await self._systemd()).service_properties(unit)
        except (dbus.Error, dbus.BusLost):
            return reloaded  # the result is known, only its details are not
        if values.get("ReloadResult") == "timeout":
            return _ended_badly("reload", "timeout")  # of the job itself that is "failed"
        command = _failed_command(values)
        if command is None:
            return reloaded
        reason = f"{reloaded.reason}: {command.end}"
        return replace(reloaded, reason=reason, output=await _said(unit, command))


def _not_possible(word: str, error: Exception) -> Reloaded:
    return Reloaded(ok=False, told=word, reason=f"{word} was not possible: {error}", interrupted=True)


def _ended_badly(word: str, result: str) -> Reloaded:
    reason = f"{word} {_ENDS.get(result, result)}"
    return Reloaded(ok=False, told=word, reason=reason, interrupted=result not in _VERDICTS)


def _failed_command(values: Mapping[str, Any]) -> Command | None:
    rows = [row for name in _COMMANDS for row in values.get(name, ())]
    return next((command for row in rows if (command := _command(row)).failed), None)


def _command(row: tuple[Any, ...]) -> Command:
    """ExecReload, `a(sasbttttuii)`: path, arguments, ignored, times (begun: row 3), PID, si_code, status."""
    return Command(str(row[0]), int(row[7]), int(row[3]), int(row[8]), int(row[9]), bool(row[2]))


async def _said(unit: str, command: Command) -> str:
    """What the command wrote, from the journal: there it goes, and nowhere else."""
    since = f"--since=@{command.begun_usec / 1_000_000:.6f}"
    with trio.move_on_after(_JOURNAL_SEC):
        await _program(["journalctl", "--sync"])
        return await _program(
            [
                "journalctl",
                "--quiet",
                "--no-pager",
                "--output=cat",
                since,
                f"_SYSTEMD_UNIT={unit}",
                f"_PID={command.pid}",
            ]
        )
    return ""


async def _program(argv: list[str]) -> str:
    try:
        done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return ""  # no journalctl: then there is no journal to ask
    return done.stdout[-OUTPUT_MAX:].decode("utf-8", "backslashreplace")
