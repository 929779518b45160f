# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a rename in a directory to the new `/etc`, and to the service's reload handler.

Drops go to the directories of the daemon, of the bare loop and of the least Python in turn, so that all have the same
machine, however busy it is. Between two drops there is a pause, in which each of them tidies up: nobody drops a
thousand images a second. Only `run_rate()` drops a thousand in a minute.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import floor, needed
from .report import Failed, figure
from .result import Figure
from .rig import Eye, Image, Rig, Service, cpu, drop, rig, service, stamp

FSTYPES = ("squashfs", "erofs")
WARM_UP = 20
WARM_UP_MANY = 2
PAUSE = 0.03
"""Seconds."""
PAUSE_MANY = 0.15
SMALL = 128 << 10
"""Bytes of an image where there are very many."""
SIDES = ("daemon", "bare", "python")
VERSIONS = 1000
SHARING = 30
"""Services."""

Side = tuple[Path, list[Service]]
"""Where to drop, and who is then told."""


def run(count: int = 500) -> list[Figure]:
    """Rename to new `/etc` visible, and to handler running; `count` drops of 1 MiB for each kind of image."""
    figures = []
    for fstype in FSTYPES:
        with rig() as place:
            figures += _one_service(place, fstype, count)
    return figures


def run_many(numbers: Sequence[int] = (1, 10, 100), count: int = 20) -> list[Figure]:
    """One image for several services: rename to the first handler running and to the last."""
    figures = []
    for number in numbers:
        with rig() as place, contextlib.ExitStack() as stack:
            image = Image(place.where, "squashfs")
            found = _several(image, *_sides(stack, place, "squashfs", number), count)
        key, what = f"many.{number}", f"one image for {number}"
        each, used = (
            [[time / number for time in side] for side in sides] for sides in (found.last, found.cpu)
        )
        figures.append(figure(f"{key}.each", f"{what}: rename to the last handler, for each", "ms", each))
        if number > 1:
            figures.append(figure(f"{key}.first", f"{what}: rename to the first handler", "ms", found.first))
            figures.append(figure(f"{key}.cpu", f"{what}: processor time for each", "ms", used))
    return figures


def run_versions(count: int = 20) -> list[Figure]:
    """A new version where there are a thousand, for services that share the directory."""
    with rig() as place, contextlib.ExitStack() as stack:
        image = Image(place.where, "squashfs", SMALL)
        for side in SIDES:
            directory = place.directory(side)
            for number in range(1, VERSIONS + 1):
                (directory / f"web_{number}.raw").write_bytes(image.version(number))
        found = _several(image, *_sides(stack, place, "squashfs", SHARING), count, VERSIONS)
    what = f"a new version beside {VERSIONS:,}, {SHARING} services"
    return [
        figure("versions.last", f"{what}: rename to the last handler", "ms", found.last),
        figure("versions.cpu", f"{what}: processor time", "ms", found.cpu),
    ]


def run_rate(runs: int = 3, count: int = 1000) -> list[Figure]:
    """A thousand drops in a minute, several minutes one after the other: how many had no reload of their own."""
    figures = []
    with rig() as place, contextlib.ExitStack() as stack:
        image = Image(place.where, "squashfs", SMALL)
        sides, _ = _sides(stack, place, "squashfs", 1)
        for run in range(1, runs + 1):
            numbers = range((run - 1) * count + 1, run * count + 1)
            delivered = _minute(image, sides, numbers)
            print(f"bench: run {run}: of {count} delivered {', '.join(map(str, delivered))}", file=sys.stderr)
            what = f"{count:,} drops, 1,000 in a minute, run {run} of {runs}: not delivered"
            lost = [[count - one] for one in delivered]
            figures.append(figure(f"rate.{run}.lost", what, "", lost, "0"))
    return figures


def _one_service(place: Rig, fstype: str, count: int) -> list[Figure]:
    image = Image(place.where, fstype)
    times: list[list[tuple[float, float]]] = [[], [], []]
    before: list[float] = []
    with contextlib.ExitStack() as stack:
        sides, pids = _sides(stack, place, fstype, 1)
        eyes = [stack.enter_context(contextlib.closing(Eye(side[1][0].pid))) for side in sides]
        for number in range(1, WARM_UP + count + 1):
            for (directory, services), eye, pairs in zip(sides, eyes, times, strict=True):
                pair = _drop_one(image, number, directory, services[0], eye)
                if number > WARM_UP:
                    pairs.append(pair)
            if number == WARM_UP:
                before = [cpu(pid) for pid in pids]
        used = [(cpu(pid) - begin) / count for pid, begin in zip(pids, before, strict=True)]
    visible, handler = ([[pair[which] for pair in pairs] for pairs in times] for which in (0, 1))
    key, what = f"drop.{fstype}", f"{fstype} 1 MiB"
    return [
        figure(f"{key}.visible", f"rename to new /etc visible, {what}", "ms", visible),
        figure(f"{key}.handler", f"rename to reload handler, {what}", "ms", handler, "3 ms median"),
        figure(f"{key}.cpu", f"processor time for such a drop, {what}", "ms", [[one] for one in used]),
    ]


def _drop_one(image: Image, number: int, directory: Path, target: Service, eye: Eye) -> tuple[float, float]:
    """Milliseconds until it is visible, and until the handler runs."""
    start = drop(image.version(number), directory)
    visible = eye.sees(stamp(number))
    handled = _handled(target, number)
    time.sleep(PAUSE)
    return (visible - start) / 1e6, (handled - start) / 1e6


def _handled(target: Service, number: int, *, older: bool = False) -> int:
    """When (ns) it was told of a version; `older`: after some that were there before it."""
    while True:
        when, seen = target.handled()
        if seen == stamp(number):
            return when
        if not older:
            raise Failed(f"told to reload, {target.name} saw {seen!r} in /etc, not {stamp(number)!r}")


def _sides(
    stack: contextlib.ExitStack, place: Rig, fstype: str, number: int
) -> tuple[list[Side], tuple[int, int, int]]:
    """The daemon's side, the bare loop's and the least Python's, and the PIDs of these."""
    sides = []
    for side in SIDES:
        directory = place.directory(side)
        runtime_directory = place.runtime_directory if side == SIDES[0] else None
        make = functools.partial(service, runtime_directory=runtime_directory, confext_dir=directory.parent)
        services = [stack.enter_context(make(f"{side}{one}.service")) for one in range(number)]
        sides.append((directory, services))
    pids = []
    for loop, (directory, services) in zip((floor.loop, needed.loop), sides[1:], strict=True):
        store = place.where / f"{directory.parent.name}-store"
        store.mkdir()
        pids.append(stack.enter_context(loop(directory, store, fstype, [one.pid for one in services])))
    daemon = stack.enter_context(place.daemon())
    return sides, (daemon.pid, pids[0], pids[1])


@dataclass(frozen=True, slots=True)
class Several:
    """Drops for several services, milliseconds, of the sides in their order.

    Attributes:
        first, last: until the first handler ran, and the last.
        cpu: processor time of a drop and of the pause after it. A busy machine changes it least.
    """

    first: list[list[float]] = field(default_factory=lambda: [[] for _ in SIDES])
    last: list[list[float]] = field(default_factory=lambda: [[] for _ in SIDES])
    cpu: list[list[float]] = field(default_factory=lambda: [[] for _ in SIDES])


def _several(
    image: Image, sides: Sequence[Side], pids: Sequence[int], count: int, versions: int = 0
) -> Several:
    """Drop to all services of each side in turn; beside so many older versions."""
    found = Several()
    for turn in range(1, WARM_UP_MANY + count + 1):
        number = versions + turn
        name = f"web_{number}.raw" if versions else "web_1.raw"
        for side, (directory, services) in enumerate(sides):
            used = cpu(pids[side])
            start = drop(image.version(number), directory, name)
            handled = [_handled(one, number, older=turn == 1) for one in services]
            time.sleep(PAUSE_MANY)
            if turn > WARM_UP_MANY:
                found.first[side].append((min(handled) - start) / 1e6)
                found.last[side].append((max(handled) - start) / 1e6)
                found.cpu[side].append(cpu(pids[side]) - used)
    return found


def _minute(image: Image, sides: Sequence[Side], numbers: Sequence[int]) -> list[int]:
    """Drop these versions to each side, evenly one after the other; how many each was told of."""
    start = time.monotonic()
    turns = ((number, directory) for number in numbers for directory, _ in sides)
    for turn, (number, directory) in enumerate(turns):
        time.sleep(max(0.0, start + turn * 60 / 1000 / len(sides) - time.monotonic()))
        drop(image.version(number), directory)
    wanted = {stamp(number) for number in numbers}
    return [len(wanted & _told(one)) for _, (one,) in sides]


def _told(target: Service) -> set[bytes]:
    """All that it has seen since somebody asked last, and sees until it is quiet."""
    seen = set()
    while target.hears(2.0):
        seen.add(target.handled()[1])
    return seen
