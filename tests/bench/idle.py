# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon costs while there is nothing to do for it, and how long it takes to start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from support import CHECKOUT

from . import floor
from .report import Failed, figure
from .result import Figure
from .rig import Daemon, Image, Rig, cpu, drop, memory, rig, service, switches

SERVICES = 500
EVENTS = 10_000
IDLE = 20.0
"""Seconds over which wake-ups are counted."""
THREADS_END = 11.0
"""Seconds after which threads that did some work are gone (trio keeps them for ten)."""

# All that the daemon loads, and nothing done with it.
_INTERPRETER = "import watcher.daemon, watcher.cli.main, sys; print('ready', flush=True); sys.stdin.read()"


def run_events(count: int = 5) -> list[Figure]:
    """Events that concern nobody, in a directory that is watched: processor time for `EVENTS` of them."""
    times: tuple[list[float], list[float]] = ([], [])
    with rig() as place, contextlib.ExitStack() as stack:
        directory = place.directory("one")
        stack.enter_context(service("one.service", place.runtime_directory, directory.parent))
        daemon = stack.enter_context(place.daemon())
        reader = stack.enter_context(floor.reader(directory))
        for _ in range(count):
            before = daemon.cpu(), cpu(reader)
            for number in range(EVENTS // 2):
                path = directory / f".web_1.raw.{number:05}"
                os.mkdir(path)  # an event, and one more when it goes
                os.rmdir(path)
            _wait_until_quiet(daemon)
            times[0].append(daemon.cpu() - before[0])
            times[1].append(cpu(reader) - before[1])
    return [figure("events.cpu", f"{EVENTS:,} events that concern nobody, processor time", "ms", times)]


def run_start(count: int = 3) -> list[Figure]:
    """Start with 500 services; the floor: a Python that has loaded as much, and the bare calls for what is new.

    Beside the start with stacks: a Python that does what is needed for that, and loads no more.
    """
    cold: list[list[float]] = [[], []]
    warm: list[list[float]] = [[], [], []]
    used: list[list[float]] = [[], [], []]
    for _ in range(count):
        with rig() as place, _services(place), contextlib.ExitStack() as stack:
            make = ("sleep", "infinity")
            others = [
                stack.enter_context(service(f"bare{number}", None, place.where, program=make))
                for number in range(SERVICES)
            ]
            store = place.where / "bare-store"
            store.mkdir()
            image = place.directory("all") / "web_1.raw"
            bare = floor.give_all(image, store, "squashfs", [one.pid for one in others])
            for times, more in ((cold, bare), (warm, 0.0), (warm, 0.0)):
                with place.daemon() as daemon:
                    _wait_until_quiet(daemon)
                    needed = daemon.cpu()
                with _interpreter() as (pid, seconds):
                    needed_bare = cpu(pid)
                times[0].append(daemon.started)
                times[1].append(seconds + more)
                if times is warm:
                    with _least(place) as (pid, seconds):
                        used[2].append(cpu(pid))
                    times[2].append(seconds)
                    used[0].append(needed)
                    used[1].append(needed_bare)
    return [
        figure("start.cold", f"start with {SERVICES} services, each to be given its stack", "s", cold),
        figure("start.warm", f"start with {SERVICES} services that have theirs", "s", warm),
        figure("start.cpu", f"start with {SERVICES} services that have theirs, processor time", "ms", used),
    ]


def run() -> list[Figure]:
    """Memory and wake-ups with 500 services when nothing is to do, beside a Python that has loaded as much."""
    with rig() as place, _services(place), _interpreter() as (bare, _):
        with place.daemon():
            pass  # gives them their stacks
        with place.daemon() as daemon:
            _wait_until_quiet(daemon)
            time.sleep(THREADS_END)
            before = [switches(pid) for pid in (daemon.pid, bare)]
            time.sleep(IDLE)  # what is measured
            after = [switches(pid) for pid in (daemon.pid, bare)]
            used, floor_used = memory(daemon.pid), memory(bare)
    woken = [_between(*pair) for pair in zip(before, after, strict=True)]
    rss, wakeups = "memory, resident (RSS)", f"wake-ups in {IDLE:.0f} s"
    return [
        figure("idle.rss", f"{rss}, {SERVICES} services", "MiB", ([used], [floor_used]), "45 MiB"),
        figure("idle.wakeups", f"{wakeups}, {SERVICES} services", "", [[one] for one in woken], "0"),
    ]


@contextlib.contextmanager
def _services(place: Rig) -> Iterator[None]:
    """500 that sleep, on one image."""
    directory = place.directory("all")
    drop(Image(place.where, "squashfs").version(1), directory)
    with contextlib.ExitStack() as stack:
        for number in range(SERVICES):
            name = f"idle{number}.service"
            sleeper = service(name, place.runtime_directory, directory.parent, program=("sleep", "infinity"))
            stack.enter_context(sleeper)
        yield


def _between(before: dict[str, int], after: dict[str, int]) -> int:
    """How often threads were switched to, those that ended counted once."""
    woken = sum(count - before.get(thread, 0) for thread, count in after.items())
    return woken + len(before.keys() - after.keys())


def _wait_until_quiet(daemon: Daemon) -> None:
    """Until it has done nothing for half a second."""
    deadline = time.monotonic() + 60
    used = -1.0
    while (now := daemon.cpu()) != used:
        if time.monotonic() > deadline:
            raise Failed("the daemon does not become idle")
        used = now
        time.sleep(0.5)


def _interpreter() -> contextlib.AbstractContextManager[tuple[int, float]]:
    """The floor: a Python with the same modules loaded."""
    return _started("-c", _INTERPRETER)


def _least(place: Rig) -> contextlib.AbstractContextManager[tuple[int, float]]:
    """What Python needs for the start with stacks."""
    directories = (place.runtime_directory, place.state_directory, place.directory("all"))
    return _started("-m", "bench.needed_start", *map(str, directories))


@contextlib.contextmanager
def _started(*words: str) -> Iterator[tuple[int, float]]:
    """A Python that says when it is ready; its PID, and how long that took, seconds."""
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/tests"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise Failed("what is measured beside the daemon did not start")
        yield process.pid, time.monotonic() - start
        process.stdin.close()
