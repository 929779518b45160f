# SPDX-License-Identifier: LGPL-2.1-or-later
"""`origin` and `diff` of a service whose stack has 5,000 files, without a daemon.

Two images: the lower one has all the files, the upper one a tenth of them again, and some on files of the host's. The
floor of `origin` is find(1), which looks at the files of one layer, and that of `diff` is diff(1) on two trees.

Processor time, of what is started as well, so that it can be told on a busy machine too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support import CHECKOUT
from support.images import confext, image
from watcher.cli import show, show_diff, show_origin
from watcher.control import diff, origin
from watcher.settings.config import Settings

from .report import Failed, figure
from .result import Figure
from .rig import Rig, Service, drop, rig, service

FILES = 5000
_IN_ONE_DIRECTORY = 50
_AGAIN = 10
_CHANGED = 100


def run(count: int = 20) -> list[Figure]:
    """Each of them in this process, from the question to the text; and `origin` as a command."""
    with rig() as place, _traced(place) as one:
        settings = Settings(
            state_directory=str(place.state_directory), runtime_directory=str(place.runtime_directory)
        )
        tree = place.where / "tree-app/etc"

        def traced() -> None:
            found = origin.origin(settings, one.name)
            if len(found.files or ()) < FILES or not list(show_origin.origin(found)):
                raise Failed(f"origin has found {len(found.files or ())} files")
            show.as_json(found, compact=True)

        def compared() -> None:
            found = diff.diff(settings, one.name, "1", ["0"])
            if len(found.files) != _CHANGED or not list(show_diff.diff(found, stat=False, colour=False)):
                raise Failed(f"diff has found {len(found.files)} differences")

        def by_find() -> None:
            words = ["find", str(tree), "-printf", "%p %y %m %U %G %s %T@\n"]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

        def by_diff() -> None:
            words = ["diff", "-ruN", str(tree), str(place.where / "tree-app-2/etc")]
            subprocess.run(words, check=False, stdout=subprocess.DEVNULL)

        def command() -> None:
            words = [sys.executable, "-m", "watcher", "origin", one.name]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT, env=place.environment)

        what = f"of {FILES:,} files, processor time"
        return [
            figure("trace.origin", f"origin {what}", "ms", _times(count, traced, by_find), "100 ms"),
            figure("trace.diff", f"diff {what}, {_CHANGED} differ", "ms", _times(count, compared, by_diff)),
            figure("trace.command", f"origin {what}, the command", "ms", _times(count, command, by_find)),
        ]


def _times(
    count: int, ours: Callable[[], None], floor: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Milliseconds of each, by turns; the first ones fill the kernel's caches."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(count + 1):
        for side, work in zip(times, (ours, floor), strict=True):
            begun = _cpu()
            work()
            if number:
                side.append((_cpu() - begun) * 1000)
    return times


def _cpu() -> float:
    """Processor time of this process and of its children that have ended, seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextlib.contextmanager
def _traced(place: Rig) -> Iterator[Service]:
    """A service that runs on the two images; the daemon has gone."""
    files = {
        f"etc/app/{number // _IN_ONE_DIRECTORY}/{number}.conf": b"%d\n" % number * 20
        for number in range(FILES)
    }
    again = dict.fromkeys(list(files)[::_AGAIN], b"again\n")
    hosts = [name for name in sorted(os.listdir("/etc")) if Path("/etc", name).is_file()][
        : FILES // _AGAIN // 50
    ]
    _image(place.where, "app", "1", files)
    _image(place.where, "over", "1", again | {f"etc/{name}": b"ours\n" for name in hosts})
    changed = {path: b"new\n" + files[path] for path in list(files)[1 :: FILES // _CHANGED]}
    _image(place.where, "app", "2", files | changed, "tree-app-2")
    drops = place.where / "one"
    drops.mkdir()
    with service("one.service", place.runtime_directory, drops) as one:
        with place.daemon():
            for name, version in (("app", 1), ("over", 1), ("app", 2)):
                drop((place.where / f"{name}_{version}.raw").read_bytes(), drops, f"{name}.raw")
                one.handled()
                time.sleep(1.5)  # until a stack that was taken well is not on trial any more
        yield one


def _image(where: Path, name: str, version: str, files: dict[str, bytes], tree: str = "") -> Path:
    made = confext(where / (tree or f"tree-{name}"), name, files)
    return image(made, where / f"{name}_{version}.raw")
