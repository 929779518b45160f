# SPDX-License-Identifier: LGPL-2.1-or-later
"""On real systemd 262: a drop by the watcher, beside the path unit with `systemctl reload` that people make by hand.

The path unit is given its best: no start limit, no trigger limit, a service that says itself when it has reloaded (no
process is forked for that), images that come by one rename, so that it is triggered once for each. Its services take
no part in the watcher (`Enabled=no`). Both are in one container and get the same images in turn. What is dropped and
what the watcher keeps is on a file system of its own (`filesystem.py`), not in the container's memory.

Where "floor" stands in the report, here it is the path unit.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beds.bed import Bed
from beds.host import UNITS, install
from support import needs

from . import filesystem
from .report import Failed, figure
from .result import Figure
from .rig import Image, stamp

OURS = "ours"
THEIRS = "theirs"
SERVICES = 50
WARM_UP = 3
SECONDS = 10.0
"""Later than this, a drop has not been delivered."""
PAUSE = 0.05
"""Seconds between two drops, in which either side tidies up."""

_TOLD = Path(__file__).with_name("told.py")
_STATE = "/var/lib/confext-watcher"
# How the service is told, by what its unit says of it; the last only the watcher can.
KINDS = {
    "notify": ("Type=notify-reload", "Type=notify-reload\n", ""),
    "kill": ("ExecReload=kill", "Type=notify\nExecReload=/bin/kill -HUP $MAINPID\n", ""),
    "signal": ("Reload=signal:SIGHUP", "Type=notify-reload\n", "Reload=signal:SIGHUP\n"),
}
# Systemd does the job in either case; the signal is ours alone.
_JOBS_AND_SIGNALS = ("notify", "signal")


@dataclass(frozen=True, slots=True)
class Told:
    """A reload handler that ran.

    Attributes:
        when: CLOCK_MONOTONIC, ns.
        seen: what was in /etc.
    """

    name: str
    when: int
    seen: str


class Place:
    """A container with the program, and services that tell."""

    def __init__(self, bed: Bed, device: str) -> None:
        self._bed = bed
        bed.run(["mount", "-t", "ext4", device, "/srv"])
        bed.run(["mkdir", "-p", "/srv/state", _STATE])
        bed.run(["mount", "--bind", "/srv/state", _STATE])
        install(bed)
        bed.path("/etc/confext-watcher").mkdir(exist_ok=True)
        bed.path("/etc/confext-watcher/watcher.conf").write_text("[Watcher]\nSettleSec=0\n")
        shutil.copyfile(_TOLD, bed.path("/srv/told.py"))
        bed.run(["mkdir", "/run/bench"])
        bed.run(["mkfifo", "/run/bench/told"])
        self._pipe = os.open(bed.path("/run/bench/told"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""
        self._came: list[Told] = []
        self._number = 0
        self.image = Image(bed.root.parent, "squashfs")
        bed.run(["systemctl", "start", "confext-watcher"])

    def close(self) -> None:
        os.close(self._pipe)

    def systemctl(self, *arguments: str) -> None:
        self._bed.run(["systemctl", *arguments])

    def exposure(self) -> float:
        """What `systemd-analyze security` says of the watcher, 0 to 10."""
        said = self._bed.run(["systemd-analyze", "security", "--no-pager", "confext-watcher.service"]).stdout
        return float(said.split("exposure level for confext-watcher.service: ")[1].split()[0])

    def services(self, kind: str, count: int) -> None:
        """Both sides' services of a kind, running on a first image; `count` of each."""
        _, how, ours = KINDS[kind]
        first = self._number
        for side in (OURS, THEIRS):
            self.drops(side).mkdir(exist_ok=True)
            self.drop(side, first)
            text = f"[Service]\n{how}NotifyAccess=main\nExecStart=/usr/bin/python3 -ISB /srv/told.py %p\n"
            text += f"ExtensionImages=/srv/{side}/web.raw.v\n[X-Confext]\n"
            text += ours if side == OURS else "Enabled=no\n"
            for number in range(count):
                self._bed.path(f"{UNITS}/{side}-{number}.service").write_text(text)
        self._path_unit()
        self.systemctl("daemon-reload")
        self.systemctl("restart", *(f"{side}-{number}" for side in (OURS, THEIRS) for number in range(count)))
        self.systemctl("start", f"{THEIRS}.path")

    def stop(self) -> None:
        self.told(1.0)  # what ends right after a reload is taken for its victim
        self.systemctl("stop", f"{THEIRS}.path", f"{THEIRS}.service", f"{OURS}-*", f"{THEIRS}-*")
        for unit in self._bed.path(UNITS).glob(f"{OURS}-*.service"):
            unit.unlink()
        for unit in self._bed.path(UNITS).glob(f"{THEIRS}*"):
            unit.unlink()
        self._came.clear()

    def numbers(self, count: int) -> range:
        """New versions: none is ever the one that is there already."""
        self._number += count
        return range(self._number - count + 1, self._number + 1)

    def _path_unit(self) -> None:
        limits = "[Unit]\nStartLimitIntervalSec=0\n"
        path = f"[Path]\nPathChanged=/srv/{THEIRS}/web.raw.v\nTriggerLimitIntervalSec=0\n"
        service = f"[Service]\nType=oneshot\nExecStart=/usr/bin/systemctl reload {THEIRS}-*.service\n"
        self._bed.path(f"{UNITS}/{THEIRS}.path").write_text(limits + path)
        self._bed.path(f"{UNITS}/{THEIRS}.service").write_text(limits + service)

    def drops(self, side: str) -> Path:
        directory = self._bed.path(f"/srv/{side}")
        directory.mkdir(exist_ok=True)
        return directory / "web.raw.v"

    def drop(self, side: str, number: int) -> int:
        """Put a version there by one rename. When (ns) that happened."""
        target = self.drops(side)
        new = target.with_name("web_1.raw.new")
        new.write_bytes(self.image.version(number))
        when = time.monotonic_ns()
        os.rename(new, target / "web_1.raw")
        return when

    def told(self, seconds: float) -> Told | None:
        """The next handler that runs within a time."""
        deadline = time.monotonic() + seconds
        while not self._came:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                return None
            *lines, self._rest = (self._rest + os.read(self._pipe, 65536)).split(b"\n")
            words = [line.decode().split() for line in lines]
            self._came += [Told(word[0], int(word[1]), word[2]) for word in words]
        return self._came.pop(0)

    def delivered(self, side: str, number: int, count: int = 1) -> int:
        """When (ns) the last of `count` services of a side was told of a version and saw it.

        Raises:
            Failed: that did not happen.
        """
        when: dict[str, int] = {}
        while len(when) < count:
            one = self.told(SECONDS)
            if one is None:
                raise Failed(f"{len(when)} of {count} services of {side} saw {stamp(number).decode()}")
            if one.name.startswith(f"{side}-") and one.seen == stamp(number).decode():
                when.setdefault(one.name, one.when)
        return max(when.values())


@contextlib.contextmanager
def place() -> Iterator[Place]:
    with filesystem.device() as device, Bed("262") as bed, contextlib.closing(Place(bed, device)) as made:
        yield made


def _left_out() -> bool:
    """No container can be had; said."""
    lack = needs.lacking(needs.bed.mark)
    if lack:
        print(f"bench: systemd is left out: {lack}", file=sys.stderr)
    return bool(lack)


def run(count: int = 50, many: int = 10) -> list[Figure]:
    """Times; nothing where no container can be had.

    Args:
        count: drops by which the time of one is measured.
        many: drops for 50 services.
    """
    if _left_out():
        return []
    with place() as made:
        figures = [_one(made, kind, count) for kind in KINDS]
        figures += [_many(made, kind, many) for kind in _JOBS_AND_SIGNALS]
        what = "systemd-analyze security, exposure"
        figures.append(figure("systemd.exposure", what, "", ([made.exposure()],), "below 3.5"))
    return figures


def run_rate(runs: int = 3, drops: int = 1000) -> list[Figure]:
    """Of so many drops, each 60 ms after the one before, how many the service was not told of; some runs in a row.

    A reload is a job of systemd's here. The path unit has one run: it loses many, one more or less says nothing.
    Nothing where no container can be had.
    """
    if _left_out():
        return []
    with place() as made:
        made.services("notify", 1)
        theirs = _count(made, THEIRS, drops)
        print(f"bench: path unit: of {drops} delivered {theirs}", file=sys.stderr)
        figures = []
        for run in range(1, runs + 1):
            ours = _count(made, OURS, drops)
            print(f"bench: run {run}: of {drops} delivered {ours}", file=sys.stderr)
            what = f"systemd 262, {drops:,} drops, 1,000 in a minute, run {run} of {runs}: not delivered"
            figures.append(
                figure(f"systemd.rate.{run}.lost", what, "", ([drops - ours], [drops - theirs]), "0")
            )
        made.stop()
    return figures


def _one(made: Place, kind: str, count: int) -> Figure:
    """One service: rename to its handler."""
    made.services(kind, 1)
    times = _in_turn(made, count, 1)
    made.stop()
    what = f"systemd 262, rename to handler, {KINDS[kind][0]}"
    return figure(f"systemd.one.{kind}", what, "ms", times, "10x faster than a path unit")


def _many(made: Place, kind: str, count: int) -> Figure:
    made.services(kind, SERVICES)
    times = _in_turn(made, count, SERVICES)
    made.stop()
    what = f"systemd 262, one image for {SERVICES} services: rename to the last handler, {KINDS[kind][0]}"
    return figure(f"systemd.many.{kind}", what, "ms", times, f"10x faster than {SERVICES} reloads")


def _in_turn(made: Place, count: int, services: int) -> tuple[list[float], list[float]]:
    """Milliseconds of both sides."""
    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for turn, number in enumerate(made.numbers(WARM_UP + count)):
        for side, measured in times.items():
            start = made.drop(side, number)
            end = made.delivered(side, number, services)
            if turn >= WARM_UP:
                measured.append((end - start) / 1e6)
            time.sleep(PAUSE * (1 if services == 1 else 10))
    return times[OURS], times[THEIRS]


def _count(made: Place, side: str, drops: int) -> int:
    """How many the service was told of and saw."""
    seen = set()
    numbers = made.numbers(drops)
    start = time.monotonic()
    for turn, number in enumerate(numbers, 1):
        made.drop(side, number)
        while (left := start + turn * 0.06 - time.monotonic()) > 0:
            one = made.told(left)
            if one is not None and one.name.startswith(f"{side}-"):
                seen.add(one.seen)
    while (one := made.told(2)) is not None:
        seen.add(one.seen)
    return len(seen & {stamp(number).decode() for number in numbers})
