# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher exec` (rounds/exec_service.py): the program is the very process, on its stack from its first
instruction on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.place import COMMAND, PYTHON, Place, until
from support.needs import root
from support.records import record
from watcher.managers.systemd import unit_facts

trees_only = pytest.mark.parametrize("place", ["trees"], indirect=True)

# Prints what a program inherits.
INHERITED = """
import json, os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
print("started", json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "cwd": os.getcwd(), "own": os.environ.get("OWN"),
    "descriptors": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1],
    "blocked": status["SigBlk"], "threads": status["Threads"],
}))
"""


def test_it_is_the_same_process(place: Place) -> None:
    place.environment["OWN"] = "kept"
    service = place.start(program=(sys.executable, "-ISc", INHERITED), wait=False, cwd=place.path)
    found = json.loads(service.said.wait_for("^started").partition(" ")[2])
    assert found["pid"] == service.pid
    assert found["parent"] == os.getpid()
    assert found["cwd"] == ("/" if place.trees else str(place.path))  # nsenter(1) goes there
    assert found["own"] == "kept"
    assert found["descriptors"] == [0, 1, 2]
    assert found["threads"] == "1"
    assert int(found["blocked"], 16) == 0
    assert service.wait() == 0


@trees_only
def test_no_signal_is_ignored_that_was_not_before(place: Place) -> None:
    """Python ignores SIGPIPE and SIGXFSZ, and what is ignored is inherited."""
    look = ("sh", "-c", "grep SigIgn /proc/self/status")
    # Those of libc's own signals that whoever runs the tests ignores, nobody can have back.
    before = subprocess.run(look, capture_output=True, text=True, check=True).stdout
    service = place.start(program=look, wait=False)
    assert service.wait() == 0
    assert service.said.wait_for_end() == before.splitlines()


def test_exit_status_and_signals_are_its_own(shared: Place) -> None:
    service = shared.start()
    service.send(signal.SIGUSR2)
    assert service.wait() == 7
    service = shared.start()
    service.send(signal.SIGTERM)
    assert service.wait() == -signal.SIGTERM


def test_it_starts_on_its_stack_without_any_daemon(place: Place) -> None:
    place.start(name="web.service").put("1.3")
    place.services.pop().kill()
    service = place.start(name="web.service")
    assert service.heard == ["1.3"]
    assert service.status()["layers"][0]["version"] == "1.3"
    assert service.status()["last"] is None


def test_a_daemon_that_is_started_later_takes_over(place: Place) -> None:
    place.versions("web.service").mkdir(parents=True)
    service = place.start(name="web.service")
    service.put("1.3")
    place.start_daemon()
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


def test_a_daemon_that_finds_it_on_its_stack_tells_it_nothing(place: Place) -> None:
    service = place.start(name="web.service")
    service.put("1.3")
    service.kill()
    service = place.start(name="web.service")
    place.start_daemon()
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["1.3", "1.4"]


def test_a_name_runs_once(shared: Place) -> None:
    service = shared.start()
    second = shared.start(name=service.name, wait=False)
    assert second.wait() == 1
    assert second.errors.wait_for_end() == [
        f"confext-watcher: {service.name} is running already, as process {service.pid}"
    ]
    service.put("1.3")
    service.reloaded("1.3")


def test_it_starts_again_under_its_name(shared: Place) -> None:
    service = shared.start()
    service.kill()
    service.put("1.3")
    service.logged("web 1.3 added, accepted; it is not running, its next start gets it")
    again = shared.start(name=service.name)
    again.put("1.4")
    again.reloaded("1.4")
    assert again.heard == ["1.3", "1.4"]


@pytest.mark.parametrize("shared", ["trees"], indirect=True)
@pytest.mark.parametrize(
    ("options", "program", "code", "words"),
    [
        (["--name", "../web"], PYTHON, 2, "cannot be the name of a service"),
        (["--name", ".web"], PYTHON, 2, "cannot be the name of a service"),
        (["--name", "x" * 241], PYTHON, 2, "cannot be the name of a service"),
        (["--name", "x", "--reload-signal", "SIGFOO"], PYTHON, 2, "not a signal: SIGFOO"),
        (["--name", "x", "--reload-signal", "0"], PYTHON, 2, "not a signal: 0"),
        (["--name", "x", "--reload-command", "a 'b"], PYTHON, 2, "--reload-command: No closing quotation"),
        (["--name", "x", "--set", "Reload=restart"], PYTHON, 2, "Reload= does nothing here"),
        (["--name", "x", "--set", "Enabled=no"], PYTHON, 2, "Enabled= does nothing here"),
        (
            ["--name", "x"],
            ["/nowhere/program"],
            1,
            "/nowhere/program cannot be executed: No such file or directory",
        ),
        (["--name", "x"], ["/etc/passwd"], 1, "/etc/passwd cannot be executed: Permission denied"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(
    shared: Place, options: list[str], program: list[str], code: int, words: str
) -> None:
    done = shared.run("exec", *options, "--", *program, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.startswith("confext-watcher: ")
    assert done.stderr.count("\n") == 1
    assert shared.run("status", "x", check=False).returncode != 0


@trees_only
def test_a_registration_left_half_written_is_no_obstacle(place: Place) -> None:
    """In a container every start may have the same PID."""
    services = place.runtime / "services"
    services.mkdir(parents=True)
    leave = f': > {services}/.web.service.$$; exec "$@"'
    place.start(name="web.service", prefix=("sh", "-c", leave, "sh"))


def test_its_slots_are_not_those_of_a_unit_of_the_same_name(shared: Place) -> None:
    service = shared.start(name="nginx.service")
    assert list((shared.state / "units").iterdir())
    assert unit_facts.units_with_slots(str(shared.state)) == {}
    service.kill()


def test_a_name_as_long_as_can_be(shared: Place) -> None:
    service = shared.start(name="x" * 240)
    service.put("1.3")
    service.reloaded("1.3")


def spoil_the_ledger(place: Place) -> None:
    (place.state / "ledger.sqlite").write_bytes(b"\xff" * 8192)


@trees_only
def test_a_broken_ledger_does_not_stop_it(place: Place) -> None:
    """It holds no more than the history. What must not get in is in the record of the service."""
    service = place.start(name="web.service")
    service.put("1.3")
    service.kill()
    place.start(name="web.service").kill()
    service.put("1.4")
    spoil_the_ledger(place)
    service = place.start(name="web.service")
    assert service.heard == ["1.4"]
    place.start_daemon().log.wait_for("ledger.sqlite")


@trees_only
def test_a_broken_ledger_does_not_stop_its_first_start(place: Place) -> None:
    versions = place.versions("web.service")
    versions.mkdir(parents=True)
    place.bring(place.confext("1.3"), versions / "web_1.3")
    place.state.mkdir()
    spoil_the_ledger(place)
    service = place.start(name="web.service")
    assert service.heard == ["1.3"]


@trees_only
def test_a_damaged_record_is_made_anew(place: Place) -> None:
    service = place.start(name="web.service")
    service.put("1.3")
    service.kill()
    place.start(name="web.service").kill()
    path = place.state / "units/web.service.exec/.state.json"
    path.write_bytes(b"\xff")
    service = place.start(name="web.service")
    assert service.heard == ["1.3"]
    (said,) = (line for line in service.errors.read() if "web.service" in line)
    assert "made anew from" in said
    assert record(place.state, "web.service.exec").accepted.stack.layers[0].version == "1.3"
    (aside,) = (place.state / "set-aside").iterdir()
    assert aside.read_bytes() == b"\xff"


@trees_only
def test_a_rollout_is_not_gone_round(place: Place) -> None:
    """One that is started while something new lies there has what it had until it is its turn."""
    options = ("--reload-signal", "HUP", "--set", "Rollout=rolling")
    place.start(*options, name="web.service").put("1.3")
    place.services.pop().kill()
    service = place.start(*options, name="web.service")
    service.put("1.4")
    service.kill()
    service = place.start(*options, name="web.service")
    assert service.heard == ["1.3"]
    place.start_daemon()
    service.reloaded("1.4")


@trees_only
def test_of_many_at_once_with_one_name_one_lives(place: Place) -> None:
    started = [place.start(name="web.service", wait=False) for _ in range(6)]
    until(lambda: sum(one.process.poll() is not None for one in started) == len(started) - 1)
    (alive,) = [one for one in started if one.process.poll() is None]
    for one in started:
        if one is not alive:
            assert "is running already" in one.errors.wait_for_end()[-1], one.errors.lines
    assert json.loads((place.runtime / "services/web.service.json").read_text())["pid"] == alive.pid


def test_a_program_that_cannot_be_executed_leaves_a_stopped_service_as_it_was(shared: Place) -> None:
    service = shared.start()
    service.kill()
    words = ("--name", service.name, "--confext-dir", str(service.drops), "--", "/nowhere/program")
    assert shared.run("exec", *words, check=False).returncode == 1
    service.put("1.3")
    service.logged("web 1.3 added, accepted; it is not running")


@trees_only
def test_a_directory_that_is_not_there_is_mentioned(place: Place) -> None:
    service = place.start("--confext-dir", str(place.path / "typo"), declared=False, name="web.service")
    (line,) = service.errors.read()
    assert f"web.service: {place.path}/typo does not exist yet, it is watched for" in line


@root
@pytest.mark.parametrize("place", ["images"], indirect=True)
@pytest.mark.parametrize("words", [("run",), ("exec", "--name", "web.service", "--", "true")])
def test_who_may_not_mount_is_told_what_is_needed(place: Place, words: tuple[str, ...]) -> None:
    place.environment["CONFIGURATION_DIRECTORY"] = "/nowhere"
    nobody = ("setpriv", "--bounding-set=-all", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = place.run(*words, check=False, prefix=nobody)
    assert done.returncode == 1
    assert done.stderr == (
        "confext-watcher: needs root, or a user namespace: unshare --user --map-root-user --mount\n"
    )


@root
@pytest.mark.parametrize("place", ["images"], indirect=True)
def test_what_is_in_the_way_of_the_state_directory_is_named(place: Place) -> None:
    place.state.write_text("a file")
    done = place.run("exec", "--name", "web.service", "--", "true", check=False)
    assert done.stderr == (
        f"confext-watcher: web.service: its stack cannot be put in place: {place.state}: File exists\n"
    )


def test_a_service_that_another_one_starts_has_a_stack_of_its_own(place: Place) -> None:
    """A supervisor that was started by `exec`, and starts a service by `exec`: each follows its own directory."""
    place.start_daemon()
    versions = place.versions("inner.service")
    versions.mkdir(parents=True)
    place.bring(place.confext("1", "inner 1"), versions / f"web_1{place.suffix}")
    words = [str(COMMAND), "exec", "--name", "inner.service", "--confext-dir", str(versions.parent)]
    inner = shlex.join([*words, "--reload-signal", "HUP", "--", *PYTHON])
    outer = place.start(
        *("--reload-command", "true"), name="outer.service", program=("sh", "-c", f"{inner}; :"), wait=False
    )
    outer.said.wait_for("^started inner 1$")
    main = json.loads((place.runtime / "services/inner.service.json").read_text())["pid"]
    shown = Path(f"/proc/{main}/root/etc/web.conf")
    try:
        for number in (1, 2, 3):
            outer.put(str(number), value=f"outer {number}")
            outer.logged("applied in", f"version={number} ")
            assert outer.has(f"outer {number}")
            assert shown.read_text() == f"inner {number}\n"
            made = place.confext(f"{number + 1}", f"inner {number + 1}")
            place.bring(made, versions / f"web_{number + 1}{place.suffix}")
            outer.said.wait_for(f"^reloaded inner {number + 1}$")
            assert outer.has(f"outer {number}")
        assert [line for line in outer.said.read() if "outer" in line] == []
    finally:
        os.kill(main, signal.SIGKILL)


@trees_only
def test_an_image_policy_that_cannot_be_met_lets_nothing_in(place: Place) -> None:
    options = ("--reload-signal", "HUP", "--set", "ImagePolicy=signed")
    service = place.start(*options)
    service.put("1.3")
    place.start_daemon(wait=False)
    why = r"a directory tree is unprotected, and ImagePolicy=signed \(--set\) asks for signed: sign it with a key "
    service.logged(f"refused: {why}")
    service.kill()
    service = place.start(*options, name=service.name)
    assert service.heard == ["nothing"]
    assert any("ImagePolicy=signed" in line for line in service.errors.read())
    service.kill()
    service = place.start(*options[:2], "--set", "ImagePolicy=*", name=service.name)
    assert service.heard == ["1.3"]


@trees_only
def test_what_did_not_do_on_another_is_not_what_a_new_one_begins_with(place: Place) -> None:
    """With Rollout=rolling."""
    place.start_daemon()
    command = "sh -c '! grep -q broken /etc/web.conf'"
    first = place.start("--reload-command", command, "--set", "Rollout=rolling", name="a.service")
    first.put("1.3")
    first.logged("web 1.3 added, applied")
    first.put("1.4", value="broken")
    first.logged("web 1.4 taken out again")
    options = ("--confext-dir", str(first.drops), "--set", "Rollout=rolling")
    second = place.start(*options, name="b.service", declared=False)
    assert second.heard == ["1.3"]
    assert any("it did not do on a.service" in line for line in second.errors.read())
