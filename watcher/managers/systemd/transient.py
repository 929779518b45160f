# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command for a service in a unit of its own: outside our sandbox, inside the limits of the service.

A child of the watcher would have the watcher's system call filter and private network: `nginx -t` or a health check
would fail for reasons that have nothing to do with the configuration. And the watcher would need the right to become
any user. A transient unit has what systemd gives every unit, and systemd kills all of its processes at its end.

A command is a check, a health check, or the reload command of a service that `exec` has started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from watcher.managers import enter
from watcher.managers.base import Ended
from watcher.managers.command import PROGRAM, file_of, gather, namespaces, path_of, too_long
from watcher.managers.exec_context import ExecContext, ExecOrder
from watcher.managers.systemd import dbus
from watcher.managers.systemd.systemd1 import JobResults, Systemd1
from watcher.model import Later
from watcher.mounts.process import Process
from watcher.settings.signals import reason_of

# What the service's control group and processes may use: the command's unit gets the same.
_LIMITS: Final = {
    "Slice": "s",
    "MemoryHigh": "t",
    "MemoryMax": "t",
    "MemorySwapMax": "t",
    "TasksMax": "t",
    "CPUQuotaPerSecUSec": "t",
    "CPUWeight": "t",
    "LimitNOFILE": "t",
    "LimitNPROC": "t",
    "LimitAS": "t",
    "LimitMEMLOCK": "t",
}
# Seconds for systemd to start and to end the command, besides what the command may take.
_GRACE_SEC: Final = 10.0


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
        output = bytearray()
        later: Later | None = None
        reason = ""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stream = trio.lowlevel.FdStream(reading)
        with (
            contextlib.closing(stream),
            open(writing, "wb", buffering=0) as printed,
            namespaces(main, namespace) as paths,
            file_of(ExecOrder(paths, context, words)) as path,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gather, stream, output)
                try:
                    reason = await self._attempt(service, path, path_of(writing), timeout_sec, unit)
                except Later as error:
                    later = error
                printed.close()
                # A process that the command has left running may hold the pipe open.
                nursery.cancel_scope.deadline = trio.current_time() + 0.1
        if later is not None:
            raise later
        return Ended(reason, output.decode(errors="replace"))

    async def _attempt(self, service: str, path: str, output: str, timeout_sec: float, unit: str) -> str:
        try:
            return await self._follow(service, path, output, timeout_sec, unit)
        except (dbus.Error, dbus.BusLost) as error:
            raise Later(f"could not be run: {error}") from error
        except trio.TooSlowError as error:
            raise Later("could not be run: systemd did not start or end it in time") from error

    async def _follow(self, service: str, path: str, output: str, timeout_sec: float, unit: str) -> str:
        systemd = self._systemd()
        name = f"confext-watcher-check-{secrets.token_hex(8)}.service"
        properties = [
            ("Description", ("s", f"Command of confext-watcher for {service}")),
            ("Type", ("s", "oneshot")),
            ("ExecStart", ("a(sasb)", [(PROGRAM[0], [*PROGRAM, path], False)])),
            ("StandardInput", ("s", "null")),
            ("StandardOutputFile", ("s", output)),
            ("StandardError", ("s", "inherit")),
            ("TimeoutStartUSec", ("t", round(timeout_sec * 1_000_000))),
            ("TimeoutStopUSec", ("t", 1_000_000)),
            ("CollectMode", ("s", "inactive-or-failed")),
            # systemd keeps the unit until we have asked how it ended, or are gone.
            ("AddRef", ("b", True)),
            *(await _limits(systemd, unit) if unit else ()),
        ]
        with self._results.listening() as listener, trio.fail_after(timeout_sec + _GRACE_SEC):
            job = await systemd.manager(
                "StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", properties, []
            )
            result = await listener.result(job)
            try:
                return await _reason(systemd, name, result, timeout_sec)
            finally:
                with (
                    contextlib.suppress(dbus.Error, dbus.BusLost),
                    trio.move_on_after(_GRACE_SEC, shield=True),
                ):
                    await systemd.manager("UnrefUnit", "s", name)


async def _limits(systemd: Systemd1, unit: str) -> list[tuple[str, tuple[str, Any]]]:
    values = await systemd.service_properties(unit)
    return [(key, (kind, values[key])) for key, kind in _LIMITS.items() if values.get(key) not in (None, "")]


async def _reason(systemd: Systemd1, name: str, result: str, timeout_sec: float) -> str:
    if result == "done":
        return ""
    if result == "timeout":
        return too_long(timeout_sec)
    if result == "failed":
        values = await systemd.service_properties(name)
        if values["Result"] == "timeout":
            return too_long(timeout_sec)
        if values["Result"] == "oom-kill":
            return "was killed: it took more memory than the service may have"
        status = int(values["ExecMainStatus"])
        if values["Result"] == "exit-code":
            return "cannot be started" if status == enter.EXIT_EXEC else reason_of(status)
        if values["Result"] in ("signal", "core-dump"):
            return reason_of(-status)
        return f"failed: {values['Result']}"
    # It was canceled, by a shutdown say: that is no verdict of the command.
    raise Later(f"could not be followed to its end: {result or 'systemd cannot be reached'}")
