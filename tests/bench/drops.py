# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a rename in a directory to the new `/etc`, and to the service's reload handler.

Drops go to the daemon's directory and to that of the bare loop in turn, so that both have the same machine, however
busy it is. Between two drops there is a pause, in which either of them tidies up: nobody drops a thousand images a
second.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from pathlib import Path

from . import floor
from .report import Figure, figure
from .rig import Eye, Failed, Image, Rig, Service, cpu, drop, rig, service, stamp

FSTYPES = ("squashfs", "erofs")
WARM_UP = 20
PAUSE = 0.03
"""Seconds."""


def run(count: int = 1000) -> list[Figure]:
    """Rename to new `/etc` visible, and to handler running; `count` drops of 1 MiB for each kind of image."""
    figures = []
    for fstype in FSTYPES:
        with rig() as place:
            figures += _one_service(place, fstype, count)
    return figures


def run_many(numbers: Sequence[int] = (1, 10, 100), count: int = 20) -> list[Figure]:
    """One image for several services: rename to the last handler running."""
    figures = []
    for number in numbers:
        with rig() as place:
            figures.append(_many_services(place, number, count))
    return figures


def _one_service(place: Rig, fstype: str, count: int) -> list[Figure]:
    image = Image(place.where, fstype)
    ours: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    before: list[float] = []
    with contextlib.ExitStack() as stack:
        sides, pids = _sides(stack, place, fstype, 1)
        eyes = [stack.enter_context(contextlib.closing(Eye(side[1][0].pid))) for side in sides]
        for number in range(1, WARM_UP + count + 1):
            for (directory, services), eye, times in zip(sides, eyes, (ours, bare), strict=True):
                pair = _drop_one(image, number, directory, services[0], eye)
                if number > WARM_UP:
                    times.append(pair)
            if number == WARM_UP:
                before = [cpu(pid) for pid in pids]
        used = [(cpu(pid) - begin) / count for pid, begin in zip(pids, before, strict=True)]
    visible = figure(
        f"rename to new /etc visible, {fstype} 1 MiB",
        "ms",
        [pair[0] for pair in ours],
        [pair[0] for pair in bare],
    )
    handler = figure(
        f"rename to reload handler, {fstype} 1 MiB",
        "ms",
        [pair[1] for pair in ours],
        [pair[1] for pair in bare],
        "3 ms median",
    )
    processor = figure(f"processor time for such a drop, {fstype} 1 MiB", "ms", used[:1], used[1:])
    return [visible, handler, processor]


def _drop_one(image: Image, number: int, directory: Path, target: Service, eye: Eye) -> tuple[float, float]:
    """Milliseconds until it is visible, and until the handler runs."""
    start = drop(image.version(number), directory)
    visible = eye.sees(stamp(number))
    handled = _handled(target, number)
    time.sleep(PAUSE)
    return (visible - start) / 1e6, (handled - start) / 1e6


def _handled(target: Service, number: int) -> int:
    when, seen = target.handled()
    if seen != stamp(number):
        raise Failed(f"told to reload, {target.name} saw {seen!r} in /etc, not {stamp(number)!r}")
    return when


def _sides(
    stack: contextlib.ExitStack, place: Rig, fstype: str, number: int
) -> tuple[list[tuple[Path, list[Service]]], tuple[int, int]]:
    """The daemon's side and the bare loop's: where to drop, and its services. And the PIDs of these two."""
    sides = []
    for side in ("daemon", "bare"):
        directory = place.directory(side)
        runtime_directory = place.runtime_directory if side == "daemon" else None
        make = functools.partial(service, runtime_directory=runtime_directory, confext_dir=directory.parent)
        services = [stack.enter_context(make(f"{side}{one}.service")) for one in range(number)]
        sides.append((directory, services))
    store = place.where / "bare-store"
    store.mkdir()
    (_, _), (bare_directory, bare_services) = sides
    bare = stack.enter_context(floor.loop(bare_directory, store, fstype, [one.pid for one in bare_services]))
    daemon = stack.enter_context(place.daemon())
    return sides, (daemon.pid, bare)


def _many_services(place: Rig, number: int, count: int) -> Figure:
    image = Image(place.where, "squashfs")
    times: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        sides, _ = _sides(stack, place, "squashfs", number)
        for drops in range(1, count + 3):
            for (directory, services), measured in zip(sides, times, strict=True):
                start = drop(image.version(drops), directory)
                last = max(_handled(one, drops) for one in services)
                if drops > 2:
                    measured.append((last - start) / 1e6)
                time.sleep(PAUSE * 5)
    return figure(f"one image for {number}: rename to the last reload handler", "ms", *times)
