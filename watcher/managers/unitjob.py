# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking systemd to reload or restart a unit, and following that to its end.

The job's mode is "fail": "replace" would cancel a stop that is queued already, and `systemctl stop` would seem to do
nothing. Where a job cannot be, because the unit is stopping or not running, nothing has to be told: its next start is
on the new stack anyway.
"""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import trio

from watcher import dbus
from watcher.managers import Reloaded
from watcher.managers.systemd1 import CONFLICTING, NO_SUCH_UNIT, NOT_APPLICABLE, Jobs, Systemd1

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
# The unit was no longer running when it came to it.
_POINTLESS: Final = frozenset({"skipped", "invalid", "collected", "once"})
_NOT_THERE: Final = frozenset({NO_SUCH_UNIT, CONFLICTING})
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


class UnitJobs:
    """Jobs of units.

    Args:
        systemd: gives the connection, waiting for one if there is none.
        jobs: told of the end of every job.
    """

    def __init__(self, systemd: Callable[[], Awaitable[Systemd1]], jobs: Jobs) -> None:
        self._systemd = systemd
        self._jobs = jobs

    async def reload(self, unit: str) -> Reloaded | None:
        """Have it reload as its unit says; None if that says nothing."""
        while True:
            try:
                result = await self._follow(unit, "ReloadUnit")
            except dbus.Error as error:
                if error.name == NOT_APPLICABLE:
                    return None
                if error.name in _NOT_THERE:
                    return Reloaded(ok=True)
                return Reloaded(ok=False, told="reload", reason=f"reload was not possible: {error}")
            if result == "invalid" and await self._has_started(unit):
                continue
            return await self._judge(unit, result)

    async def restart(self, unit: str) -> Reloaded:
        """Restart it, unless it has been stopped meanwhile."""
        try:
            result = await self._follow(unit, "TryRestartUnit")
        except dbus.Error as error:
            if error.name in _NOT_THERE:
                return Reloaded(ok=True)
            return Reloaded(ok=False, told="restart", reason=f"restart was not possible: {error}")
        if result == "done" or result in _POINTLESS:
            return Reloaded(ok=True, told="restart")
        return Reloaded(ok=False, told="restart", reason=f"restart {_ENDS.get(result, result)}")

    async def _follow(self, unit: str, member: str) -> str:
        """The result of a job. If it can no longer be heard: by what the unit looks like afterwards."""
        job = ""
        while not job:
            try:
                with self._jobs.listening() as listener:
                    job = await (await self._systemd()).manager(member, "ss", unit, "fail")
                    return await listener.result(job) or await self._afterwards(unit, member)
            except dbus.Lost:
                # Whether systemd heard it is not known. Twice reloaded does no harm, not at all would.
                await trio.sleep(_POLL_SEC)
            except dbus.Error as error:
                if error.name not in dbus.DISCONNECTED:
                    raise
                await trio.sleep(_POLL_SEC)
        return await self._afterwards(unit, member)

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
            except dbus.Lost:
                await trio.sleep(_POLL_SEC)
            except dbus.Error as error:
                if error.name not in dbus.DISCONNECTED:
                    raise
                await trio.sleep(_POLL_SEC)

    async def _has_started(self, unit: str) -> bool:
        """Wait while it is still starting (it may have read the old files already); whether it then runs."""
        while (state := await self._patiently("unit", unit, "ActiveState")) == "activating":
            await trio.sleep(_POLL_SEC)
        return state in _RUNNING

    async def _judge(self, unit: str, result: str) -> Reloaded:
        if result == "done":
            return Reloaded(ok=True, told="reload")
        if result in _POINTLESS:
            return Reloaded(ok=True)
        reason = f"reload {_ENDS.get(result, result)}"
        try:
            command = await self._failed_command(unit)
        except (dbus.Error, dbus.Lost):
            command = None  # the result is known, only its details are not
        if command is None:
            return Reloaded(ok=False, told="reload", reason=reason)
        return Reloaded(False, "reload", f"{reason}: {command.end}", await _said(unit, command))

    async def _failed_command(self, unit: str) -> Command | None:
        rows = await (await self._systemd()).service(unit, "ExecReload")
        return next((command for row in rows if (command := _command(row)).failed), None)


def _command(row: tuple[Any, ...]) -> Command:
    """ExecReload, `a(sasbttttuii)`: path, arguments, ignored, times (begun: row 3), PID, si_code, status."""
    return Command(str(row[0]), int(row[7]), int(row[3]), int(row[8]), int(row[9]), bool(row[2]))


async def _said(unit: str, command: Command) -> str:
    """What the command wrote, from the journal: there it goes, and nowhere else."""
    since = f"--since=@{command.begun_usec / 1_000_000:.6f}"
    with trio.move_on_after(_JOURNAL_SEC):
        await _run(["journalctl", "--sync"])
        return await _run(
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


async def _run(argv: list[str]) -> str:
    try:
        done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return ""  # no journalctl: then there is no journal to ask
    return done.stdout[-OUTPUT_MAX:].decode("utf-8", "backslashreplace")
