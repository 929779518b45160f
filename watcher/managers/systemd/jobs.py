# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking systemd to reload or restart a unit, and following the job to its end.

The job's mode is "fail": "replace" would cancel a stop that is queued already, and `systemctl stop` would seem to do
nothing. A unit that is stopping or does not run can have no such job, and needs none: its next start is on the new
stack.

A reload may never end: `TimeoutStartSec=` may be infinity, and 257 has a `Type=notify-reload` service that does not
answer reload again and again. So it has a limit of ours. A restart has none: its unit says how long that may take.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import trio

from watcher.managers.base import Reloaded
from watcher.managers.command import OUTPUT_MAX
from watcher.managers.systemd import dbus, sd_notify
from watcher.managers.systemd.systemd1 import DESTRUCTIVE, NO_SUCH_UNIT, NOT_APPLICABLE, JobResults, Systemd1

_T = TypeVar("_T")

_JOURNAL_SEC: Final = 5.0
_POLL_SEC: Final = 0.1
# While systemd executes itself anew it is not on the bus: for longer than with 1000 units it is not waited for.
_AWAY_SEC: Final = 30.0
# Within this time of the signal a service tells that it reloads. systemd's own `kill` takes less.
_TOLD_SEC: Final = 0.02

# How each way for a job to end reads in a sentence that begins with "reload" or "restart".
_ENDS: Final = {
    "failed": "failed",
    "timeout": "timed out",
    "overdue": "did not end within {limit:g} s",
    "blocked": "was not tried, the reload before has not ended",
    "canceled": "was canceled by another job",
    "dependency": "was not tried, a dependency failed",
    "assert": "was not tried, an assertion failed",
    "unsupported": "is not supported",
    "frozen": "was not tried, the unit is frozen",
    "concurrency": "was not tried, too many are running in its slice",
}
# The unit itself failed at the job. At any other end it had no part: it was stopped, the host went down.
_VERDICTS: Final = frozenset({"failed", "timeout", "overdue"})
# The unit no longer ran when the job's turn came.
_POINTLESS: Final = frozenset({"skipped", "invalid", "collected", "once"})
_NOT_THERE: Final = frozenset({NO_SUCH_UNIT, DESTRUCTIVE})
_COMMANDS: Final = ("ExecReload", "ExecReloadPost")  # the second in newer systemd only
_RELOADING: Final = frozenset({"reloading", "refreshing"})
_RUNNING: Final = _RELOADING | {"active"}
_CLD_EXITED: Final = 1

_TOLD: Final = Reloaded(ok=True, told="reload")
_TELLS_NOTHING: Final = Reloaded(
    ok=True, reason="its unit's reload tells the process nothing (no ExecReload=)"
)
_GONE: Final = Reloaded(ok=True, reason="it was not told to reload, it does not run any more")


@dataclass(frozen=True, slots=True)
class ExecCommand:
    """The last run of one command of a unit, as its property ExecReload tells it."""

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


class _WaitsForUs(dbus.Error):
    """The unit has a job that waits until we have started. systemd would merge another one with it: that waits too."""

    def __init__(self) -> None:
        super().__init__(dbus.FAILED, "another job of it waits for confext-watcher to have started")


class UnitJobs:
    """Jobs of units. A lost connection ends all that waits here: what became of a job is then not known.

    Args:
        systemd: gives the connection. Raises BusLost: there is none now.
        results: is told of the end of every job.
    """

    def __init__(self, systemd: Callable[[], Systemd1], results: JobResults) -> None:
        self._systemd = systemd
        self._results = results
        # The invocation of each unit whose start is known to be complete.
        self._up: dict[str, str] = {}

    async def reload(self, unit: str, invocation: str, limit: float) -> Reloaded | None:
        """Have a service reload as its unit says; None if the unit says no way to reload.

        Args:
            invocation: of the process that is meant.
            limit: seconds until it must have ended.
        """
        try:
            if not await self.is_up(unit, invocation):
                return _GONE
            return await self._judge(unit, await self._follow(unit, "ReloadUnit", limit), limit)
        except dbus.Error as error:
            if error.name == NOT_APPLICABLE:
                return None
            if error.name in _NOT_THERE:
                return _GONE
            return _not_possible("reload", error)
        except dbus.BusLost as error:
            return _not_possible("reload", error)

    async def restart(self, unit: str) -> Reloaded:
        """Restart a unit, unless it has been stopped meanwhile."""
        return await self._run(unit, "TryRestartUnit", "restart")

    async def start(self, unit: str) -> Reloaded:
        """Start a unit again, also one that failed too often."""
        try:
            await self._systemd().manager("ResetFailedUnit", "s", unit)
        except dbus.Error as error:
            if error.name != NO_SUCH_UNIT:
                return _not_possible("start", error)
        except dbus.BusLost as error:
            return _not_possible("start", error)
        return await self._run(unit, "StartUnit", "start")

    async def _run(self, unit: str, member: str, word: str) -> Reloaded:
        try:
            result = await self._follow(unit, member)
        except dbus.Error as error:
            # The job that waits for us starts the unit.
            if error.name in _NOT_THERE or (isinstance(error, _WaitsForUs) and word == "start"):
                return Reloaded(ok=True)
            return _not_possible(word, error)
        except dbus.BusLost as error:
            return _not_possible(word, error)
        if result == "done":
            return Reloaded(ok=True, told=word)
        if result in _POINTLESS:
            return Reloaded(ok=True, reason=f"its {word} was {result}")
        return ended_badly(word, result)

    async def _follow(self, unit: str, member: str, limit: float = math.inf) -> str:
        """The result of a job. If systemd executes itself anew meanwhile, it is read off the unit afterwards.

        Args:
            limit: seconds until it is canceled: then "overdue", or "blocked" if systemd had not begun with it.
        """

        async def begun(systemd: Systemd1) -> str:
            return str(await systemd.manager(member, "ss", unit, await self._mode(systemd, unit)))

        with self._results.listening() as listener:
            # If it is not known whether systemd heard it: to reload twice does no harm.
            job = await self._patiently(begun)
            with trio.move_on_after(limit):
                return await listener.result(job) or await self._afterwards(unit, member)
        state = await self._systemd().cancel_job(job)
        ends = {"waiting": "blocked", "running": "overdue"}
        return ends.get(state) or await self._afterwards(unit, member)

    async def _mode(self, systemd: Systemd1, unit: str) -> str:
        """ "fail" once we have started. Until then the jobs of units that take part wait for us (`After=`), and we
        would wait for them: so it is "ignore-dependencies", which would cancel a job that there is already.

        Raises:
            _WaitsForUs: there is one.
        """
        if not sd_notify.is_starting():
            return "fail"
        if (await systemd.get(unit, "Job"))[0]:
            raise _WaitsForUs
        return "ignore-dependencies"

    async def _afterwards(self, unit: str, member: str) -> str:
        while (await self._get(unit, "Job"))[0]:
            await trio.sleep(_POLL_SEC)
        result = await self._get(unit, "ReloadResult" if member == "ReloadUnit" else "Result")
        return {"success": "done", "timeout": "timeout"}.get(str(result), "failed")

    async def _get(self, unit: str, name: str) -> Any:
        """A property of a unit. Raises as `_patiently()` does."""
        return await self._patiently(lambda systemd: systemd.get(unit, name))

    async def _patiently(self, ask: Callable[[Systemd1], Awaitable[_T]]) -> _T:
        """See `patiently()`."""
        return await patiently(lambda: ask(self._systemd()))

    async def told_by_service(self, unit: str, limit: float) -> str:
        """How a service takes a signal to reload that was sent just now, as a result of a job.

        Most tell systemd nothing of it: "done". Of one that does (RELOADING=1, sd_notify(3)) the end is waited for, as
        by systemd itself: it waits for those that have told so when `ExecReload=` ends, a moment after the signal.

        Args:
            limit: seconds until that must have come: then "overdue".
        """
        with trio.move_on_after(limit):
            return await self._told(unit)
        return "overdue"

    async def _told(self, unit: str) -> str:
        deadline = trio.current_time() + _TOLD_SEC
        while await self._get(unit, "ActiveState") not in _RELOADING:
            if trio.current_time() > deadline:
                return "done"
            await trio.sleep(_TOLD_SEC / 4)
        while await self._get(unit, "ActiveState") in _RELOADING:
            # 257 lets a service that has not told the end in time begin to reload again, and so for ever.
            if await self._get(unit, "ReloadResult") != "success":
                break
            await trio.sleep(_TOLD_SEC)
        return await self._afterwards(unit, "ReloadUnit")

    def was_up(self, unit: str, invocation: str) -> bool:
        """Whether `is_up()` has found this start of the unit complete."""
        return self._up.get(unit) == invocation

    async def is_up(self, unit: str, invocation: str) -> bool:
        """Whether a unit runs; while it is starting, wait.

        A unit that is starting may have read the old files already, and systemd answers a reload during the start
        without reloading anything.
        """
        if self.was_up(unit, invocation):
            return True
        while (state := await self._get(unit, "ActiveState")) == "activating":
            await trio.sleep(_POLL_SEC)
        if state in _RUNNING:
            self._up[unit] = invocation
        return state in _RUNNING

    async def _judge(self, unit: str, result: str, limit: float) -> Reloaded:
        if result == "done":
            return _TOLD if await self._tells(unit) else _TELLS_NOTHING
        if result in _POINTLESS:
            return _GONE
        reloaded = ended_badly("reload", result, limit)
        if reloaded.interrupted or result == "overdue":
            return reloaded
        try:
            values = await self._systemd().service_properties(unit)
        except (dbus.Error, dbus.BusLost):
            return reloaded  # without its details
        if values.get("ReloadResult") == "timeout":
            return ended_badly("reload", "timeout")  # the result of the job was "failed"
        command = _failed_command(values)
        if command is None:
            return reloaded
        reason = f"{reloaded.reason}: {command.end}"
        return replace(reloaded, reason=reason, output=await _said(unit, command))

    async def _tells(self, unit: str) -> bool:
        """Whether a unit's reload tells its process anything.

        From 260 on there is one that only refreshes credentials or extensions (`RefreshOnReload=`).
        """
        return bool(await self._get(unit, "ExecReload")) or await self._get(unit, "Type") == "notify-reload"


async def patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """What systemd answers, also while it executes itself anew.

    Raises:
        dbus.BusLost: there is no connection, or no longer. Nothing waits here for another one: what is dropped next
            would have to wait, too.
        dbus.Error: the answer is an error, or systemd does not come back to the bus.
    """
    deadline = trio.current_time() + _AWAY_SEC
    while True:
        try:
            return await ask()
        except dbus.Error as error:
            if not dbus.is_lost(error) or trio.current_time() > deadline:
                raise
            await trio.sleep(_POLL_SEC)


def _not_possible(word: str, error: Exception) -> Reloaded:
    return Reloaded(ok=False, told=word, reason=f"{word} was not possible: {error}", interrupted=True)


def ended_badly(word: str, result: str, limit: float = math.inf) -> Reloaded:
    reason = f"{word} {_ENDS.get(result, result)}".format(limit=limit)
    interrupted, blocked = result not in _VERDICTS, result == "blocked"
    return Reloaded(ok=False, told=word, reason=reason, interrupted=interrupted, blocked=blocked)


def _failed_command(values: Mapping[str, Any]) -> ExecCommand | None:
    rows = [row for name in _COMMANDS for row in values.get(name, ())]
    return next((command for row in rows if (command := _command(row)).failed), None)


def _command(row: tuple[Any, ...]) -> ExecCommand:
    """A row of ExecReload, `(sasbttttuii)`: path, arguments, ignored, begin and other times, PID, si_code, status."""
    return ExecCommand(str(row[0]), int(row[7]), int(row[3]), int(row[8]), int(row[9]), bool(row[2]))


async def _said(unit: str, command: ExecCommand) -> str:
    """What the command wrote, which only the journal has."""
    since = f"--since=@{command.begun_usec / 1_000_000:.6f}"
    matches = f"_SYSTEMD_UNIT={unit}", f"_PID={command.pid}"
    with trio.move_on_after(_JOURNAL_SEC):
        await _journalctl("--sync")
        return await _journalctl("--quiet", "--no-pager", "--output=cat", since, *matches)
    return ""


async def _journalctl(*options: str) -> str:
    argv = ["journalctl", *options]
    try:
        done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return ""  # there is no journal to ask
    return done.stdout[-OUTPUT_MAX:].decode("utf-8", "backslashreplace")
