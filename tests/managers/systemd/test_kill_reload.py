# SPDX-License-Identifier: LGPL-2.1-or-later
"""A reload that is a signal is told from all that may be more; unit files on real systemd are in tests/beds/."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from watcher.managers.base import Reloaded
from watcher.managers.systemd import dbus
from watcher.managers.systemd.jobs import UnitJobs
from watcher.managers.systemd.kill_reload import ByTheJob, KillReloads, ReloadSignal, may_send, reload_signal
from watcher.managers.systemd.systemd1 import JobResults, Systemd1
from watcher.mounts.process import Process

WEB = "web.service"
STATE = "/var/lib/confext-watcher"
SLOTS = f"{STATE}/units"
NEVER = 0, 0, 0, 0, 0, 0, 0


def command(*words: str, flags: tuple[str, ...] = (), path: str = "") -> tuple[Any, ...]:
    return path or words[0], list(words), list(flags), *NEVER


def properties(*commands: tuple[Any, ...], **others: Any) -> dict[str, Any]:
    """What systemd says of a plain service."""
    plain: dict[str, Any] = {
        "Type": "simple",
        "NotifyAccess": "none",
        "ExecReloadEx": list(commands) or [command("/bin/kill", "-HUP", "$MAINPID")],
        "Environment": [],
        "PassEnvironment": [],
        "UnsetEnvironment": [],
        "User": "",
        "DynamicUser": False,
        "UID": 0xFFFFFFFF,
        "SystemCallArchitectures": [],
        "ExtensionImages": [(f"{SLOTS}/{WEB}/web.raw", True, [])],
        "ExtensionDirectories": [f"-{SLOTS}/{WEB}/tree"],
        "PropagatesReloadTo": [],
        "ReloadPropagatedFrom": [],
    }
    return plain | others


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A root directory with a merged /usr, and kill(1)."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    program(tmp_path / "usr/bin/kill")
    return tmp_path


def program(path: Path) -> None:
    path.touch(mode=0o755)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (("/bin/kill", "-HUP", "$MAINPID"), signal.SIGHUP),
        (("/usr/bin/kill", "-SIGHUP", "${MAINPID}"), signal.SIGHUP),
        (("kill", "-s", "HUP", "$MAINPID"), signal.SIGHUP),
        (("/bin/kill", "-s", "SIGUSR2", "$MAINPID"), signal.SIGUSR2),
        (("/bin/kill", "--signal", "WINCH", "$MAINPID"), signal.SIGWINCH),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_that_is_a_signal_is_known(host: Path, words: tuple[str, ...], number: int) -> None:
    assert reload_signal(properties(command(*words)), SLOTS, str(host)) == ReloadSignal(number, 0, False)


KILL = command("/bin/kill", "-HUP", "$MAINPID")


@pytest.mark.parametrize(
    "commands",
    [
        [KILL, KILL],
        [command("/usr/sbin/sshd", "-t"), KILL],
        [command("/bin/sh", "-c", "kill -HUP $MAINPID")],
        *(
            [command("/bin/kill", "-HUP", "$MAINPID", flags=(flag,))]
            for flag in ("ignore-failure", "privileged")
        ),
        *(
            [command("/bin/kill", "-HUP", "$MAINPID", flags=(flag,))]
            for flag in ("no-setuid", "no-env-expand")
        ),
        [command("skill", "-HUP", "$MAINPID", path="/bin/kill")],
        [command("/usr/local/bin/kill", "-HUP", "$MAINPID")],
        [command("/usr/bin/pkill", "-HUP", "$MAINPID")],
        [command("/bin/kill", "$MAINPID")],
        [command("/bin/kill", "-HUP", "$$MAINPID")],
        [command("/bin/kill", "-HUP", "-$MAINPID")],
        [command("/bin/kill", "-HUP", "$MAINPID", "1")],
        [command("/bin/kill", "-HUP", "1", "$MAINPID")],
        [command("/bin/kill", "-HUP", "--", "$MAINPID")],
        [command("/bin/kill", "-HUP", "1")],
        [command("/bin/kill", "-HUP")],
        [command("/bin/kill")],
        [command("/bin/kill", "-1", "$MAINPID")],
        [command("/bin/kill", "-0", "$MAINPID")],
        [command("/bin/kill", "-hup", "$MAINPID")],
        [command("/bin/kill", "-l", "$MAINPID")],
        [command("/bin/kill", "-L", "$MAINPID")],
        [command("/bin/kill", "-", "$MAINPID")],
        [command("/bin/kill", "HUP", "$MAINPID")],
        [command("/bin/kill", "-s", "$MAINPID")],
        [command("/bin/kill", "-s", "-HUP", "$MAINPID")],
        [command("/bin/kill", "-q", "HUP", "$MAINPID")],
        [command("/bin/kill", "-SIGSIGHUP", "$MAINPID")],
        [command("/bin/kill", "-$SIGNAL", "$MAINPID")],
    ],
    ids=lambda commands: "; ".join(" ".join((*each[2], *each[1])) for each in commands),
)
def test_a_command_that_may_be_more_is_systemds(host: Path, commands: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ByTheJob, match="ExecReload="):
        reload_signal(properties(*commands), SLOTS, str(host))


def test_a_unit_without_a_command_has_no_signal(host: Path) -> None:
    with pytest.raises(ByTheJob):
        reload_signal(properties(ExecReloadEx=[]), SLOTS, str(host))


def test_another_program_that_systemd_finds_first_is_systemds(host: Path) -> None:
    plain = properties(command("kill", "-HUP", "$MAINPID"))
    (host / "usr/sbin").symlink_to("bin")
    assert reload_signal(plain, SLOTS, str(host))
    program(host / "usr/local/bin/kill")
    with pytest.raises(ByTheJob, match="is not kill"):
        reload_signal(plain, SLOTS, str(host))


@pytest.mark.parametrize("path", ["kill", "/bin/kill", "/usr/bin/kill"])
def test_a_program_that_is_not_there_is_systemds(host: Path, path: str) -> None:
    (host / "bin/kill").chmod(0o644)
    with pytest.raises(ByTheJob, match="is not kill"):
        reload_signal(properties(command(path, "-HUP", "$MAINPID")), SLOTS, str(host))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "notify-reload"),
        ("ExecReloadPostEx", [command("/bin/true")]),
        ("PIDFile", "/run/web.pid"),
        ("Environment", ["A=b", "MAINPID=1"]),
        ("EnvironmentFiles", [("/etc/default/web", True)]),
        ("PassEnvironment", ["MAINPID"]),
        ("UnsetEnvironment", ["MAINPID"]),
        ("PrivatePIDs", "yes"),
        ("PrivateUsers", True),
        ("PrivateUsersEx", "identity"),
        ("UserNamespacePath", "/run/ns"),
        ("RootDirectory", "/srv/root"),
        ("RootImage", "/srv/root.raw"),
        ("RootMStack", "/srv/root.mstack"),
        ("MountImages", [("/srv/a.raw", "/usr/bin", False, [])]),
        ("BindPaths", [("/srv/bin", "/usr/bin", False, 0)]),
        ("BindReadOnlyPaths", [("/srv/bin", "/usr/bin", False, 0)]),
        ("TemporaryFileSystem", [("/usr/bin", "")]),
        ("InaccessiblePaths", ["/usr/bin"]),
        ("ExecPaths", ["/usr/sbin"]),
        ("NoExecPaths", ["/"]),
        ("ExecSearchPath", ["/opt/bin"]),
        ("ExtensionImages", [("/srv/tools.raw", False, [])]),
        ("ExtensionDirectories", ["-/srv/tools"]),
        ("User", "web"),
        ("DynamicUser", True),
        ("PAMName", "login"),
        ("SystemCallFilter", (True, ["kill"])),
        ("SystemCallArchitectures", ["x86"]),
        ("RestrictFileSystems", (True, ["ext4"])),
        ("SELinuxContext", (False, "web_t")),
        ("AppArmorProfile", (True, "web")),
        ("SmackProcessLabel", (False, "web")),
        ("StandardInput", "tty"),
        ("RefreshOnReload", ["credentials"]),
        ("PropagatesReloadTo", ["b.service"]),
        ("ReloadPropagatedFrom", ["a.service"]),
    ],
)
def test_a_setting_that_could_make_a_difference_makes_it_systemds(host: Path, name: str, value: Any) -> None:
    reason = "extension" if name.startswith("Extension") else rf"\b{name.removesuffix('Ex')}="
    reason = "User=" if name == "DynamicUser" else reason
    with pytest.raises(ByTheJob, match=reason):
        reload_signal(properties(**{name: value}), SLOTS, str(host))


@pytest.mark.parametrize(
    ("others", "sender"),
    [
        ({"PrivatePIDs": "no", "PIDFile": "", "SystemCallFilter": (False, [])}, 0),
        ({"Environment": ["A=b", "NOMAINPID=1"], "RefreshOnReload": ["extensions"]}, 0),
        ({"SystemCallArchitectures": ["native"]}, 0),
        ({"ProtectSystem": "strict", "ReadOnlyPaths": ["/usr"], "PrivateTmp": True, "ProtectHome": "yes"}, 0),
        ({"User": "web", "UID": 123}, 123),
        ({"DynamicUser": True, "UID": 61184}, 61184),
    ],
)
def test_a_setting_that_makes_no_difference_makes_none(
    host: Path, others: dict[str, Any], sender: int
) -> None:
    assert reload_signal(properties(**others), SLOTS, str(host)) == ReloadSignal(signal.SIGHUP, sender, False)


@pytest.mark.parametrize(
    ("uids", "sender", "may"),
    [
        ("0\t0\t0\t0", 0, True),
        ("33\t33\t33\t33", 33, True),
        ("33\t33\t33\t33", 0, False),
        ("0\t33\t33\t33", 0, True),
        ("33\t33\t0\t33", 0, True),
        ("33\t0\t33\t0", 0, False),
        ("0\t0\t0\t0", 33, False),
        ("133\t133\t133\t133", 33, False),
    ],
)
def test_a_user_may_send_to_whom_he_is(uids: str, sender: int, may: bool) -> None:
    assert (
        may_send(f"Name:\tUid:\nUid:\t{uids}\nGid:\t{sender}\t{sender}\t{sender}\t{sender}\n", sender) is may
    )


class Answers(Systemd1):
    """systemd with one unit, active and idle but for what is said."""

    def __init__(self, pid: int, **said: Any) -> None:
        self.said = {"MainPID": pid, "FreezerState": "running", "ReloadResult": "success"}
        self.said |= {"ActiveState": "active", "Job": 0} | properties() | said
        self.asked: list[str] = []
        self.before: Callable[[str], None] = lambda name: None

    async def state_and_job(self, unit: str) -> tuple[str, int]:
        self.before("Job")
        return self.said["ActiveState"], self.said["Job"]

    async def get(self, unit: str, name: str) -> Any:
        self.asked.append(name)
        self.before(name)
        if name == "Job":
            return self.said["Job"], "/"
        return self.said[name]

    async def service_properties(self, unit: str) -> dict[str, Any]:
        self.asked.append("*")
        return {name: self.said[name] for name in properties()}


MAIN = """
import os, signal
signal.signal(signal.SIGHUP, lambda *_: os.write(1, b"told\\n"))
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.fixture
def main() -> Iterator[Process]:
    """A main process that says each time that it gets SIGHUP."""
    with subprocess.Popen([sys.executable, "-ISc", MAIN], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        child.stdout.readline()
        with Process(child.pid) as process:
            process.told = child.stdout  # type: ignore[attr-defined]
            yield process
        child.kill()


def kill_reloads(systemd: Systemd1) -> KillReloads:
    def connection() -> Systemd1:
        return systemd

    return KillReloads(connection, UnitJobs(connection, JobResults()), STATE)


async def test_the_signal_is_sent_and_named(main: Process) -> None:
    systemd = Answers(main.pid)
    reloads = kill_reloads(systemd)
    assert await reloads.send(WEB, main, 90) == Reloaded(ok=True, told="SIGHUP")
    assert main.told.readline() == "told\n"  # type: ignore[attr-defined]


async def test_what_does_not_change_is_asked_once(main: Process) -> None:
    systemd = Answers(main.pid)
    reloads = kill_reloads(systemd)
    for _ in range(3):
        await reloads.send(WEB, main, 90)
    assert systemd.asked.count("*") == 1
    reloads.forget()
    await reloads.send(WEB, main, 90)
    assert systemd.asked.count("*") == 2


async def test_a_unit_with_another_command_is_not_asked_for_more(main: Process) -> None:
    systemd = Answers(main.pid, ExecReloadEx=[command("/bin/true")])
    assert await kill_reloads(systemd).send(WEB, main, 90) is None
    assert systemd.asked == ["ExecReloadEx"]


@pytest.mark.parametrize(
    "said",
    [
        {"Job": 17},
        {"ActiveState": "reloading"},
        {"ActiveState": "deactivating"},
        {"FreezerState": "frozen"},
        {"MainPID": 1},
        {"UID": 4711, "User": "web"},
        {"NotifyAccess": "main", "ReloadResult": "timeout"},
        {"ExecReloadEx": [command("/bin/kill", "-USR1", "$MAINPID")]},  # which would end it
    ],
    ids=str,
)
async def test_at_a_moment_that_is_not_right_nothing_is_sent(main: Process, said: dict[str, Any]) -> None:
    sent: list[int] = []
    main.signal = sent.append  # type: ignore[method-assign]
    assert await kill_reloads(Answers(main.pid, **said)).send(WEB, main, 90) is None
    assert sent == []


async def test_what_we_may_not_do_is_systemds(main: Process) -> None:
    def refuse(number: int) -> None:
        raise PermissionError

    main.signal = refuse  # type: ignore[method-assign]
    assert await kill_reloads(Answers(main.pid)).send(WEB, main, 90) is None


async def test_what_a_daemon_reload_may_change_meanwhile_is_not_relied_on(main: Process) -> None:
    systemd = Answers(main.pid)
    reloads = kill_reloads(systemd)
    assert await reloads.send(WEB, main, 90)
    systemd.before = lambda name: reloads.forget() if name == "MainPID" else None
    assert await reloads.send(WEB, main, 90) is None


async def test_without_a_connection_nothing_is_sent(main: Process) -> None:
    def lose(name: str) -> None:
        raise dbus.BusLost

    systemd = Answers(main.pid)
    systemd.before = lose
    assert await kill_reloads(systemd).send(WEB, main, 90) is None


@pytest.mark.parametrize(
    ("states", "result", "told"),
    [
        (["active"], "success", Reloaded(ok=True, told="SIGHUP")),
        (["active", "reloading", "reloading", "active"], "success", Reloaded(ok=True, told="SIGHUP")),
        (["reloading", "active"], "timeout", Reloaded(False, "reload", "reload timed out")),
        (["active", "reloading"], "timeout", Reloaded(False, "reload", "reload timed out")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_a_service_that_tells_of_its_reload_is_waited_for(
    main: Process, states: list[str], result: str, told: Reloaded, autojump_clock: object
) -> None:
    systemd = Answers(main.pid, NotifyAccess="main")
    reloads = kill_reloads(systemd)
    left = iter(states)

    def before(name: str) -> None:
        if name == "ActiveState":
            systemd.said["ActiveState"] = next(left, states[-1])
            if "reloading" in states:
                systemd.said["ReloadResult"] = result

    systemd.before = before
    assert await reloads.send(WEB, main, 90) == told
    assert next(left, None) is None
