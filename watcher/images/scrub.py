# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the copies in the store from the disk again, each after `ScrubSec=`: no service is to start on one that rotted.

It is in nobody's way: one copy at a time, in one thread, which sleeps three times as long as it reads; past the
kernel's memory (`hash_from_disk()`); and nothing wakes up before the next copy is due. (A low priority alone would not
do: many disks know none.)

When each copy was read last is in `checked`, a small file in the state directory. To lose it costs no more than reading
a copy too early. It could be an extended attribute of the copy; but not every file system has these, and to set one
changes what `stat` says of a copy, by which the store knows that it is what it was.

`checked` also says in which boot a daemon runs, and nothing once that has ended as it should. If it names another boot
than this one, the host went down without that: with a power cut, say. Then all copies are due at once. What services
would start on is not for here: each daemon reads that when it looks at a service, before it is ready (integrity.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import trio

from watcher.images.store import Store
from watcher.images.store_names import DIGEST
from watcher.model import problem
from watcher.records import durable, journal
from watcher.records.codec import from_dict, to_dict
from watcher.settings.values import INFINITY

T = TypeVar("T")

# So many seconds the thread sleeps for each that it reads.
_IDLE = 3.0

# Seconds after which it is written down what was read, though there is more to read; and between two passes at least.
_WRITE_SEC = 60.0
_PASS_SEC = 1.0
# After what was in the way of one.
_AGAIN_SEC = 600.0

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_SIZE_MAX = 16 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class Ended(Exception):
    """The daemon ends, and so does the reading."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What `checked` says; times are microseconds since the epoch.

    Attributes:
        boot: the boot in which a daemon runs, "" if none does, or the last one has ended as it should.
        doubted: what was read before that is due at once.
        times: when each copy was read last, by digest.
    """

    boot: str = ""
    doubted: int = 0
    times: Mapping[str, int] = field(default_factory=dict)


def begun(last: Checked | None, boot: str, now: int) -> Checked:
    """What is to be written when a daemon begins.

    Args:
        last: what the one before has left; None: that cannot be read.
        boot: the one that it begins in.
    """
    if last is None:
        return Checked(boot, now)
    unclean = last.boot not in ("", boot)
    return replace(last, boot=boot, doubted=now if unclean else last.doubted)


def plan(made: Mapping[str, int], checked: Checked, every: int, now: int) -> list[tuple[int, str]]:
    """When each copy is due, and its digest; the most urgent first.

    Args:
        made: when the inode of each copy was changed last, by digest. It was read then: the store reads what it writes.
        every: `ScrubSec=`, microseconds.
    """
    due = []
    for digest, when in made.items():
        last = checked.times.get(digest, when)
        # A time in the future says nothing: the clock was set back.
        at_once = last < checked.doubted or last > now
        due.append((min(last, now) if at_once else last + every, digest))
    return sorted(due)


class Scrub:
    """Reads copies again. `run()` is for one event loop; nothing else may write `checked`.

    Args:
        every: gives `ScrubSec=`, microseconds; 0 or infinity: never.
        damaged: called when a copy was found damaged: whoever uses it has to look.
        now: microseconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        every: Callable[[], int],
        damaged: Callable[[], None],
        now: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._store, self._every, self._damaged, self._now = store, every, damaged, now
        self._wake = trio.Event()
        self._stop = threading.Event()
        self._threads = trio.CapacityLimiter(1)
        # When the daemon ends, a thread may be at it that nobody waits for any more.
        self._writing = threading.Lock()
        self._said = ""
        self._times: dict[str, int] = {}
        self._checked = Checked(times=self._times)

    @property
    def _path(self) -> str:
        return f"{self._store.state_directory}/checked"

    def begin(self) -> None:
        """Read what the daemon before has left. A daemon runs from now on."""
        last = _read(self._path)
        self._checked = begun(last, _boot_id(), self._now())
        if last is None or self._checked.doubted != last.doubted:
            why = "cannot be read" if last is None else "says that the host went down while the watcher ran"
            journal.log.warning(f"{self._path} {why}: all copies in the store are read again")
        self._times = dict(self._checked.times)
        self._checked = replace(self._checked, times=self._times)
        self._write()

    def wake(self) -> None:
        """`ScrubSec=` may be another."""
        self._wake.set()

    async def run(self) -> None:
        """After `begin()`: read what is due, when it is due, until cancelled."""
        try:
            while True:
                self._wake = trio.Event()
                try:
                    seconds = await self._pass()
                except (
                    OSError,
                    RuntimeError,
                ) as error:  # no descriptor, no thread: no reason to end the daemon
                    seconds = _AGAIN_SEC
                    self._say(f"copies in the store cannot be read again now: {problem(error)}")
                with trio.move_on_after(seconds):
                    await self._wake.wait()
        finally:
            self._stop.set()

    def close(self) -> None:
        """The daemon ends as it should."""
        self._checked = replace(self._checked, boot="")
        self._write()

    async def _pass(self) -> float:
        """Read what is due. Returns the seconds until there may be more to do."""
        every = self._every()
        if every == 0 or every >= INFINITY:
            return float("inf")
        now = self._now()
        listed = await self._in_thread(self._made)
        due = plan(listed, self._checked, every, now)
        ready = [digest for when, digest in due if when <= now]
        if not ready:
            # What comes meanwhile is due after `every` at the earliest.
            return max((min((when for when, _ in due), default=now + every) - now) / 1_000_000, _PASS_SEC)
        written = trio.current_time()
        for digest in ready:
            await self._check(digest)
            if trio.current_time() - written > _WRITE_SEC:
                await self._keep(listed)
                written = trio.current_time()
        await self._keep(listed)
        count = f"{len(ready)} {'copy' if len(ready) == 1 else 'copies'}"
        journal.log.debug(f"the store: {count} read from the disk again")
        return _PASS_SEC

    async def _check(self, digest: str) -> None:
        whole = await self._in_thread(lambda: self._store.whole.scrub(digest, self._pace()))
        # One that is damaged is not read again and again either.
        self._times[digest] = self._now()
        if not whole:
            self._damaged()

    async def _keep(self, listed: Mapping[str, int]) -> None:
        for digest in self._times.keys() - listed.keys():
            del self._times[digest]
        await self._in_thread(self._write)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """In one thread at a time, and none of those that others wait for."""
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._threads)

    def _pace(self) -> Callable[[], None]:
        """What `hash_from_disk()` calls after each piece."""
        since = time.monotonic()

        def pace() -> None:
            nonlocal since
            if self._stop.wait((time.monotonic() - since) * _IDLE):
                raise Ended
            since = time.monotonic()

        return pace

    def _write(self) -> None:
        """On the disk when it returns. What cannot be written holds until the daemon ends."""
        temporary = f"{self._path}.new"
        # Only this process knows what is damaged: the next one reads it at once.
        damaged = dict.fromkeys(self._times.keys() & self._store.whole.damaged, 0)
        checked = replace(self._checked, times=self._times | damaged)
        try:
            with self._writing:
                with open(os.open(temporary, _NEW, 0o600), "w", encoding="ascii") as file:
                    json.dump(to_dict(checked, str), file)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, self._path)
                durable.fsync(self._store.state_directory)
        except OSError as error:
            text = "after the next start, copies in the store may be read again sooner than they had to be"
            self._say(f"{text}: {problem(error)}")

    def _say(self, text: str) -> None:
        """The same once."""
        if text != self._said:
            self._said = text
            journal.log.warning(text)

    def _made(self) -> dict[str, int]:
        made = {}
        with os.scandir(f"{self._store.state_directory}/store") as entries:
            for entry in entries:
                if DIGEST.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # just collected
                        made[entry.name] = entry.stat(follow_symlinks=False).st_ctime_ns // 1000
        return made


def _read(path: str) -> Checked | None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return from_dict(Checked, json.loads(file.read(_SIZE_MAX)))
    except FileNotFoundError:
        return Checked()
    except (OSError, ValueError, RecursionError):
        return None


def _boot_id() -> str:
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
