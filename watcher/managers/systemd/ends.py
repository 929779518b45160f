# SPDX-License-Identifier: LGPL-2.1-or-later
"""How commands of a unit ended, and whether its configuration can have been the reason.

systemd makes the process, its namespaces and its limits before the program begins. If that fails, it exits with a
status of systemd's own (systemd.exec(5), "Process Exit Codes"), and no configuration was read yet. Other ends are no
verdict either: somebody has started the unit too often, its condition did not hold, somebody had systemd kill it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from signal import SIGINT, SIGKILL, SIGQUIT, SIGTERM
from typing import Any, Final

from watcher.settings.signals import signal_name

_CLD_EXITED: Final = 1
# EXIT_CHDIR to EXIT_NUMA_POLICY and what may follow, in src/shared/exit-status.h. Programs are asked not to use these.
_SYSTEMDS_OWN: Final = range(200, 244)
# By which programs are stopped. One that ends by them well is not killed by them.
_STOPPING: Final = frozenset({SIGKILL, SIGTERM, SIGINT, SIGQUIT})
# Results of a unit (systemd.exec(5), "$SERVICE_RESULT"): those that say why by themselves, ...
_BLAMELESS: Final = {
    "resources": "systemd lacked resources to start it",
    "exec-condition": "its ExecCondition= did not hold",
}
# ... and those by which the command that ended says more. A kill after a time-out, or for lack of memory, is none.
_BY_COMMAND: Final = frozenset({"exit-code", "signal", "core-dump", "success"})
# Nothing was begun: what ended before that says whether somebody has started it so often, or it has failed so often.
_START_LIMIT: Final = "start-limit-hit"
_CONTROL: Final = ("ExecCondition", "ExecStartPre", "ExecStartPost")


@dataclass(frozen=True, slots=True)
class ExecCommand:
    """The last run of one command of a unit, as properties like ExecReload tell it."""

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
    def is_main(self) -> bool:
        """Whether it was the main process."""
        return not self.path

    @property
    def is_systemds(self) -> bool:
        """Whether the program never began: what ended was systemd on its way to it."""
        return self.code == _CLD_EXITED and self.status in _SYSTEMDS_OWN

    @property
    def is_by_a_stop(self) -> bool:
        """Whether it ended as one does that is stopped: by a signal, of which a shell says 128 and its number."""
        return self.status - (128 if self.code == _CLD_EXITED else 0) in _STOPPING

    @property
    def end(self) -> str:
        how = "exited with status" if self.code == _CLD_EXITED else "was killed by signal"
        return f"{self.path} {how} {self.status}"


def failed_command(values: Mapping[str, Any], *names: str) -> ExecCommand | None:
    """The first command that failed in lists of commands, such as ExecReload.

    Args:
        values: properties of a service.
    """
    rows = [row for name in names for row in values.get(name, ())]
    return next((each for row in rows if (each := command(row)).failed), None)


def command(row: tuple[Any, ...]) -> ExecCommand:
    """A row of ExecReload, `(sasbttttuii)`: path, arguments, ignored, begin and other times, PID, si_code, status."""
    return ExecCommand(str(row[0]), int(row[7]), int(row[3]), int(row[8]), int(row[9]), bool(row[2]))


def blameless(values: Mapping[str, Any], sent: Collection[str] = ()) -> str:
    """Why the end of a service says nothing about its configuration; "" if it may.

    Args:
        values: all properties of the service.
        sent: names of the signals that clients of systemd have sent to its main process.
    """
    result = str(values["Result"])
    if result not in _BY_COMMAND and result != _START_LIMIT:
        return _BLAMELESS.get(result, "")
    ended = failed_command(values, *_CONTROL) or _main(values)
    if result == _START_LIMIT and (ended.is_systemds or ended.is_by_a_stop or not ended.failed):
        return f"{_START_LIMIT}, it was started too often"
    if ended.is_systemds:
        return f"exit status {ended.status} is systemd's own, `systemctl status` says what it means"
    killed = {signal_name(ended.status)} if ended.code != _CLD_EXITED else {signal_name(n) for n in _STOPPING}
    found = killed.intersection(sent) if ended.is_main else ()
    return f"systemd was asked to send it {', '.join(sorted(found))}" if found else ""


def how(values: Mapping[str, Any]) -> str:
    """How a service ended, in words that follow "its start failed: "."""
    ended = failed_command(values, *_CONTROL) or _main(values)
    if not ended.failed:
        return str(values["Result"])
    return f"exit status {ended.status}" if ended.code == _CLD_EXITED else signal_name(ended.status)


def _main(values: Mapping[str, Any]) -> ExecCommand:
    code, status = int(values["ExecMainCode"]), int(values["ExecMainStatus"])
    return ExecCommand("", 1, 0, code, status, ignored=False)
