# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's manager against real systemd: what takes part is found and followed, a reload is followed to its end.

Covers managers/base.py, which says what a manager is.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from beds.bed import Bed
from beds.host import SECONDS, SLEEP, UNITS, Host, install
from support import needs
from support.place import eventually

pytestmark = needs.bed

# A service as manager_probe.py shows it, None for one that takes no part (any more).
Shown = dict[str, Any] | None


class Probe:
    """The manager, running in the bed."""

    def __init__(self, bed: Bed) -> None:
        bed.path("/root/manager_probe.py").write_text(
            Path(__file__).with_name("manager_probe.py").read_text()
        )
        self.process = bed.popen(
            ["python3", "/root/manager_probe.py"],
            env={"PYTHONPATH": "/usr/lib/confext-watcher"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._in, self._out, self._err = self.process.stdin, self.process.stdout, self.process.stderr
        self.services: dict[str, Any] = {}
        self.seen: list[dict[str, Any]] = []
        self.errors = ""
        self._lines: Queue[Shown] = Queue()
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        for line in self._out:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _read_errors(self) -> None:
        for line in self._err:
            self.errors += line

    def close(self) -> None:
        self._in.close()
        self.process.wait(timeout=SECONDS)
        for reader in self._readers:
            reader.join()
        self._out.close()
        self._err.close()
        assert self.process.returncode == 0, self.errors

    def next(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=SECONDS)
        except Empty:
            line = None
        assert line is not None, f"nothing more was said; before: {self.seen[-5:]}\n{self.errors}"
        self.seen.append(line)
        if "changed" in line:
            self.services[line["changed"]] = line["service"]
        return line

    def until(self, name: str, condition: Callable[[Any], object]) -> Any:
        """What is said of a service once the condition holds for it."""
        while name not in self.services or not condition(self.services[name]):
            self.next()
        return self.services[name]

    def send(self, verb: str, name: str) -> None:
        self._in.write(f"{verb} {name}\n")
        self._in.flush()

    def ask(self, verb: str, name: str, answer: str) -> Any:
        self.send(verb, name)
        return self.answer(answer)

    def answer(self, answer: str) -> Any:
        while True:
            line = self.next()
            if answer in line:
                return line[answer]

    def reload(self, name: str) -> dict[str, Any]:
        reloaded: dict[str, Any] = self.ask("reload", name, "reloaded")
        return reloaded


class Managed(Host):
    """A host on which the manager runs alone."""

    def probe(self) -> Probe:
        probe = Probe(self.bed)
        self.stack.callback(probe.close)
        return probe


@pytest.fixture
def host(bed: Bed) -> Iterator[Managed]:
    install(bed)
    with contextlib.ExitStack() as stack:
        managed = Managed(bed, stack)
        managed.no_watcher()
        yield managed


def running(service: Shown) -> bool:
    return bool(service and service["pid"])


def has_pid(pid: int) -> Callable[[Shown], bool]:
    return lambda service: bool(service and service["pid"] == pid)


def stopped(service: Shown) -> bool:
    return bool(service and not service["pid"] and not service["starting"])


def gone(service: Shown) -> bool:
    return service is None


def test_a_service_is_followed_through_start_stop_and_restart(host: Managed) -> None:
    host.unit("followed.service")
    probe = host.probe()
    probe.until("followed.service", stopped)
    host.systemctl("start", "followed.service")
    first = probe.until("followed.service", running)
    assert (first["pid"], first["comm"]) == (host.main_pid("followed.service"), "sleep")
    host.systemctl("restart", "followed.service")
    second = probe.until("followed.service", lambda s: running(s) and s["invocation"] != first["invocation"])
    assert second["pid"] == host.main_pid("followed.service")
    host.systemctl("stop", "followed.service")
    probe.until("followed.service", stopped)


def test_a_service_that_goes_down_by_itself_is_told_from_one_that_was_stopped(host: Managed) -> None:
    host.unit("dies.service")
    host.systemctl("start", "dies.service")
    probe = host.probe()
    probe.until("dies.service", running)
    host.systemctl("kill", "--signal=KILL", "dies.service")
    assert probe.until("dies.service", stopped)["failed"]
    host.systemctl("start", "dies.service")
    probe.until("dies.service", running)
    host.systemctl("stop", "dies.service")
    assert not probe.until("dies.service", stopped)["failed"]


def test_the_executor_of_systemd_is_never_taken_for_the_service(host: Managed) -> None:
    # ProtectSystem= and its kin make the executor take its time.
    host.unit(
        "slow.service",
        "[Unit]\nStartLimitIntervalSec=0\n"
        + SLEEP
        + "ProtectSystem=strict\nPrivateTmp=yes\nProtectHome=yes\nPrivateDevices=yes\n",
    )
    probe = host.probe()
    for _ in range(30):
        host.systemctl("restart", "slow.service")
        pid = host.main_pid("slow.service")
        assert probe.until("slow.service", has_pid(pid))["comm"] == "sleep"
    assert all("(" not in (line.get("service") or {}).get("comm", "") for line in probe.seen)


def test_a_confext_directory_is_noticed_without_daemon_reload_and_brings_the_drop_in(host: Managed) -> None:
    host.unit("later.service", takes_part=False)
    probe = host.probe()
    host.bed.path(f"{UNITS}/later.service.confext.d").mkdir()
    probe.until("later.service", stopped)
    host.systemctl("start", "later.service")
    probe.until("later.service", running)
    probe.ask("learn", "later.service", "learned")
    assert "zzzz-confext-watcher.conf" in host.bed.property("later.service", "DropInPaths")
    host.bed.path(f"{UNITS}/later.service.confext.d").rmdir()
    probe.until("later.service", gone)


def test_what_is_declared_is_read_from_the_files_and_followed_through_edit(host: Managed) -> None:
    host.unit("declares.service", SLEEP + "ExtensionImages=-/srv/one.raw\n", takes_part=False)
    probe = host.probe()
    assert probe.until("declares.service", stopped)["images"] == ["/srv/one.raw"]
    drop_in = "[Service]\nExtensionImages=-/srv/two.raw\nExtensionDirectories=-/srv/tree\n[X-Confext]\nReload=none\n"
    host.bed.run(["systemctl", "edit", "--stdin", "declares.service"], input=drop_in)
    found = probe.until("declares.service", lambda s: bool(s) and len(s["images"]) == 2)
    assert found["images"] == ["/srv/one.raw", "/srv/two.raw"]
    assert (found["directories"], found["reload"]) == (["/srv/tree"], "none")


def test_an_alias_is_the_same_service(host: Managed) -> None:
    host.unit("real.service", takes_part=False)
    host.bed.run(["ln", "-s", "real.service", f"{UNITS}/real.service-alias.service"])
    host.bed.path(f"{UNITS}/real.service-alias.service.confext.d").mkdir()
    host.systemctl("daemon-reload")
    probe = host.probe()
    host.systemctl("start", "real.service-alias.service")
    found = probe.until("real.service", running)
    assert found["aliases"] == ["real.service-alias.service"]
    assert f"{UNITS}/real.service-alias.service.confext.d" in found["confext_dirs"]


def test_instances_of_a_template_are_followed_once_they_are_there(host: Managed) -> None:
    host.unit("many@.service")
    probe = host.probe()
    probe.until("many@.service", stopped)
    host.systemctl("start", "many@one.service", "many@two.service")
    for name in ("many@one.service", "many@two.service"):
        found = probe.until(name, running)
        assert found["confext_dirs"][0].endswith(f"{name}.confext.d")
        assert f"{UNITS}/many@.service.confext.d" in found["confext_dirs"]


def test_a_masked_unit_leaves_and_comes_back(host: Managed) -> None:
    host.unit("masked.service")
    probe = host.probe()
    probe.until("masked.service", stopped)
    host.bed.run(["systemctl", "mask", "--runtime", "masked.service"])
    host.bed.run(["mv", f"{UNITS}/masked.service", f"{UNITS}/masked.service-away"])
    host.systemctl("daemon-reload")
    probe.until("masked.service", gone)
    host.bed.run(["mv", f"{UNITS}/masked.service-away", f"{UNITS}/masked.service"])
    host.bed.run(["systemctl", "unmask", "--runtime", "masked.service"])
    probe.until("masked.service", stopped)


@pytest.mark.parametrize("action", ["restart dbus", "daemon-reexec"])
def test_a_bus_or_a_systemd_that_starts_anew_is_found_again(host: Managed, action: str) -> None:
    host.unit("lasting.service")
    host.systemctl("start", "lasting.service")
    probe = host.probe()
    first = probe.until("lasting.service", running)
    host.systemctl(*action.split())
    host.systemctl("restart", "lasting.service")
    second = probe.until("lasting.service", lambda s: running(s) and s["invocation"] != first["invocation"])
    assert second["pid"] == host.main_pid("lasting.service")
    assert probe.reload("lasting.service")["ok"]


@pytest.mark.parametrize("action", ["daemon-reexec", "daemon-reload"])
@pytest.mark.parametrize("command", ["true", "false"])
def test_a_reload_is_followed_through_a_new_start_of_systemd(
    host: Managed, action: str, command: str
) -> None:
    host.unit("patient.service", SLEEP + f"ExecReload=/bin/sleep 3\nExecReload=/bin/{command}\n")
    host.systemctl("start", "patient.service")
    probe = host.probe()
    probe.until("patient.service", running)
    probe.send("reload", "patient.service")
    eventually(lambda: host.bed.property("patient.service", "ActiveState") == "reloading")
    host.systemctl(*action.split())
    reloaded = probe.answer("reloaded")
    assert reloaded["ok"] == (command == "true")
    assert reloaded["told"] == "reload" and "interrupted" not in reloaded
    assert host.bed.property("patient.service", "ActiveState") == "active"


@pytest.mark.parametrize("command", ["true", "false"])
def test_a_reload_whose_end_cannot_be_heard_says_nothing_and_the_next_one_does(
    host: Managed, command: str
) -> None:
    host.unit("patient.service", SLEEP + f"ExecReload=/bin/sleep 3\nExecReload=/bin/{command}\n")
    host.systemctl("start", "patient.service")
    probe = host.probe()
    first = probe.until("patient.service", running)
    probe.send("reload", "patient.service")
    eventually(lambda: host.bed.property("patient.service", "ActiveState") == "reloading")
    host.systemctl("restart", "dbus")
    reloaded = probe.answer("reloaded")
    assert not reloaded["ok"] and reloaded["interrupted"], reloaded
    # With the next connection another round is asked for.
    seen = len(probe.seen)
    while not any(line.get("changed") == "patient.service" for line in probe.seen[seen:]):
        probe.next()
    assert probe.services["patient.service"] == first
    assert probe.reload("patient.service")["ok"] == (command == "true")


def test_a_reload_that_ends_while_systemd_starts_anew_is_not_waited_for_for_ever(host: Managed) -> None:
    # SIGTERM is daemon-reexec to it, and the command has ended before it is back on the bus.
    host.unit("sudden.service", SLEEP + "ExecReload=/bin/sh -c 'sleep 0.5; kill -TERM 1'\n")
    host.systemctl("start", "sudden.service")
    probe = host.probe()
    probe.until("sudden.service", running)
    for _ in range(2):
        assert probe.reload("sudden.service")["ok"]


def test_a_reload_that_a_stop_puts_an_end_to_says_nothing_about_the_stack(host: Managed) -> None:
    host.unit("patient.service", SLEEP + "ExecReload=/bin/sleep 60\n")
    host.systemctl("start", "patient.service")
    probe = host.probe()
    probe.until("patient.service", running)
    probe.send("reload", "patient.service")
    eventually(lambda: host.bed.property("patient.service", "ActiveState") == "reloading")
    host.systemctl("stop", "--no-block", "patient.service")
    reloaded = probe.answer("reloaded")
    assert not reloaded["ok"] and reloaded["interrupted"], reloaded


def test_a_reload_runs_all_commands_and_is_done_when_they_are(host: Managed) -> None:
    commands = "ExecReload=/bin/sleep 0.3\nExecReload=/bin/touch /run/reloaded\n"
    host.unit("reloads.service", SLEEP + commands)
    host.systemctl("start", "reloads.service")
    probe = host.probe()
    probe.until("reloads.service", running)
    assert probe.reload("reloads.service") == {"ok": True, "told": "reload", "reason": "", "output": ""}
    assert host.bed.path("/run/reloaded").exists()
    host.bed.path("/run/reloaded").unlink()


def test_a_failing_reload_says_which_command_and_what_it_printed(host: Managed) -> None:
    commands = (
        "ExecReload=-/bin/false\nExecReload=/bin/sh -c 'echo it will not do; echo really >&2; exit 7'\n"
    )
    host.unit("fails.service", SLEEP + commands)
    host.systemctl("start", "fails.service")
    probe = host.probe()
    probe.until("fails.service", running)
    assert probe.reload("fails.service") == {
        "ok": False,
        "told": "reload",
        "reason": "reload failed: /bin/sh exited with status 7",
        "output": "it will not do\nreally\n",
    }


def test_a_command_that_fails_after_the_reload_is_told_as_well(bed262: Bed) -> None:
    install(bed262)
    with contextlib.ExitStack() as stack:
        host = Managed(bed262, stack)
        commands = "ExecReload=/bin/true\nExecReloadPost=/bin/sh -c 'echo not to be had; exit 3'\n"
        host.unit("after.service", SLEEP + commands)
        host.systemctl("start", "after.service")
        probe = host.probe()
        probe.until("after.service", running)
        reloaded = probe.reload("after.service")
    assert (reloaded["reason"], reloaded["output"]) == (
        "reload failed: /bin/sh exited with status 3",
        "not to be had\n",
    )


def test_a_reload_that_hangs_times_out(host: Managed) -> None:
    host.unit("hangs.service", SLEEP + "ExecReload=/bin/sleep 60\nTimeoutStartSec=1\n")
    host.systemctl("start", "hangs.service")
    probe = host.probe()
    probe.until("hangs.service", running)
    reloaded = probe.reload("hangs.service")
    assert (reloaded["ok"], reloaded["reason"]) == (False, "reload timed out")
    assert "interrupted" not in reloaded


TOLD = """[Service]
ExecStart=/usr/bin/python3 -ISBc \\
    "import os, signal, time; \\
    signal.signal(signal.SIGHUP, lambda *_: open('/tmp/told-%N', 'a').write('x')); \\
    signal.signal(signal.SIGUSR2, signal.SIG_IGN); \\
    open('/tmp/up-%N', 'w'); \\
    [time.sleep(3600) for _ in iter(int, 1)]"
TimeoutStopSec=1
"""
KILL = f"{TOLD}ExecReload=/bin/kill -HUP $MAINPID\n"
# Units by what is added to KILL, or stands in place of its command, and whether their reload is that signal alone.
SIGNALS = {
    "plain": ("", True),
    "other": ("ExecReload=\nExecReload=/usr/bin/kill -s USR2 ${MAINPID}", True),
    "path": ("ExecReload=\nExecReload=kill --signal SIGHUP $MAINPID", True),
    "words": ("ExecReload=\nExecReload=/bin/kill '-HUP' \\\n  $MAINPID", True),
    "user": ("User=nobody", True),
    "dynamic": ("DynamicUser=yes", True),
    "boxed": ("ProtectSystem=full\nPrivateDevices=yes\nProtectHome=yes\nNoNewPrivileges=yes", True),
    "native": ("SystemCallArchitectures=native", True),
    "access": ("NotifyAccess=all", True),
    "twice": ("ExecReload=/bin/kill -HUP $MAINPID", False),
    "minus": ("ExecReload=\nExecReload=-/bin/kill -HUP $MAINPID", False),
    "plus": ("ExecReload=\nExecReload=+/bin/kill -HUP $MAINPID", False),
    "shell": ("ExecReload=\nExecReload=/bin/sh -c 'kill -HUP $MAINPID'", False),
    "dollar": ("ExecReload=\nExecReload=/bin/kill -HUP $$MAINPID", False),
    "semicolon": ("ExecReload=\nExecReload=/bin/kill -HUP $MAINPID ; /bin/true", False),
    "environment": ("Environment=MAINPID=4711", False),
    "file": ("EnvironmentFile=-/etc/default/web", False),
    "root": ("RootDirectory=/\nMountAPIVFS=yes", False),
    "binds": ("BindReadOnlyPaths=/usr/bin/true:/usr/bin/kill", False),
    "hides": ("InaccessiblePaths=/usr/bin/kill", False),
    "pids": ("PrivatePIDs=yes", False),
    "users": ("PrivateUsers=yes", False),
    "pidfile": ("PIDFile=/run/web.pid", False),
    "propagates": ("[Unit]\nPropagatesReloadTo=twice.service", False),
    "propagated": ("[Unit]\nReloadPropagatedFrom=shell.service", False),
    "asked": ("[X-Confext]\nReload=unit", False),
}


def test_a_reload_that_is_nothing_but_a_signal_is_told_from_one_that_may_be_more(host: Managed) -> None:
    """By what real systemd makes of unit files."""
    host.units({f"{name}.service": f"{KILL}{more}\n" for name, (more, _) in SIGNALS.items()})
    host.systemctl("start", *SIGNALS)
    probe = host.probe()
    told = {}
    for name in SIGNALS:
        probe.until(f"{name}.service", running)
        told[name] = probe.reload(f"{name}.service")["told"]
    wanted = {name: "SIGHUP" if signalled else "reload" for name, (_, signalled) in SIGNALS.items()}
    assert told == wanted | {"other": "SIGUSR2"}
    # systemd has run nothing for the one, and for the other all that it says.
    assert not has_run(host, "plain") and has_run(host, "twice")


def has_run(host: Managed, name: str) -> bool:
    """Whether systemd has ever run the last command of ExecReload=."""
    return "start_time=[n/a]" not in host.bed.property(f"{name}.service", "ExecReload").rpartition("{")[2]


def test_a_reload_by_a_signal_reaches_the_service_and_leaves_it_as_it_was(host: Managed) -> None:
    host.unit("kill.service", KILL)
    host.systemctl("start", "kill.service")
    eventually(lambda: host.bed.path("/tmp/up-kill").exists())
    probe = host.probe()
    first = probe.until("kill.service", running)
    for number in (1, 2):
        assert probe.reload("kill.service") == {"ok": True, "told": "SIGHUP", "reason": "", "output": ""}
        eventually(lambda: told_times(host, "kill") == number)  # noqa: B023 -- called at once
    assert host.main_pid("kill.service") == first["pid"]
    assert "Reload" not in host.bed.journal("--unit=kill.service")
    # What its unit says anew is what counts from then on.
    host.bed.path(f"{UNITS}/kill.service.d").mkdir()
    more = "[Service]\nExecReload=/bin/touch /tmp/more\n"
    host.bed.path(f"{UNITS}/kill.service.d/more.conf").write_text(more)
    host.systemctl("daemon-reload")
    assert probe.reload("kill.service")["told"] == "reload"
    assert host.bed.path("/tmp/more").exists()
    eventually(lambda: told_times(host, "kill") == 3)


def told_times(host: Managed, name: str) -> int:
    """How often the handler of a service of KILL has run."""
    told = host.bed.path(f"/tmp/told-{name}")
    return len(told.read_text()) if told.exists() else 0


def test_a_unit_that_is_reloaded_with_it_still_is(host: Managed) -> None:
    host.units(
        {
            "first.service": f"{KILL}[Unit]\nPropagatesReloadTo=second.service\n",
            "second.service": KILL,
        }
    )
    host.systemctl("start", "first", "second")
    eventually(lambda: host.bed.path("/tmp/up-second").exists())
    probe = host.probe()
    probe.until("first.service", running)
    assert probe.reload("first.service")["told"] == "reload"
    eventually(lambda: told_times(host, "second") == 1)


def test_a_main_process_that_its_units_user_may_not_signal_is_not_signalled(host: Managed) -> None:
    """It has changed its user since it was started: `kill` of systemd's is not allowed to."""
    become = TOLD.replace("import os, signal, time;", "import os, signal, time; os.setuid(65534);")
    setpriv = become.replace("ExecStart=", "ExecStart=+")
    host.unit("turned.service", f"{setpriv}User=daemon\nExecReload=/bin/kill -HUP $MAINPID\n")
    host.systemctl("start", "turned.service")
    eventually(lambda: host.bed.path("/tmp/up-turned").exists())
    probe = host.probe()
    probe.until("turned.service", running)
    reloaded = probe.reload("turned.service")
    assert (reloaded["ok"], reloaded["told"]) == (False, "reload"), reloaded
    assert not host.bed.path("/tmp/told-turned").exists()


def test_a_signal_that_would_end_the_service_is_left_to_systemd(host: Managed) -> None:
    host.unit("ends.service", f"{SLEEP}ExecReload=/bin/kill -HUP $MAINPID\n")
    host.systemctl("start", "ends.service")
    probe = host.probe()
    probe.until("ends.service", running)
    assert probe.reload("ends.service")["told"] == "reload"
    probe.until("ends.service", stopped)


def test_no_signal_comes_between_a_stop_and_its_end(host: Managed) -> None:
    host.unit("stops.service", KILL + "ExecStop=/bin/sleep 2\n")
    host.systemctl("start", "stops.service")
    eventually(lambda: host.bed.path("/tmp/up-stops").exists())
    probe = host.probe()
    probe.until("stops.service", running)
    host.systemctl("stop", "--no-block", "stops.service")
    reloaded = probe.reload("stops.service")
    assert (reloaded["ok"], reloaded["told"]) == (True, "") and "does not run any more" in reloaded["reason"]
    probe.until("stops.service", stopped)
    assert not host.bed.path("/tmp/told-stops").exists()


TELLS = """import os, signal, socket, time
def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
notify("READY=1")
while True:
    signal.sigwait({signal.SIGHUP})
    notify(f"RELOADING=1\\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    time.sleep(2)
    if not os.path.exists("/tmp/never"):
        open("/tmp/told-tells", "w").close()
        notify("READY=1")
"""


def test_a_service_that_tells_of_its_reload_is_waited_for_after_a_signal(host: Managed) -> None:
    host.bed.path("/root/tells.py").write_text(TELLS)
    how = "[Service]\nType=notify\nTimeoutStartSec=4\nExecStart=/usr/bin/python3 -ISB /root/tells.py\n"
    host.unit("tells.service", f"{how}ExecReload=/bin/kill -HUP $MAINPID\n")
    host.systemctl("start", "tells.service")
    probe = host.probe()
    probe.until("tells.service", running)
    assert probe.reload("tells.service")["told"] == "SIGHUP"
    assert host.bed.path("/tmp/told-tells").exists()
    host.bed.path("/tmp/never").touch()
    reloaded = probe.reload("tells.service")
    assert (reloaded["ok"], reloaded["reason"]) == (False, "reload timed out")
    host.bed.path("/tmp/never").unlink()


NOTIFY_RELOAD = """[Service]
Type=notify-reload
ReloadSignal=SIGUSR1
ExecStart=/usr/bin/python3 /root/notify_reload.py
"""
NOTIFY_RELOAD_PROGRAM = """
import os, signal, socket, time
def tell(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        address = os.environ["NOTIFY_SOCKET"]
        sock.connect("\\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(text.encode())
def reload(*_):
    tell(f"RELOADING=1\\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    open("/run/notify-reloaded", "w").close()
    tell("READY=1")
signal.signal(signal.SIGUSR1, reload)
tell("READY=1")
while True:
    signal.pause()
"""


def test_a_notify_reload_service_gets_its_own_signal_and_is_waited_for(host: Managed) -> None:
    host.bed.path("/root/notify_reload.py").write_text(NOTIFY_RELOAD_PROGRAM)
    host.unit("notifies.service", NOTIFY_RELOAD)
    host.systemctl("start", "notifies.service")
    probe = host.probe()
    probe.until("notifies.service", running)
    assert probe.reload("notifies.service")["told"] == "reload"
    assert host.bed.path("/run/notify-reloaded").exists()
    host.bed.path("/run/notify-reloaded").unlink()


AS_NONE_SAYS = "it was not told to reload, as Reload=none says"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("auto", {"ok": True, "told": "", "reason": "", "output": ""}),
        ("none", {"ok": True, "told": "", "reason": AS_NONE_SAYS, "output": ""}),
        ("restart", {"ok": True, "told": "restart", "reason": "", "output": ""}),
        ("signal:URG", {"ok": True, "told": "SIGURG", "reason": "", "output": ""}),
    ],
)
def test_a_service_that_cannot_reload_is_told_as_its_settings_say(
    host: Managed, setting: str, expected: dict[str, Any]
) -> None:
    host.unit("mute.service", SLEEP + f"[X-Confext]\nReload={setting}\n")
    host.systemctl("start", "mute.service")
    probe = host.probe()
    before = probe.until("mute.service", running)
    assert probe.reload("mute.service") == expected
    if setting == "restart":
        probe.until("mute.service", lambda s: running(s) and s["invocation"] != before["invocation"])


@pytest.mark.parametrize("name", ["HUP", "RTMIN+1"])
def test_a_signal_that_would_end_a_service_is_not_sent_to_it(host: Managed, name: str) -> None:
    host.unit("deaf.service", SLEEP + f"[X-Confext]\nReload=signal:{name}\n")
    host.systemctl("start", "deaf.service")
    probe = host.probe()
    before = probe.until("deaf.service", running)
    reloaded = probe.reload("deaf.service")
    assert (
        reloaded["ok"]
        and not reloaded["told"]
        and f"SIG{name} was not sent, it has no handler" in reloaded["reason"]
    )
    assert host.main_pid("deaf.service") == before["pid"]


def test_a_signal_waits_for_the_handler_of_a_service_that_is_still_starting(host: Managed) -> None:
    host.unit(
        "wakes.service",
        "[Service]\nType=notify\nNotifyAccess=all\n"
        'ExecStart=/bin/sh -c \'sleep 1; trap "touch /run/signalled" HUP; systemd-notify --ready; sleep 1;'
        " while :; do sleep 1; done'\n[X-Confext]\nReload=signal:HUP\n",
    )
    probe = host.probe()
    host.systemctl("start", "--no-block", "wakes.service")
    before = probe.until("wakes.service", running)
    assert probe.reload("wakes.service")["told"] == "SIGHUP"
    eventually(lambda: host.bed.path("/run/signalled").exists())
    assert host.main_pid("wakes.service") == before["pid"]
    host.bed.path("/run/signalled").unlink()


def test_a_reload_that_is_insisted_on_and_impossible_is_a_failure(host: Managed) -> None:
    host.unit("insists.service", SLEEP + "[X-Confext]\nReload=unit\n")
    host.systemctl("start", "insists.service")
    probe = host.probe()
    probe.until("insists.service", running)
    assert not probe.reload("insists.service")["ok"]


def test_a_reload_does_not_get_in_the_way_of_a_stop(host: Managed) -> None:
    host.unit(
        "stops.service",
        SLEEP + "ExecReload=/bin/true\nExecStop=/bin/sleep 2\nExecStop=/bin/touch /run/stopped\n",
    )
    host.systemctl("start", "stops.service")
    probe = host.probe()
    probe.until("stops.service", running)
    host.systemctl("stop", "--no-block", "stops.service")
    assert probe.reload("stops.service")["ok"]
    probe.until("stops.service", stopped)
    eventually(lambda: host.bed.property("stops.service", "ActiveState") == "inactive")
    host.bed.path("/run/stopped").unlink()  # and to the end of what it does then


def test_a_service_that_is_still_starting_is_reloaded_once_it_runs(host: Managed) -> None:
    host.unit(
        "starts.service",
        "[Service]\nType=notify\nNotifyAccess=all\nExecReload=/bin/touch /run/reloaded-late\n"
        "ExecStart=/bin/sh -c 'sleep 2; systemd-notify --ready; sleep infinity'\n",
    )
    probe = host.probe()
    host.systemctl("start", "--no-block", "starts.service")
    probe.until("starts.service", running)
    assert probe.reload("starts.service") == {"ok": True, "told": "reload", "reason": "", "output": ""}
    assert host.bed.path("/run/reloaded-late").exists()
    host.bed.path("/run/reloaded-late").unlink()


def test_all_processes_of_a_service_are_known(host: Managed) -> None:
    host.unit("family.service", "[Service]\nExecStart=/bin/sh -c 'sleep infinity & sleep infinity & wait'\n")
    host.systemctl("start", "family.service")
    probe = host.probe()
    found = probe.until("family.service", running)
    deadline = time.monotonic() + SECONDS
    while len(pids := probe.ask("processes", "family.service", "processes")) < 3:
        assert time.monotonic() < deadline
    assert found["pid"] in pids and len(pids) == 3


def daemon_reloads(bed: Bed) -> int:
    said = bed.run(
        ["journalctl", "--quiet", "--no-pager", "--output=cat", "_PID=1", "--grep=^Reload requested"],
        check=False,
    )
    return sum(line.startswith("Reload requested") for line in said.stdout.splitlines())


def write_record(bed: Bed, unit: str, slots: list[str]) -> None:
    """The last of the slots, as the store makes it; it leads nowhere."""
    directory = bed.path(f"/var/lib/confext-watcher/stacks/{unit}/{len(slots):08}-x")
    directory.mkdir(parents=True)
    (directory / slots[-1]).symlink_to("/nowhere")
    entries = [{"slot": slot, "path": "/x", "kind": "image"} for slot in slots]
    accepted = {"when": 1, "entries": entries, "stack": {"layers": entries}}
    record = {"version": 1, "accepted": accepted, "sysexts": []}
    (directory / ".state.json").write_text(json.dumps(record))
    units = bed.path("/var/lib/confext-watcher/units")
    units.mkdir(exist_ok=True)
    (units / ".tmp").symlink_to(f"../stacks/{unit}/{directory.name}")
    (units / ".tmp").rename(units / unit)


def test_a_hundred_new_entries_in_a_second_make_one_or_two_daemon_reloads(host: Managed) -> None:
    host.unit("burst.service")
    probe = host.probe()
    probe.until("burst.service", stopped)
    probe.ask("learn", "burst.service", "learned")
    before = daemon_reloads(host.bed)
    slots: list[str] = []
    begun = time.monotonic()
    for number in range(100):
        slots.append(f"web{number}.raw")
        write_record(host.bed, "burst.service", slots)
        probe.send("learn", "burst.service")
        time.sleep(0.01)
    changing = time.monotonic() - begun
    for _ in range(100):
        while "learned" not in probe.next():
            pass
    host.bed.run(["sh", "-c", "rm -r /var/lib/confext-watcher/*/burst.service"])
    assert 1 <= daemon_reloads(host.bed) - before <= 1 + math.ceil(changing)
    drop_in = host.bed.path("/run/systemd/generator/burst.service.d/zzzz-confext-watcher.conf")
    assert "web99.raw" in drop_in.read_text()


def test_an_old_systemd_is_refused_in_one_line(bed254: Bed) -> None:
    probe = Probe(bed254)
    try:
        assert probe.next()["unsupported"].startswith("systemd 254")
    finally:
        probe.close()
