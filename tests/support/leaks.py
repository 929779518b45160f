# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test may leave behind on the machine: mounts, loop devices, processes, namespaces and descriptors.

`Snapshot.take()` before and after; `Snapshot.since()` names what is new. What the kernel takes apart in its own time
(a loop device after its last unmount, a namespace after its last process) gets a moment: `settled()` waits for it.
"""

from __future__ import annotations

import gc
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from beds.roots import cache_directory
from support import fork_server

RUN = "CONFEXT_WATCHER_TEST_RUN"
"""Environment variable by which this run's processes are known, wherever they were reparented to."""

_HELD = re.compile(r"anon_inode:|^/memfd:|^mnt:\[|^net:\[|^/dev/loop")
_GRACE = 5.0


@dataclass(frozen=True)
class Snapshot:
    """Each leakable thing as a sentence a person can act on."""

    things: frozenset[str]

    @classmethod
    def take(cls, scratch: Path) -> Snapshot:
        """What is there now.

        Args:
            scratch: this run's temporary directory. What others mount below /tmp or /var/tmp, and their loop devices,
                are none of ours: a desktop with snaps, a second checkout whose tests run at the same time. Nor are
                beds: each looks itself at what it leaves (`Bed.stop`), and one that is not stopped has processes.
        """
        return cls(
            frozenset((*_mounts(scratch), *_loops(scratch), *_processes(), *_namespaces(), *_descriptors()))
        )

    def since(self, before: Snapshot) -> list[str]:
        """What is here and was not before."""
        return sorted(self.things - before.things)


def settled(before: Snapshot, scratch: Path) -> list[str]:
    """What has been left behind since `before` and does not go away within a few seconds."""
    deadline = time.monotonic() + _GRACE
    gc.collect()
    while (left := Snapshot.take(scratch).since(before)) and time.monotonic() < deadline:
        time.sleep(0.02)  # nothing announces the end of a loop device or of another's process
    return left


def _mounts(scratch: Path) -> list[str]:
    others = "/tmp/", "/var/tmp/", f"{cache_directory()}/"
    rows = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [
        f"mount on {row[4]} ({row[row.index('-') + 1]}, id {row[0]})"
        for row in rows
        if Path(row[4]).is_relative_to(scratch) or not row[4].startswith(others)
    ]


def _loops(scratch: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            path = backing.read_text().strip()
        except OSError:  # gone while we looked
            continue
        if Path(path).is_relative_to(scratch):
            found.append(f"loop device {backing.parts[3]} on {path}")
    return found


def _processes() -> list[str]:
    mark = f"{RUN}={os.environ[RUN]}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) in (os.getpid(), fork_server.pid()):
            continue
        try:
            ours = mark in (process / "environ").read_bytes().split(b"\0")
            if ours or f"PPid:\t{os.getpid()}\n" in (process / "status").read_text():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {process.name}: {command or (process / 'comm').read_text()}")
        except OSError:  # ended while we looked, or somebody else's
            continue
    return found


def _namespaces() -> list[str]:
    own = os.stat("/proc/self/ns/mnt").st_ino
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            inode = (task / "ns/mnt").stat().st_ino
        except OSError:
            continue
        if inode != own:
            found.append(f"thread {task.name} in mount namespace {inode}")
    return found


def _descriptors() -> list[str]:
    counts: dict[str, int] = {}
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if _HELD.search(target) and "eventpoll" not in target and "eventfd" not in target:
            counts[target] = counts.get(target, 0) + 1
    return [f"{count} open descriptor(s) of {target}" for target, count in counts.items()]
