# SPDX-License-Identifier: LGPL-2.1-or-later
"""How units went down last: asked once for each end, because a daemon-reload has systemd forget half of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from watcher.managers.systemd import ends, journal_entries
from watcher.managers.systemd.systemd1 import Systemd1

# Jobs that end a unit. How it takes that says nothing about how it would have gone on.
_STOPPING = frozenset({"stop", "restart", "try-restart"})


@dataclass(frozen=True, slots=True)
class _End:
    """How a unit went down: InvocationID, Result and NRestarts then, and `Service.blameless`."""

    invocation: str = ""
    result: str = ""
    restarts: int = 0
    blameless: str = ""


class UnitEnds:
    """The last end of each unit that went down by itself."""

    def __init__(self) -> None:
        self._ends: dict[str, _End] = {}

    async def look(self, systemd: Systemd1, name: str) -> str | None:
        """Find out how a unit went down that has failed.

        Returns:
            The InvocationID of the start that failed; None if another has begun meanwhile: ask anew.
        """
        invocation = await systemd.invocation(name)
        stopped = await systemd.job_type(name) in _STOPPING
        values = await systemd.service_properties(name)
        failed = await has_failed(systemd, name, await systemd.get(name, "ActiveState"))
        if not failed or invocation != await systemd.invocation(name):
            return None
        end = _End(invocation, str(values["Result"]), int(values["NRestarts"]))
        known = self._ends.get(name, _End())
        # NRestarts may have been counted up since, for the start that comes next.
        if (known.invocation, known.result) != (end.invocation, end.result):
            sent = await journal_entries.sent_by_clients(name, end.invocation, int(values["ExecMainPID"]))
            why = "it was asked to stop" if stopped else ends.blameless(values, sent)
            self._ends[name] = replace(end, blameless=why)
        return invocation

    def blameless(self, name: str, restarts: int, *, failed: bool) -> str:
        """Why its last end says nothing about its configuration; also while that runs which systemd started then.

        Args:
            restarts: NRestarts now.
            failed: it is down.
        """
        end = self._ends.get(name, _End())
        again = restarts > 0 and restarts - end.restarts in (0, 1)
        return end.blameless if failed or again else ""

    def forget(self, name: str) -> None:
        """The unit takes no part any more."""
        self._ends.pop(name, None)


async def has_failed(systemd: Systemd1, name: str, state: str) -> bool:
    """Whether a unit without a main process went down by itself; `state` is its ActiveState.

    It is not "failed" between its failure and its automatic restart, nor while systemd still ends its other processes.
    """
    if state == "deactivating":
        return bool(await systemd.get(name, "Result") != "success")
    return state == "failed" or str(await systemd.get(name, "SubState")).startswith("auto-restart")
