# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon costs while there is nothing to do for it, and how long it takes to start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from support import CHECKOUT

from . import floor
from .report import Figure, figure
from .rig import Daemon, Failed, Image, cpu, drop, memory, rig, service

SERVICES = 500
EVENTS = 10_000
IDLE = 20.0
"""Seconds over which wake-ups are counted."""
THREADS_END = 11.0
"""Seconds after which threads that did some work are gone (trio keeps them for ten)."""

# All that the daemon loads, and nothing done with it.
_INTERPRETER = "import watcher.daemon, watcher.cli, sys; print('ready', flush=True); sys.stdin.read()"


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
    return [figure(f"{EVENTS:,} events that concern nobody, processor time", "ms", *times)]


def run() -> list[Figure]:
    """Start with 500 services, memory and wake-ups when idle."""
    with rig() as place, contextlib.ExitStack() as stack:
        directory = place.directory("all")
        drop(Image(place.where, "squashfs").version(1), directory)
        for number in range(SERVICES):
            name = f"idle{number}.service"
            sleeper = service(name, place.runtime_directory, directory.parent, program=("sleep", "infinity"))
            stack.enter_context(sleeper)
        bare = _interpreter()
        with place.daemon() as daemon:
            cold = daemon.started
        with place.daemon() as daemon:
            warm = daemon.started
            wakeups, idle_cpu, used = _idle(daemon)
    return [
        figure(f"start with {SERVICES} services, each to be given its stack", "s", [cold]),
        figure(f"start with {SERVICES} services that have theirs", "s", [warm], [bare["seconds"]]),
        figure(
            f"memory with {SERVICES} services, resident (RSS)", "MiB", [used["Rss"]], [bare["Rss"]], "45 MiB"
        ),
        figure(
            f"memory with {SERVICES} services, its share (PSS)", "MiB", [used["Pss"]], [bare["Pss"]], "45 MiB"
        ),
        figure(f"wake-ups in {IDLE:.0f} s, {SERVICES} services", "", [wakeups], [0], "0"),
        figure(f"processor time in {IDLE:.0f} s, {SERVICES} services", "ms", [idle_cpu], [0], "0"),
    ]


def _idle(daemon: Daemon) -> tuple[int, float, dict[str, float]]:
    _wait_until_quiet(daemon)
    time.sleep(THREADS_END)
    before, used = daemon.switches(), daemon.cpu()
    time.sleep(IDLE)  # what is measured
    after = daemon.switches()
    wakeups = sum(count - before.get(thread, 0) for thread, count in after.items())
    return wakeups + len(before.keys() - after.keys()), daemon.cpu() - used, daemon.memory()


def _wait_until_quiet(daemon: Daemon) -> None:
    """Until it has done nothing for half a second."""
    deadline = time.monotonic() + 60
    used = -1.0
    while (now := daemon.cpu()) != used:
        if time.monotonic() > deadline:
            raise Failed("the daemon does not become idle")
        used = now
        time.sleep(0.5)


def _interpreter() -> dict[str, float]:
    """The floor: a Python with the same modules loaded."""
    start = time.monotonic()
    words = [sys.executable, "-c", _INTERPRETER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        found = {"seconds": time.monotonic() - start, **memory(process.pid)}
        process.stdin.close()
    return found
