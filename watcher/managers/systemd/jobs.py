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
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import trio

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus, ends, journal_entries, sd_notify
from watcher.managers.systemd.executor import has_become
from watcher.managers.systemd.systemd1 import DESTRUCTIVE, NO_SUCH_UNIT, NOT_APPLICABLE, JobResults, Systemd1

_T = TypeVar("_T")

_POLL_SEC: Final = 0.1
# For so long it is watched whether systemd's executor becomes the service that was started.
_UP_SEC: Final = 5.0
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
_NO_MAIN: Final = frozenset({"running", "exited", "dead"})

_TOLD: Final = Reloaded(ok=True, told="reload")
_TELLS_NOTHING: Final = Reloaded(
    ok=True, reason="its unit's reload tells the process nothing (no ExecReload=)"
)
_GONE: Final = Reloaded(ok=True, reason="it was not told to reload, it does not run any more")


class _WaitsForUs(dbus.Error):
    """The unit has a job that waits until we have started. systemd would merge another one with it: that waits too."""

    def __init__(self) -> None:
        super().__init__(dbus.FAILED, "another job of it waits for confext-watcher to have started")


class UnitJobs:
    """Jobs of units. A lost connection ends all that waits here: what became of a job is then not known.

    Args:
        systemd: gives the connection. Raises BusLost: there is none now.
        results: is told of the end of every job.
        queued: called with a unit when it has a job of ours.
    """

    def __init__(
        self,
        systemd: Callable[[], Systemd1],
        results: JobResults,
        queued: Callable[[str], None] = lambda unit: None,
    ) -> None:
        self._systemd = systemd
        self._results = results
        self._queued = queued
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
        """Start a unit again that went down: with its sockets, or by them alone if nothing else would start it."""
        try:
            sockets = await self._sockets(unit)
            for socket in (name for name, state in sockets.items() if state == "failed"):
                started = await self._start_socket(socket, unit)
                if not started.ok:
                    return replace(started, reason=f"its {socket} cannot be started: {started.reason}")
            if sockets and not await self._get(unit, "WantedBy") + await self._get(unit, "RequiredBy"):
                return Reloaded(ok=True)
            started = await self._start(unit)
            return await self._came_up(unit, started) if started.told and started.ok else started
        except (dbus.Error, dbus.BusLost) as error:
            return _not_possible("start", error)

    async def _sockets(self, unit: str) -> dict[str, str]:
        """The sockets of a service that listen, or have failed: by name, with the ActiveState of each."""
        names = [name for name in await self._get(unit, "TriggeredBy") if name.endswith(".socket")]
        states = {name: str(await self._get(name, "ActiveState")) for name in names}
        return {name: state for name, state in states.items() if state != "inactive"}

    async def _start_socket(self, socket: str, unit: str) -> Reloaded:
        result = await self._ask(lambda systemd: systemd.socket_result(socket))
        if result == "service-start-limit-hit":
            await self._reset(unit)  # it was started too often on the stack that took it down
        return await self._start(socket)

    async def _start(self, unit: str) -> Reloaded:
        """Start a unit; only if that runs into its start limit, it gets over that."""
        before = await self._ask(lambda systemd: systemd.invocation(unit))
        # A start that is on its way to fail would take in another one, and fail all the same (`held_starts.py`).
        fails = await self._get(unit, "ActiveState") == "deactivating" and (await self._get(unit, "Job"))[0]
        started = await self._run(unit, "RestartUnit" if fails else "StartUnit", "start")
        refused = not started.ok and not started.interrupted
        if refused and before == await self._ask(lambda systemd: systemd.invocation(unit)):
            # No start was made: unit_test_start_limit() in src/core/unit.c is the first thing that refuses one.
            await self._reset(unit)
            return await self._run(unit, "StartUnit", "start")
        if (
            started.told
            and started.ok
            and before == await self._ask(lambda systemd: systemd.invocation(unit))
        ):
            # systemd had begun to start it again by itself, perhaps on the slots as they were before.
            return Reloaded(ok=True, reason="it was started already", interrupted=True)
        return started

    async def _reset(self, unit: str) -> None:
        """Forget how often a unit was started."""
        await self._ask(lambda systemd: systemd.manager("ResetFailedUnit", "s", unit))

    async def _came_up(self, unit: str, started: Reloaded) -> Reloaded:
        """`started`, unless the unit has failed since. Where nothing tells when a start is complete (`Type=simple`),
        the job is done before systemd has become the service."""
        deadline = trio.current_time() + _UP_SEC
        while trio.current_time() < deadline:
            state, detail = await self._get(unit, "ActiveState"), await self._get(unit, "SubState")
            if state == "failed" or detail.startswith("auto-restart"):
                why = ends.how(await self._ask(lambda systemd: systemd.service_properties(unit)))
                return replace(started, ok=False, reason=f"its start failed: {why}")
            pid = int(await self._get(unit, "MainPID"))
            if has_become(pid) or (pid == 0 and detail in _NO_MAIN):
                break
            await trio.sleep(_TOLD_SEC)
        return started

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
            job = await self._ask(begun)
            self._queued(unit)
            with trio.move_on_after(limit):
                return await listener.result(job) or await self._afterwards(unit, member)
        state = await self._systemd().cancel_job(job)
        ends_by = {"waiting": "blocked", "running": "overdue"}
        return ends_by.get(state) or await self._afterwards(unit, member)

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
        """A property of a unit. Raises as `_ask()` does."""
        return await self._ask(lambda systemd: systemd.get(unit, name))

    async def _ask(self, ask: Callable[[Systemd1], Awaitable[_T]]) -> _T:
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
        command = ends.failed_command(values, *_COMMANDS)
        if command is None:
            return reloaded
        reason = f"{reloaded.reason}: {command.end}"
        printed = await journal_entries.printed(unit, command.pid, command.begun_usec)
        # The command never began: that is no verdict.
        interrupted = command.is_systemds
        return replace(reloaded, reason=reason, output=printed, interrupted=interrupted)

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
