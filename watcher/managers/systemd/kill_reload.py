# SPDX-License-Identifier: LGPL-2.1-or-later
"""A reload that is nothing but a signal is sent by us.

`ExecReload=/bin/kill -HUP $MAINPID` is what most services without sd_notify(3) say, and of the 54 ms that such a reload
took, 49 went into the process that systemd makes for it, with all of the unit's sandbox. So where nothing but that
signal can come of it, we send it: `reload_signal()` says where, by what systemd has loaded of the unit. Wherever a
setting could make a difference (another user, another root, a filter of system calls), or something else hangs on the
job (other units that are reloaded with it, a PID file that is read after it), systemd runs it as ever; so it does with
`Reload=unit`.

What is not had without the job: "Reloading" and "Reloaded" in the unit's log, and the times in `systemctl status`.

Rules: systemd.service(5) and systemd.exec(5); service_enter_reload() in src/core/service.c; kill(1), kill(2).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus
from watcher.managers.systemd.jobs import UnitJobs, ended_badly
from watcher.managers.systemd.systemd1 import Systemd1
from watcher.mounts.process import Process
from watcher.records import journal
from watcher.settings.signals import signal_name, signal_number

_MAIN_PID: Final = frozenset({"$MAINPID", "${MAINPID}"})
_NAME: Final = re.compile(r"(?:SIG)?[A-Z]+[0-9]*")
_PROGRAMS: Final = ("/bin/kill", "/usr/bin/kill")
# Where systemd looks for a program without a path (DEFAULT_PATH); it is taken if only `kill` itself is found there.
_SEARCHED: Final = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_NO_USER: Final = 0xFFFFFFFF

_NONE: Final = (False, "")
_NO_FILTER: Final[tuple[bool, list[str]]] = (False, [])
# Properties, and the value of each with which it changes nothing. One that systemd does not have it does not know.
_HARMLESS: Final[dict[str, Any]] = {
    # after the command: another one, a look into the PID file
    "ExecReloadPostEx": [],
    "PIDFile": "",
    # what $MAINPID is, and in which namespace
    "EnvironmentFiles": [],
    "PrivatePIDs": "no",
    # whether the program is there, and is that program
    "BindPaths": [],
    "BindReadOnlyPaths": [],
    "ExecPaths": [],
    "ExecSearchPath": [],
    "InaccessiblePaths": [],
    "MountImages": [],
    "NoExecPaths": [],
    "RootDirectory": "",
    "RootImage": "",
    "RootMStack": "",
    "TemporaryFileSystem": [],
    # whether it may
    "AppArmorProfile": _NONE,
    "PAMName": "",
    "PrivateUsers": False,
    "PrivateUsersEx": "no",
    "RestrictFileSystems": _NO_FILTER,
    "SELinuxContext": _NONE,
    "SmackProcessLabel": _NONE,
    "StandardInput": "null",
    "SystemCallFilter": _NO_FILTER,
    "UserNamespacePath": "",
    # other units that are reloaded with it
    "PropagatesReloadTo": [],
    "ReloadPropagatedFrom": [],
}


class ByTheJob(Exception):
    """systemd has to run the reload; `str()` is the setting that could make a difference."""


@dataclass(frozen=True, slots=True)
class ReloadSignal:
    """All that comes of a unit's reload.

    Attributes:
        number: of the signal that its main process gets.
        sender: the UID that sends it.
        notifies: the service may tell that it is reloading and when it has done so (`NotifyAccess=`).
    """

    number: int
    sender: int
    notifies: bool


def reload_signal(properties: Mapping[str, Any], slots: str, root: str = "") -> ReloadSignal:
    """The signal that a unit's reload is.

    Args:
        properties: of the service and the unit, as systemd has loaded them.
        slots: the directory with all slots: what is mounted from there are confexts, which bring no other program.
        root: where the host's programs are.

    Raises:
        ByTheJob
    """
    if properties["Type"] == "notify-reload":
        raise ByTheJob("Type=notify-reload")
    number = _number(properties["ExecReloadEx"], root)
    for name, harmless in _HARMLESS.items():
        if properties.get(name, harmless) != harmless:
            raise ByTheJob(f"{name.removesuffix('Ex')}=")
    for name in ("Environment", "PassEnvironment", "UnsetEnvironment"):
        if any(word.partition("=")[0] == "MAINPID" for word in properties[name]):
            raise ByTheJob(f"MAINPID in {name}=")
    if properties["SystemCallArchitectures"] not in ([], ["native"]):
        raise ByTheJob("SystemCallArchitectures=")
    if "credentials" in properties.get("RefreshOnReload", ()):
        raise ByTheJob("RefreshOnReload=credentials")
    extensions = [row[0] for row in properties["ExtensionImages"]]
    extensions += [path.lstrip("-+") for path in properties["ExtensionDirectories"]]
    if not all(path.startswith(f"{slots}/") for path in extensions):
        raise ByTheJob("an extension that is no confext of ours")
    return ReloadSignal(number, _sender(properties), properties["NotifyAccess"] != "none")


def _number(commands: list[tuple[Any, ...]], root: str = "") -> int:
    """The signal that `ExecReload=` sends to the main process, by rows of (path, arguments, flags, ...)."""
    if len(commands) != 1:
        raise ByTheJob("ExecReload= is not one command")
    path, words, flags = commands[0][:3]
    if flags:
        raise ByTheJob("ExecReload= with a prefix")
    if not _is_kill(path, root) or words[:1] != [path] or words[-1] not in _MAIN_PID:
        raise ByTheJob("ExecReload= is not kill")
    match words[1:-1]:
        case ["-s" | "--signal", name]:
            pass
        case [option] if option[:1] == "-":
            name = option[1:]
        case _:
            raise ByTheJob("ExecReload= is more than a signal")
    try:
        if _NAME.fullmatch(name):
            return signal_number(name)
    except ValueError:
        pass
    raise ByTheJob("ExecReload= names no signal")


def _is_kill(path: str, root: str) -> bool:
    """Whether systemd runs kill(1) for this path of a command, and it is there."""
    if path not in ("kill", *_PROGRAMS):
        return False
    kills = {os.path.realpath(each) for each in (f"{root}{p}" for p in _PROGRAMS) if os.access(each, os.X_OK)}
    searched = _SEARCHED if path == "kill" else (os.path.dirname(path),)
    found = [each for each in (f"{root}{where}/kill" for where in searched) if os.path.exists(each)]
    return bool(found) and all(os.path.realpath(each) in kills for each in found)


def _sender(properties: Mapping[str, Any]) -> int:
    if not properties["User"] and not properties["DynamicUser"]:
        return 0
    if properties["UID"] == _NO_USER:
        raise ByTheJob("User=")
    return int(properties["UID"])


def may_send(status: str, sender: int) -> bool:
    """Whether a user may send signals to a process whoever he is otherwise: he is its real or saved user (kill(2)).

    Args:
        status: its `/proc/PID/status`.
    """
    users = re.search(r"^Uid:\t(\d+)\t\d+\t(\d+)\t", status, re.MULTILINE)
    return users is not None and str(sender) in users.groups()


class KillReloads:
    """Sends these signals.

    Args:
        systemd: gives the connection. Raises BusLost: there is none now.
        jobs: follows what the service tells of its reload.
        state_directory: with the slots.
    """

    def __init__(self, systemd: Callable[[], Systemd1], jobs: UnitJobs, state_directory: str) -> None:
        self._systemd = systemd
        self._jobs = jobs
        self._state_directory = state_directory
        self._known: dict[str, ReloadSignal | None] = {}

    def forget(self) -> None:
        """systemd reads its unit files again, or may have done so."""
        self._known = {}

    async def send(self, unit: str, main: Process, limit: float) -> Reloaded | None:
        """Have a service that is up reload by a signal; None: systemd has to do it, and nothing was sent.

        Args:
            main: its main process, held by the caller.
            limit: seconds until it must have reloaded, if it tells that.

        Raises:
            Gone: that has ended.
        """
        known = self._known
        try:
            if unit not in known:
                known[unit] = await self._look(unit)
        except (dbus.Error, dbus.BusLost):
            return None  # who asks for the job is more patient
        found = known[unit]
        if found is None or not await self._is_idle(unit, main.pid, found) or known is not self._known:
            return None
        if not main.survives(found.number) or not may_send(main.read("status"), found.sender):
            return None
        try:
            main.signal(found.number)
        except PermissionError:
            return None  # an administrator has taken CAP_KILL from us
        if found.notifies:
            result = await self._jobs.told_by_service(unit, limit)
            if result != "done":
                return ended_badly("reload", result, limit)
        return Reloaded(ok=True, told=signal_name(found.number))

    async def _look(self, unit: str) -> ReloadSignal | None:
        systemd = self._systemd()
        try:
            # A quick look: most units have another command, and all properties are many.
            commands = await systemd.get(unit, "ExecReloadEx")
            _number(commands)
            properties = await systemd.service_properties(unit)
            for name in ("PropagatesReloadTo", "ReloadPropagatedFrom"):
                properties[name] = await systemd.get(unit, name)
            found = reload_signal(properties, f"{self._state_directory}/units")
        except ByTheJob as error:
            if commands:
                journal.log.debug(f"{unit}: systemd runs its reload: {error}", service=unit)
            return None
        journal.log.debug(f"{unit}: its reload is {signal_name(found.number)}", service=unit)
        return found

    async def _is_idle(self, unit: str, main: int, found: ReloadSignal) -> bool:
        """Whether systemd would run the reload now, for this main process: the unit is active, has no job, and is not
        frozen. Asked all at once: an answer takes its time."""
        systemd = self._systemd()
        wanted: dict[str, Any] = {"MainPID": main, "FreezerState": "running", "state": ("active", 0)}
        if found.notifies:
            # A job clears it: without one it would be taken for the result of this reload.
            wanted["ReloadResult"] = "success"
        answers: dict[str, Any] = {}

        async def ask(name: str) -> None:
            asked = systemd.state_and_job(unit) if name == "state" else systemd.get(unit, name)
            answers[name] = await asked

        try:
            async with trio.open_nursery() as nursery:
                for name in wanted:
                    nursery.start_soon(ask, name)
        except* (dbus.Error, dbus.BusLost):
            answers.clear()
        return answers == wanted
