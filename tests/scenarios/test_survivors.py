# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing of a check, a health check or a reload command survives it, whatever it does to get away."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import cgroup2, root, tool
from support.place import PROGRAM, Place, eventually
from watcher.managers.cgroup import mount_point

pytestmark = [root, tool("mksquashfs"), tool("unshare")]

OPTIONS = ("--check", "--health-check", "--reload-command")
MOUNT = mount_point(Path("/proc/self/mountinfo").read_text())

# In a session of its own, in mount and PID namespaces of its own; without a parent; without anything that is open.
AWAY = """
stay='echo >>{here}; exec sleep 1000'
unshare --mount setsid sh -c "$stay" &
setsid -f sh -c "$stay"
unshare --pid --fork setsid sh -c "$stay" </dev/null >/dev/null 2>&1 &
(setsid sh -c "sh -c '$stay' & sh -c '$stay' & wait" &)
until [ $(wc -l <{here}) = 5 ]; do sleep 0.01; done
"""


def without_groups() -> list[str]:
    """A daemon for which there are control groups only to look at."""
    script = f'mount -o remount,bind,ro {MOUNT}; exec "$@"' if MOUNT else 'exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", *PROGRAM]


@pytest.fixture(params=[pytest.param("group", marks=cgroup2), "none"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        made.environment["MARK"] = str(tmp_path)
        # By env, so that it is really started: a fork has another environment in /proc, by which we look for it.
        made.start_daemon(("env", *PROGRAM) if request.param == "group" else without_groups())
        yield made
    assert_no_group_stays()


def groups() -> set[Path]:
    return set(Path(MOUNT).glob("confext-watcher-*")) if MOUNT else set()


def assert_no_group_stays() -> None:
    """Those of daemons of other tests, which run at the same time, go by themselves as well."""
    left = groups()
    eventually(lambda: not left & groups(), lambda: left)


def marked(place: Place) -> list[str]:
    """Processes of the service's, and of what was run for it."""
    mark = f"\0MARK={place.scratch}\0".encode()
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if mark in b"\0" + Path("/proc", name, "environ").read_bytes():
                found.append(name)
        except OSError:
            continue  # it has ended
    return found


def script(place: Place, text: str) -> str:
    path = place.scratch / "script"
    (place.scratch / "here").touch()
    path.write_text(text.format(here=place.scratch / "here"))
    return f"/bin/sh {path}"


@pytest.mark.parametrize("option", OPTIONS)
def test_what_gets_away_from_it_is_ended_with_it(place: Place, option: str) -> None:
    once = ("--set", "HealthStableSec=0")
    service = place.start("sleep", "1000", options=(option, script(place, AWAY), *once))
    place.image("1", "one")
    place.outcome("applied")
    assert len((place.scratch / "here").read_text().splitlines()) == 5
    assert place.daemon is not None
    assert set(marked(place)) == {str(service.pid), str(place.daemon.pid)}


def test_one_that_takes_too_long_is_ended_with_all_that_it_has_started(place: Place) -> None:
    slow = script(place, AWAY + "\nsleep 1000")
    service = place.start("sleep", "1000", options=("--check", slow, "--set", "CheckSec=1s"))
    place.image("1", "one")
    assert "took longer than 1 s" in place.outcome("refused")
    assert place.daemon is not None
    assert set(marked(place)) == {str(service.pid), str(place.daemon.pid)}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_daemon_that_is_killed_takes_it_along(place: Place, option: str) -> None:
    service = place.start("sleep", "1000", options=(option, script(place, AWAY + "\nsleep 1000")))
    place.image("1", "one")
    here = place.scratch / "here"
    eventually(lambda: len(here.read_text().splitlines()) == 5)
    place.stop_daemon(signal.SIGKILL)
    eventually(lambda: marked(place) == [str(service.pid)], lambda: marked(place))
    assert_no_group_stays()


@pytest.mark.parametrize("option", OPTIONS[1:])
def test_the_main_process_can_be_told_something(place: Place, option: str) -> None:
    program = ("sh", "-c", f"trap 'echo >{place.scratch}/told' HUP; while :; do sleep 0.01; done")
    place.start(*program, options=(option, "sh -c 'kill -HUP $MAINPID'"))
    place.image("1", "one")
    place.outcome("applied")
    eventually((place.scratch / "told").exists)


# Each process lives for as long as it takes to start the next.
CHAIN = """
import os, sys
number = 0
while os.fork() == 0 or os._exit(0):
    number += 1
    if number == 100:
        print(file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_never_the_same_process_for_long_is_ended_too(place: Place, option: str) -> None:
    chain = place.scratch / "chain"
    chain.write_text(CHAIN)
    command = f"setsid -f {sys.executable} -IS {chain} {{here}}\nuntil [ -s {{here}} ]; do :; done\n"
    service = place.start("sleep", "1000", options=(option, script(place, command)))
    place.image("1", "one")
    place.outcome("applied")
    assert place.daemon is not None
    for _ in range(3):
        assert set(marked(place)) == {str(service.pid), str(place.daemon.pid)}
