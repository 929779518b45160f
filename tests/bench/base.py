# SPDX-License-Identifier: LGPL-2.1-or-later
"""What it costs to keep services on stacks up to date with the host's own `/etc`, and how soon they see a change."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from watcher.mounts import syscalls

from .report import Failed, figure
from .result import Figure
from .rig import SECONDS, Daemon, Image, Service, drop, rig, service

SERVICES = 10
FILES = 500
_IN_ONE_DIRECTORY = 10
_READ = 50
_MS_BIND = 0x1000
_FOLLOWED = 0.5
"""Seconds after which the stacks that services have got are followed, and all is quiet."""


def run(upgrades: int = 5, changes: int = 40) -> list[Figure]:
    """A package upgrade that touches 500 files, and single files that are replaced; 10 services."""
    with rig() as place, _etc(place.where), contextlib.ExitStack() as stack:
        directory = place.directory("one")
        drop(Image(place.where, "squashfs").version(1), directory)
        daemon = stack.enter_context(place.daemon())
        services = [
            stack.enter_context(service(f"{number}.service", place.runtime_directory, directory.parent))
            for number in range(SERVICES)
        ]
        for one in services:
            one.handled()
        time.sleep(_FOLLOWED)
        used = [_upgrade(daemon, services, number) for number in range(upgrades)]
        seen = [_replace(services[0], number) for number in range(changes)]
    what = f"an upgrade of {FILES} files in /etc, processor time for {SERVICES} services"
    return [
        figure("base.cpu", what, "ms", [used], "50 ms"),
        figure("base.seen", "a file is replaced in /etc -> seen in a service", "ms", [seen], "100 ms"),
    ]


@contextlib.contextmanager
def _etc(where: Path) -> Iterator[None]:
    """A copy of /etc in place of it, for us and the services."""
    copy = where / "etc"
    shutil.copytree("/etc", copy, symlinks=True, ignore_dangling_symlinks=True)
    for number in range(FILES):
        path = copy / _name(number)
        path.parent.mkdir(exist_ok=True)
        path.write_text("before")
    (copy / "hot").write_text("before")
    syscalls.mount(str(copy), "/etc", None, _MS_BIND)
    try:
        yield
    finally:
        syscalls.umount2("/etc", syscalls.MNT_DETACH)


def _name(number: int) -> str:
    return f"bench-{number // _IN_ONE_DIRECTORY}/{number}.conf"


def _upgrade(daemon: Daemon, services: list[Service], turn: int) -> float:
    """As dpkg does it, one directory after the other. Each service has read some of the files, and what lies beside
    them. Processor time, milliseconds."""
    before = daemon.cpu()
    for number in range(FILES):
        path = f"/etc/{_name(number)}"
        with open(f"{path}.dpkg-new", "w") as file:
            file.write(f"upgrade {turn}")
            os.fchmod(file.fileno(), 0o644)
            os.fchown(file.fileno(), 0, 0)
            file.flush()
            os.fsync(file.fileno())
        os.link(path, f"{path}.dpkg-tmp")
        os.rename(f"{path}.dpkg-new", path)
        os.unlink(f"{path}.dpkg-tmp")
    time.sleep(_FOLLOWED)
    used = daemon.cpu() - before
    for one in services:
        for number in range(0, FILES, FILES // _READ):
            if Path(f"/proc/{one.pid}/root/etc/{_name(number)}").read_text() != f"upgrade {turn}":
                raise Failed(f"{one.name} sees an old file after an upgrade")
    return used


def _replace(one: Service, number: int) -> float:
    """Milliseconds until a service sees it."""
    path = f"/proc/{one.pid}/root/etc/hot"
    Path(path).read_text()
    Path("/etc/hot.new").write_text(str(number))
    os.rename("/etc/hot.new", "/etc/hot")
    begun = time.monotonic()
    while Path(path).read_text() != str(number):
        if time.monotonic() - begun > SECONDS:
            raise Failed(f"{one.name} does not see a file that was replaced")
        time.sleep(0.0002)  # a reader that never lets go would be measured, too
    took = (time.monotonic() - begun) * 1000
    time.sleep(_FOLLOWED)
    return took
