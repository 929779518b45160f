# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services without systemd: a stack that a service does not take well goes away again, and stays away.

By itself (rounds/verdicts.py), also where the daemon is killed in between (rounds/changes.py), or by hand: what `plan`,
`wait` and `rollback` do is control/commands.py.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import dying, fork_server
from support.needs import root, tool
from support.place import PROGRAM, Place, eventually
from support.records import record, under_way
from watcher.records.schema import SOCKET

pytestmark = [root, tool("mksquashfs")]

SLEEP = ("sleep", "infinity")
# A program's own reload: takes note of what it finds, and fails on "broken".
RELOAD = "cat /etc/web.conf >>{seen}; echo >>{seen}; if grep -q broken /etc/web.conf; then echo line 7 >&2; exit 3; fi"


class Reloading(Place):
    """A place whose service says what it saw when it was reloaded."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.seen = scratch / "seen"
        self.seen.touch()
        self.options = ("--reload-command", f"sh -c '{RELOAD.format(seen=self.seen)}'")

    def reloads(self) -> list[str]:
        return self.seen.read_text().split()

    def under_way(self) -> list[str]:
        """The services that are not at the end of what was begun."""
        return under_way(self.state)

    def is_rolled_back(self) -> bool:
        return "rolled-back" in self.outcomes()[-2:] and not self.under_way()

    def run(self, *options: str) -> subprocess.Popen[bytes]:
        """A daemon, and a service that was started well on version 1."""
        self.image("1", "one")
        self.start_daemon()
        service = self.start(*SLEEP, options=(*self.options, *options))
        self.until("started well")
        return service


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Reloading]:
    with Reloading(tmp_path) as made:
        yield made


# A program that is ended by the signal that asks it to reload.
ENDS = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [1]); signal.sigwait([1]); os._exit(3)"


def test_each_of_many_that_are_ended_by_the_signal_gets_its_old_stack_back(place: Reloading) -> None:
    """Their manager has noticed most of these ends by the time that the verdict is due."""
    place.image("1", "one")
    place.start_daemon()
    names = [f"web{number}.service" for number in range(25)]
    for name in names:
        place.start(sys.executable, "-ISc", ENDS, name=name, options=("--reload-signal", "SIGHUP"))
    for _ in names:
        place.until("started well")
    place.image("2", "two")
    eventually(lambda: all("rolled-back" in place.outcomes(name) for name in names))


def test_a_failed_reload_is_undone_and_what_it_printed_is_told(place: Reloading) -> None:
    service = place.run()
    slot = place.slot()
    place.image("2", "broken")
    line = place.outcome("rolled-back")
    assert "level=warning" in line and "failed with exit status 3 (line 7); back on web 1 in" in line
    assert place.reloads() == ["broken", "one"]
    assert (place.shown(service), place.slot()) == ("one", slot)
    eventually(lambda: place.outcomes() == ["rolled-back"])
    event = place.history()[0]
    assert (event.version, event.output) == ("2", "line 7\n".rstrip())


def test_it_stays_out_for_good_until_something_else_comes(place: Reloading) -> None:
    service = place.run()
    bad = place.image("2", "broken")
    place.outcome("rolled-back")
    os.utime(bad)
    other = place.start(*SLEEP, name="other.service")  # looks at the same files, and is not affected
    assert place.shown(other) == "broken"
    place.stop_daemon()
    place.start_daemon()
    place.stop(service)
    service = place.start(*SLEEP, options=place.options)
    assert place.shown(service) == "one"
    os.utime(bad)
    place.image("0", "old")  # makes for a round whose outcome is nothing
    assert (place.shown(service), place.reloads()) == ("one", ["broken", "one"])
    place.image("2", "mended")
    place.outcome("applied")
    assert (place.shown(service), place.reloads()) == ("mended", ["broken", "one", "mended"])


def test_a_newer_version_is_let_in(place: Reloading) -> None:
    service = place.run()
    place.image("2", "broken")
    place.outcome("rolled-back")
    place.image("3", "three")
    assert "web 1 -> 3 applied" in place.outcome("applied")
    assert place.shown(service) == "three"


def test_forget_lets_it_in_again_and_says_what(place: Reloading) -> None:
    place.run()
    bad = place.image("2", "broken")
    place.outcome("rolled-back")
    said = place.command("rollback", "web.service", "--forget").stdout
    assert f"{bad} is let in again; it was kept out because: reload command" in said
    place.outcome("rolled-back")
    assert place.reloads() == ["broken", "one"] * 2


def test_a_way_back_that_fails_too_is_critical_and_the_end_of_it_for_now(place: Reloading) -> None:
    place.options = ("--reload-command", f"sh -c 'echo >>{place.seen} x; test $(wc -l <{place.seen}) -eq 1'")
    place.run()
    place.image("2", "two")
    place.outcome("applied")
    place.image("3", "three")
    line = place.outcome("rolled-back")
    assert "level=critical" in line and "that failed too" in line
    assert "so web 3 is not to blame, and is tried again at the next start" in line
    place.image("0", "old")
    place.command("plan")
    assert place.reloads() == ["x", "x", "x"]
    assert place.outcomes() == ["applied", "rolled-back"]


def test_rollback_no_leaves_it_and_says_failed(place: Reloading) -> None:
    service = place.run("--set", "Rollback=no")
    place.image("2", "broken")
    assert "it is not rolled back" in place.outcome("failed")
    assert (place.shown(service), place.reloads()) == ("broken", ["broken"])


def test_a_health_check_that_never_succeeds_takes_it_back(place: Reloading) -> None:
    health = ("--health-check", "grep -qv sick /etc/web.conf", "--set", "HealthCheckSec=3s")
    service = place.run(*health)
    place.image("2", "sick")
    assert "health check" in place.outcome("rolled-back")
    assert (place.shown(service), place.reloads()) == ("one", ["sick", "one"])


def test_a_health_check_is_tried_again_until_it_succeeds(place: Reloading) -> None:
    tries = place.scratch / "tries"
    place.run("--health-check", f"sh -c 'echo >>{tries} x; test $(wc -l <{tries}) -ge 4'")
    place.image("2", "two")
    place.outcome("applied")


def test_a_service_has_to_stay_up_for_as_long_as_it_is_watched(place: Place) -> None:
    script = "trap 'grep -q one /etc/web.conf || { sleep 0.3; exit 1; }' HUP; while :; do sleep 0.05; done"
    place.image("1", "one")
    place.start_daemon()
    options = ("--reload-signal", "HUP", "--set", "HealthWatchSec=3s")
    place.start("sh", "-c", script, options=options)
    place.until("started well")
    place.image("2", "two")
    line = place.outcome("rolled-back")
    assert "its main process ended within 3 s of its reload" in line and "its next start gets web 1" in line


def test_a_service_that_the_signal_ends_gets_the_old_stack_at_its_next_start(place: Place) -> None:
    script = "trap 'grep -q one /etc/web.conf || exit 1' HUP; while :; do sleep 0.05; done"
    place.image("1", "one")
    place.start_daemon()
    options = ("--reload-signal", "HUP")
    place.start("sh", "-c", script, options=options)
    place.until("started well")
    place.image("2", "two")
    place.outcome("rolled-back")
    assert place.shown(place.start("sh", "-c", script, options=options)) == "one"


def test_back_by_hand_stays_until_it_is_undone(place: Reloading) -> None:
    service = place.run()
    place.image("2", "two")
    place.outcome("applied")
    while not (events := place.history()):  # written down a moment after it was said
        pass
    first = events[0].previous
    done = place.command("rollback", "web.service")
    assert "web 2 -> 1 applied" in done.stdout and place.shown(service) == "one"
    place.image("3", "three")
    place.until("stays on the stack that it was put on by hand")
    assert place.shown(service) == "one"
    again = place.command("rollback", "web.service", "--to", first[:6])
    assert "is on that stack already" in again.stdout
    assert place.command("rollback", "web.service", "--to", "nonsense", check=False).returncode == 1
    assert place.command("rollback", "nobody.service", check=False).returncode == 1
    place.command("rollback", "web.service", "--forget")
    place.until("web 1 -> 3 applied")
    assert place.shown(service) == "three"


def test_back_by_hand_does_not_go_to_what_proved_bad(place: Reloading) -> None:
    place.run()
    place.image("2", "broken")
    place.outcome("rolled-back")
    done = place.command("rollback", "web.service", check=False)
    assert done.returncode == 1 and "no stack" in done.stderr.lower()


def test_plan_says_what_would_change_and_changes_nothing(place: Reloading) -> None:
    (place.settings / "watcher.conf").write_text("[Watcher]\nSettleSec=1h\nSettleMaxSec=1h\n")
    service = place.run()
    place.image("2+3", "two")
    before = place.slot(), place.shown(service), place.dropped(), place.outcomes()
    assert "web.service: web 1 -> 2" in place.command("plan").stdout
    assert (place.slot(), place.shown(service), place.dropped(), place.outcomes()) == before
    assert place.reloads() == []


def test_wait_knows_an_image_whose_tries_were_counted(place: Reloading) -> None:
    place.run()
    place.image("2+3", "broken")
    done = place.command("wait", "web.service", "web_2+3.raw", check=False)
    # Taken out again, or kept out already, by whether it was asked before the service was back on what it had.
    assert done.returncode == 1 and "failed with exit status 3" in done.stdout
    assert place.dropped() == ["web_1.raw", "web_2+2-1.raw"]


def test_a_removal_that_does_not_do_is_undone(place: Reloading) -> None:
    """Nothing in the stack without it is new: the stack as a whole is kept out."""
    reload = f"sh -c 'cat /etc/web.conf >>{place.seen} && echo >>{place.seen} && test -e /etc/base.conf'"
    place.options = ("--reload-command", reload)
    base = place.image("1", "base", name="base", versions="base.raw.v")
    service = place.run()
    base.unlink()
    assert "the stack without it taken out again" in place.outcome("rolled-back")
    assert (place.shown(service, "/etc/base.conf"), place.reloads()) == ("base", ["one", "one"])
    place.stop_daemon()
    place.start_daemon()
    place.image("2", "two")
    place.outcome("rolled-back")
    place.image("1", "base", name="base", versions="base.raw.v")
    place.image("3", "three")
    eventually(lambda: place.shown(service) == "three")
    assert place.shown(service, "/etc/base.conf") == "base"


def test_what_cannot_be_written_down_is_not_done_nor_later(place: Reloading) -> None:
    service = place.run()
    place.image("2", "two")
    place.outcome("applied")
    assert place.daemon is not None
    soft, hard = resource.prlimit(place.daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(place.daemon.pid, resource.RLIMIT_FSIZE, (0, hard))
    done = place.command("rollback", "web.service", check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "confext-watcher: not done, it cannot be written down: File too large\n",
    )
    resource.prlimit(place.daemon.pid, resource.RLIMIT_FSIZE, (soft, hard))
    place.image("3", "three")
    assert "2 -> 3" in place.outcome("applied")
    assert (place.shown(service), record(place.state, "web.service.exec").pin) == ("three", None)


def test_plan_says_what_has_to_wait(place: Reloading) -> None:
    service = place.run("--check", "true")
    place.stop(service)
    place.image("2", "two")
    eventually(lambda: "it is not running, and Check= needs that" in place.command("plan").stdout)
    assert "web.service: no change" in place.command("plan").stdout


def test_wait_says_by_its_exit_status_what_became_of_an_image(place: Reloading) -> None:
    place.run()
    place.image("2", "broken")
    done = place.command("wait", "web.service", "web_2.raw", check=False)
    assert done.returncode == 1 and "taken out again" in done.stdout
    place.image("3", "three")
    assert place.command("wait", "web.service", "web_3.raw").stdout.count("applied") == 1


def test_wait_takes_what_is_being_judged_for_neither(place: Reloading) -> None:
    """The image is in the stack already, and on its way out of it again."""
    go = place.scratch / "go"
    slow = f"! grep -q broken /etc/web.conf && exit; until test -e {go}; do sleep 0.02; done; exit 1"
    place.options = ("--reload-command", f"sh -c '{slow}'")
    service = place.run()
    daemon = place.daemon
    assert daemon is not None
    place.image("2", "broken")
    eventually(lambda: place.shown(service) == "broken")
    waiting = fork_server.Popen([*PROGRAM, "wait", "web.service", "web_2.raw"], env=place.environment)
    eventually(lambda: has_client(daemon.pid) or waiting.poll() is not None)
    go.touch()
    assert waiting.wait(30) == 1


def has_client(pid: int) -> bool:
    """Whether the daemon has accepted a connection (state 03 in /proc/net/unix) to its socket, by any path of it."""
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
    inodes = {row[6] for row in rows if row[5] == "03" and SOCKET in row[-1]}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").rstrip("]") in inodes:
                return True
    return False


STEPS = 80


@pytest.mark.limit(600)
@pytest.mark.parametrize(("version", "each"), [("2", 1), ("2+3", 3)])
def test_killed_at_any_step_the_next_daemon_brings_the_rollback_to_its_end(
    tmp_path: Path, version: str, each: int
) -> None:
    """The daemon is killed before the first, second, ... step that it takes from the drop of a bad image on.

    With tries left, the image is kept out in memory only: all else is alike, so that every third step will do.
    """
    taken: list[str] = []
    for step in range(1, STEPS, each):
        with Reloading(tmp_path / str(step)) as place:
            if rolled_back_although_killed(place, version, step, taken):
                break
    else:
        pytest.fail(f"more than {STEPS} steps")
    assert len(taken) >= 24 // each, taken  # or the seam has gone


def rolled_back_although_killed(place: Reloading, version: str, step: int, taken: list[str]) -> bool:
    """Whether the daemon came to the end before that step."""
    place.image("1", "one")
    place.environment |= {"DYING_STEP": str(step), "DYING_ARMED": str(place.scratch / "armed")}
    place.start_daemon((sys.executable, dying.__file__))
    service = place.start(*SLEEP, options=place.options)
    place.until("started well")
    eventually(lambda: not place.under_way())
    slot = place.slot()
    (place.scratch / "armed").touch()
    place.image(version, "broken")
    daemon = place.daemon
    assert daemon is not None
    eventually(lambda: daemon.poll() is not None or place.is_rolled_back())
    survived = daemon.poll() is None
    if survived:
        place.stop_daemon()
    else:
        assert daemon.returncode == -signal.SIGKILL
        taken.append((place.scratch / "armed").read_text())
        place.ended()
        place.start_daemon(PROGRAM)
        eventually(place.is_rolled_back, lambda: (step, taken[-1:], "".join(place.log), place.history()))
        place.stop_daemon()
    said = (step, taken[-1:], "".join(place.log), place.history())
    assert (place.shown(service), place.slot()) == ("one", slot), said
    assert place.reloads()[-1:] == ["one"], said
    assert "applied" not in place.outcomes() and place.outcomes().count("rolled-back") <= 2, said
    assert "web_2.raw" not in place.dropped() or version == "2", said
    return survived


FIRST = 7  # before that the image is copied


@pytest.mark.limit(300)
def test_killed_at_any_step_up_to_acceptance_a_try_is_counted_once(place: Reloading) -> None:
    """One daemon after the other goes one step further than the one before, until one has accepted the stack."""
    place.image("1", "one")
    place.start(*SLEEP, options=place.options)
    slot = place.slot()
    place.image("2+3", "broken")
    armed = place.scratch / "armed"
    environment = place.environment | {"DYING_ARMED": str(armed)}
    taken: list[str] = []
    for step in range(FIRST, STEPS):
        armed.touch()
        environment["DYING_STEP"] = str(step)
        daemon = [sys.executable, dying.__file__, "run"]
        with fork_server.Popen(daemon, env=environment, stdin=subprocess.DEVNULL) as process:
            assert process.wait(60) == -signal.SIGKILL
        taken.append(armed.read_text())
        armed.unlink()
        assert place.dropped()[-1] in ("web_2+3.raw", "web_2+2-1.raw"), taken
        if place.slot() != slot:
            break
    assert "watcher.mounts.syscalls.rename_noreplace" in taken, taken
    assert place.dropped()[-1] == "web_2+2-1.raw"
    for tries in ("2+2-1", "2+1-2", "2+0-3"):
        place.start_daemon()
        eventually(place.is_rolled_back)
        place.stop_daemon()
        assert place.dropped()[-1] == f"web_{tries}.raw"
