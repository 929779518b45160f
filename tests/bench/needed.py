# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least that Python with trio needs for the same promises: between the floor and what we need.

It makes the calls that a drop cannot do without, and decides nothing. One event loop waits, one thread works. What we
promise to have on the disk, it has on the disk: copies and their names before a stack is accepted, a stack before it is
mounted, an outcome in the history. What is done for many services is brought to the disk at once, but for the first of
them, who does not wait for the others.

What is between the floor and this is the price of Python, trio and of not losing anything. What is between this and us
is our own code, which may be made faster.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import queue
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio
from inotify_simple import INotify, flags

from watcher.mounts import syscalls

from . import floor

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Worker:
    """The one thread that works. Its working directory is its own, so that it may enter a service's namespace."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        syscalls.unshare(syscalls.CLONE_FS)
        while True:
            self._orders.get()()

    async def run(self, function: Callable[[], None]) -> None:
        token, done = trio.lowlevel.current_trio_token(), trio.Event()

        def order() -> None:
            function()
            token.run_sync_soon(done.set)

        self._orders.put(order)
        await done.wait()


class Records:
    """Stacks, slots and history, as far as they have to be on the disk."""

    def __init__(self, state: Path) -> None:
        self._state = state
        for name in ("stacks", "units"):
            (state / name).mkdir(parents=True)
        self._units = os.open(state / "units", _DIRECTORY)
        self._journal = os.open(
            state / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._history = sqlite3.connect(state / "history.sqlite", check_same_thread=False)
        self._history.execute("PRAGMA journal_mode=WAL")
        self._history.execute("PRAGMA synchronous=FULL")
        self._history.execute("CREATE TABLE history (moment INTEGER, unit TEXT, outcome TEXT)")

    def accept(self, units: Sequence[str], number: int, digest: str) -> None:
        """A new stack with its record for each; then the links that lead to them. On the disk at the end."""
        paths = []
        for unit in units:
            above = f"{self._state}/stacks/{unit}"
            if number == 1:
                os.mkdir(above)
            path = f"{above}/{number:08}"
            os.mkdir(path)
            os.symlink(f"../../../store/{digest}", f"{path}/web.raw")
            _write(f"{path}/.state.json", digest)
            paths += [f"{path}/.state.json", path, above]
        self._sync(paths)
        for unit in units:
            os.symlink(f"../stacks/{unit}/{number:08}", f"{self._state}/stacks/{unit}/.new")
            os.rename(f"{self._state}/stacks/{unit}/.new", f"{self._state}/units/{unit}")
        os.fsync(self._units)

    def conclude(self, units: Sequence[str], number: int, digest: str) -> None:
        """The outcome for each: in the record, in the history, in the journal. And away with a stack that is old."""
        paths = []
        for unit in units:
            path = f"{self._state}/stacks/{unit}/{number:08}"
            _write(f"{path}/.new", digest)
            paths.append(f"{path}/.new")
        self._sync(paths)
        for unit in units:
            path = f"{self._state}/stacks/{unit}/{number:08}"
            os.rename(f"{path}/.new", f"{path}/.state.json")
        self._sync([f"{self._state}/stacks/{unit}/{number:08}" for unit in units])
        rows = [(number, unit, digest) for unit in units]
        with self._history:
            self._history.executemany("INSERT INTO history VALUES (?, ?, ?)", rows)
        for unit in units:
            os.write(self._journal, json.dumps({"unit": unit, "stack": digest}).encode() + b"\n")
            old = f"{self._state}/stacks/{unit}/{number - 3:08}"
            if number > 3:
                os.unlink(f"{old}/web.raw")
                os.unlink(f"{old}/.state.json")
                os.rmdir(old)

    def _sync(self, paths: Sequence[str]) -> None:
        if len(paths) > 16:  # one commit for all
            _libc.syncfs(self._units)
            return
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(fd)
            os.close(fd)


def _write(path: str, digest: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        json.dump({"version": 1, "stack": [{"name": "web", "digest": digest}], "on trial": True}, file)


async def follow(directory: Path, store: Path, fstype: str, pids: Sequence[int], ready: int) -> None:
    """As `floor.follow()`, durable, and with an event loop."""
    inotify = INotify(nonblocking=True)
    inotify.add_watch(directory, flags.MOVED_TO)
    worker, records = Worker(), Records(store.parent / f"{store.name}-state")
    gift: list[_Gift] = []
    await worker.run(lambda: gift.append(_Gift(store, fstype, pids, records)))
    os.write(ready, b"r")
    while True:
        await trio.lowlevel.wait_readable(inotify.fileno())
        for name in {event.name for event in inotify.read(0) if not event.name.startswith(".")}:
            path = os.path.join(directory, name)
            await worker.run(functools.partial(gift[0].give, path))
            await worker.run(gift[0].tidy)


class _Gift:
    """What the thread does."""

    def __init__(self, store: Path, fstype: str, pids: Sequence[int], records: Records) -> None:
        self._bare, self._fstype, self._records = floor.Bare(store), fstype, records
        self._store = os.open(store, _DIRECTORY)
        self._targets = {f"needed{pid}": floor.Target.of(pid) for pid in pids}
        self._benches: list[str] = []
        self._number = 0
        self._before: Path | None = None
        self._now: Path | None = None

    def give(self, path: str) -> None:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(source, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # nobody is writing to it
        copy = self._bare.copy(path)
        fcntl.fcntl(source, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(source)
        if copy == self._now:
            return  # it was late
        os.fsync(self._store)
        self._number += 1
        root = self._bare.attach(copy, self._fstype)
        self._bare.read(root)
        units = list(self._targets)
        for some in (units[:1], units[1:]):
            self._records.accept(some, self._number, copy.name)
            for unit in some:
                self._benches.append(self._bare.swap(self._targets[unit], [root]))
                os.kill(self._targets[unit].pid, signal.SIGHUP)
        self._before, self._now = self._now, copy

    def tidy(self) -> None:
        """When all were told."""
        assert self._now is not None
        self._records.conclude(list(self._targets), self._number, self._now.name)
        for bench in self._benches:
            self._bare.clear(bench)
        self._benches.clear()
        if self._before is not None:
            self._bare.detach(self._before)
            self._before = None


@contextmanager
def loop(directory: Path, store: Path, fstype: str, pids: Sequence[int]) -> Iterator[int]:
    """`follow()` in a process of its own; its PID."""

    def run(ready: int) -> None:
        trio.run(follow, directory, store, fstype, pids, ready)

    with floor.forked(run) as pid:
        yield pid
