# SPDX-License-Identifier: LGPL-2.1-or-later
"""`status --follow` and `wait`, which stay and are kept up to date, in a real terminal and elsewhere.

They are of cli/follow.py; what a terminal is, of cli/terminal.py.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from scenarios.place import Place, Running, Service
from support.fork_server import COMMAND
from support.screens import Terminal

trees = pytest.mark.parametrize("place", ["trees"], indirect=True)
HEALTH = ("--set=HealthStableSec=0", "--set=HealthCheckSec=1h")


def inside(place: Place) -> int | None:
    return place._inside


def on_trial(place: Place) -> tuple[Service, Path]:
    """A service on trial until the file is there."""
    well = place.path / "well"
    service = place.start(
        "--reload-signal=SIGHUP", f"--health-check=test -e {well}", *HEALTH, name="web.service"
    )
    service.put("1.3")
    service.reloaded("1.3")
    return service, well


def ended(terminal: Terminal) -> str:
    """All that it has written up to Ctrl-C: the cursor is to be seen again, and nothing of Python."""
    terminal.process.send_signal(signal.SIGINT)
    seen = terminal.end()
    assert seen.status == 130 and "Traceback" not in seen.text
    assert seen.written.rfind("\x1b[?25l") <= seen.written.rfind("\x1b[?25h")
    return seen.written


@trees
def test_status_is_kept_up_to_date_on_a_terminal_also_by_another_daemon(place: Place) -> None:
    place.start_daemon()
    service, well = on_trial(place)
    terminal = Terminal([COMMAND, "status", "--follow"], environment=place.environment, inside=inside(place))
    terminal.until(lambda text: "web 1.3" in text and "on trial: it is told to reload, and watched" in text)
    assert place.daemon is not None
    place.daemon.stop()
    terminal.until(lambda text: "confext-watcher does not run; it is waited for" in text)
    place.start_daemon()
    well.touch()
    terminal.until(lambda text: "does not run" not in text and "applied" in text and "on trial" not in text)
    service.put("1.4")
    terminal.until(lambda text: "web 1.4" in text)
    ended(terminal)


@trees
def test_a_narrow_terminal_shows_all_of_a_command(place: Place) -> None:
    """Cut, it would name another service."""
    place.start_daemon()
    service = place.start("--reload-signal=SIGHUP", name="web.service")
    for version in ("1", "2"):
        service.put(version)
        service.reloaded(version)
    place.run("rollback", service.name)
    words = [COMMAND, "status", "--follow"]
    terminal = Terminal(words, columns=40, environment=place.environment, inside=inside(place))
    terminal.until(lambda text: "rollback --forget web.service Ctrl-C" in " ".join(text.split()))
    ended(terminal)


@trees
def test_piped_each_change_is_one_line(place: Place) -> None:
    place.start_daemon()
    service, well = on_trial(place)
    following = Running([str(COMMAND), "status", "--follow", "web"], place.environment, inside=inside(place))
    programs = Running([str(COMMAND), "status", "-f", "--json"], place.environment, inside=inside(place))
    following.said.wait_for("web.service: web 1.3, on trial, reload; on trial: it is told to reload")
    assert json.loads(programs.said.wait_for("web.service"))["onTrial"]
    well.touch()
    following.said.wait_for("web.service: web 1.3, applied$")
    assert not json.loads(programs.said.wait_for('"onTrial": ?false'))["onTrial"]
    service.put("1.4")
    following.said.wait_for("web.service: web 1.4, applied$")
    for one in (following, programs):
        one.send(signal.SIGINT)
        assert one.wait() == 130
        assert one.errors.wait_for_end() == []
        one.kill()


@trees
def test_wait_turns_while_it_waits_and_leaves_its_lines(place: Place) -> None:
    place.start_daemon()
    service, well = on_trial(place)
    name = next(service.versions.glob("web_*")).name
    words = [COMMAND, "wait", service.name, name]
    plain = Terminal(words, environment=place.environment, utf8=False, inside=inside(place))
    plain.until(lambda text: "reloading, " in text)
    assert ended(plain).isascii()
    terminal = Terminal(words, environment=place.environment, inside=inside(place))
    terminal.until(lambda text: "reloading, 1 s" in text)
    well.touch()
    seen = terminal.end()
    assert seen.status == 0
    *others, last = seen.text.replace("\n    ", " ").splitlines()
    assert others[-1].endswith("in place, and the service is asked to reload")
    assert "1.3 added, applied" in last


def test_a_terminal_without_utf8_gets_ascii(place: Place) -> None:
    program = "from watcher.cli import terminal; terminal.prepare(); print('\u00fc', terminal.is_utf8())"
    for utf8, said in ((True, "\u00fc True\n"), (False, "\\xfc False\n")):
        words = ["env", f"PYTHONPATH={Path.cwd()}", COMMAND.with_name("python"), "-c", program]
        assert Terminal(words, environment=place.environment, utf8=utf8).end().text == said


@trees
def test_no_daemon(place: Place) -> None:
    done = place.run("status", "--follow", check=False)
    assert (done.returncode, done.stdout) == (3, "")
    place.start_daemon()
    done = place.run("status", "--follow", "nobody", check=False)
    assert (done.returncode, "no service nobody takes part" in done.stderr) == (1, True)
