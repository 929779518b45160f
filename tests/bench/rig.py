# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is measured on: a real daemon, real processes in mount namespaces of their own, and images.

Services are forked from here rather than started by `exec`, which does the same (a namespace, a registration) but
starts an interpreter for each: a hundred of them would take minutes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import CHECKOUT
from support.images import confext, image, noise
from watcher.managers.registration import Registration, register
from watcher.mounts import syscalls
from watcher.mounts.process import start_time

from . import filesystem
from .report import Failed

_PR_SET_PDEATHSIG = 1  # prctl(2)
SECONDS = 60.0
"""Nothing takes this long: what does is a failure."""

MARK = b"@version-00000000"
STAMP = "etc/bench/version"
_TOLD = struct.Struct("=qq17s")


class Image:
    """An image of 1 MiB as a pattern for any number of versions that differ in a few bytes only.

    Nothing in it is compressed, so that a version can be made by writing over a mark; that keeps mksquashfs and its
    kin out of what is measured.
    """

    def __init__(self, where: Path, fstype: str, size: int = 1 << 20) -> None:
        # Blocks of its own for the mark: erofs has a checksum over the first.
        files = {STAMP: MARK + bytes(8192 - len(MARK)), "etc/bench/data": noise(size - (64 << 10))}
        tree = confext(where / f"tree-{fstype}", "web", files)
        options = ("-noI", "-noD", "-noF", "-noX", "-no-fragments") if fstype == "squashfs" else ()
        self.fstype = fstype
        self._data = bytearray(image(tree, where / f"pattern.{fstype}", fstype, *options).read_bytes())
        self._place = self._data.index(MARK)

    def version(self, number: int) -> bytes:
        """The bytes of a version; its STAMP starts with `stamp(number)`."""
        self._data[self._place : self._place + len(MARK)] = stamp(number)
        return bytes(self._data)


def stamp(number: int) -> bytes:
    return b"@version-%08d" % number


@contextlib.contextmanager
def dying() -> Iterator[None]:
    """In a forked child: whatever happens, nothing of the parent's runs in it afterwards."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # It does not outlive a bench that is killed, nor keep its file system.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        yield
    except BaseException:  # noqa: BLE001 -- told, and the end
        traceback.print_exc()
    finally:
        os._exit(1)


@dataclass(slots=True)
class Service:
    """A process in a mount namespace of its own that says when it was told to reload, and what it then saw."""

    name: str
    pid: int
    told: int
    pidfd: int

    def handled(self) -> tuple[int, bytes]:
        """When its reload handler ran (CLOCK_MONOTONIC, ns), and the STAMP it saw. Waits.

        Raises:
            Failed: it did not run.
        """
        if not self.hears(SECONDS):
            raise Failed(f"{self.name} was not told to reload within {SECONDS:.0f} s")
        _, when, seen = _TOLD.unpack(os.read(self.told, _TOLD.size))
        return when, seen

    def hears(self, seconds: float) -> bool:
        """Whether its reload handler has run, or does within a time."""
        poll = select.poll()  # there may be more descriptors than select() takes
        poll.register(self.told, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        os.close(self.told)


@contextlib.contextmanager
def service(
    name: str, runtime_directory: Path | None, confext_dir: Path, *, program: Sequence[str] = ()
) -> Iterator[Service]:
    """A service, registered where the daemon looks; without a runtime directory it is nobody's.

    Args:
        program: what it becomes; nothing: a process that answers every SIGHUP.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with dying():
            os.close(reading)
            _be_service(name, runtime_directory, confext_dir, writing, program)
    os.close(writing)
    made = Service(name, pid, reading, os.pidfd_open(pid))
    try:
        if program:
            os.read(reading, 1)  # nothing: its end of the pipe is closed when it becomes the program
        else:
            made.handled()  # it is ready
        yield made
    finally:
        made.end()


def _be_service(
    name: str, runtime_directory: Path | None, confext_dir: Path, told: int, program: Sequence[str]
) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SHARED)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    if runtime_directory is not None:
        status = os.stat("/proc/self/ns/mnt")
        registration = Registration(
            name=name,
            pid=os.getpid(),
            started=start_time(os.getpid()),
            namespace=(status.st_dev, status.st_ino),
            confext_dirs=(str(confext_dir),),
            # Ignored by a program that knows nothing of it.
            reload_signal="SIGWINCH" if program else "SIGHUP",
        )
        register(str(runtime_directory), registration)
    if program:
        os.execvp(program[0], list(program))
    os.write(told, _TOLD.pack(os.getpid(), 0, b""))
    while True:
        signal.sigwait({signal.SIGHUP})
        when = time.monotonic_ns()
        os.write(told, _TOLD.pack(os.getpid(), when, _seen(f"/{STAMP}")))


def _seen(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.read(fd, len(MARK))
    finally:
        os.close(fd)


class Rig:
    """A scratch directory, with the daemon's directories in it and `SettleSec=0`."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.runtime_directory = where / "run"
        self.state_directory = where / "state"
        (where / "conf").mkdir()
        (where / "conf/watcher.conf").write_text("[Watcher]\nSettleSec=0\n")
        self.environment = os.environ | {
            "PYTHONPATH": str(CHECKOUT),
            "RUNTIME_DIRECTORY": str(self.runtime_directory),
            "STATE_DIRECTORY": str(self.state_directory),
            "CONFIGURATION_DIRECTORY": str(where / "conf"),
        }

    def directory(self, name: str) -> Path:
        """A `.confext.d` of that name with a `web.raw.v` in it; the latter."""
        drop = self.where / name / "web.raw.v"
        drop.mkdir(parents=True, exist_ok=True)
        return drop

    @contextlib.contextmanager
    def daemon(self) -> Iterator[Daemon]:
        """The daemon, ready; its log is in `daemon.log`."""
        # As a service manager would be told (sd_notify(3)): no polling of a log.
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
            open(self.where / "daemon.log", "ab") as log,
        ):
            address = f"\0confext-bench-{os.getpid()}-{time.monotonic_ns()}"
            ready.bind(address)
            start = time.monotonic()
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "watcher", "run"],
                env=self.environment | {"NOTIFY_SOCKET": "@" + address[1:]},
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
            )
            try:
                self._wait_until_ready(ready, process.pid)
                yield Daemon(process.pid, time.monotonic() - start)
            finally:
                process.terminate()
                process.wait(SECONDS)

    def _wait_until_ready(self, ready: socket.socket, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(ready, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while found := dict(poll.poll(SECONDS * 1000)):
                if ready.fileno() not in found:
                    raise Failed(f"the daemon has ended: {self._last_words()}")
                if b"READY=1" in ready.recv(4096):
                    return
            raise Failed(f"the daemon was not ready after {SECONDS:.0f} s: {self._last_words()}")
        finally:
            os.close(pidfd)

    def _last_words(self) -> str:
        lines = (self.where / "daemon.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass(frozen=True, slots=True)
class Daemon:
    """The daemon; `started` is how long it took to be ready, seconds."""

    pid: int
    started: float

    def cpu(self) -> float:
        """Processor time of all its threads so far, milliseconds."""
        return cpu(self.pid)


def cpu(pid: int) -> float:
    """Processor time of all threads of a process, also of those that have ended, milliseconds."""
    # The clock of a process, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e6


def memory(pid: int) -> float:
    """Resident, MiB (proc_pid_smaps(5))."""
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return next(int(row[1]) / 1024 for row in rows if row[0] == "Rss:")


def switches(pid: int) -> dict[str, int]:
    """How often each thread of a process was switched to so far, by its ID."""
    found = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        rows = [line.split() for line in status.read_text().splitlines() if "ctxt_switches" in line]
        found[status.parent.name] = sum(int(row[1]) for row in rows)
    return found


@functools.cache
def stand_apart() -> None:
    """A mount table of our own: what others mount on this machine meanwhile would wake the daemon.

    And ours goes with us, whatever we die of. The many services that are held take many descriptors.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """A scratch directory on a new file system, at a path in which nobody else does anything.

    The daemon watches every directory on the way for a rename of the next: in a busy /tmp it would be woken all the
    time by what is no concern of it.
    """
    stand_apart()
    where = Path("/mnt/bench")
    with _memory(where.parent), contextlib.ExitStack() as stack:
        where.mkdir()
        stack.enter_context(filesystem.mounted(where))
        (where / "run").mkdir()
        stack.enter_context(_memory(where / "run"))  # as on a host
        yield Rig(where)


@contextlib.contextmanager
def _memory(where: Path) -> Iterator[None]:
    syscalls.mount("confext-bench", str(where), "tmpfs", 0, "mode=0755")
    try:
        yield
    finally:
        syscalls.umount2(str(where), syscalls.MNT_DETACH)


def drop(data: bytes, directory: Path, name: str = "web_1.raw") -> int:
    """Put an image into a directory as rsync does: under a hidden name, then by rename. When (ns) that happened."""
    hidden = directory / f".{name}.Xa81b"
    hidden.write_bytes(data)
    when = time.monotonic_ns()
    os.rename(hidden, directory / name)
    return when


class Eye:
    """Sees a service's `/etc` from outside, and when it changes."""

    def __init__(self, pid: int) -> None:
        self._path = f"/proc/{pid}/root/{STAMP}"
        self._table = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._table, select.POLLPRI)

    def close(self) -> None:
        os.close(self._table)

    def sees(self, wanted: bytes) -> int:
        """When (ns) `/etc` was first seen to hold the wanted STAMP. Waits for the mount table to change."""
        while _seen(self._path) != wanted:
            if not self._poll.poll(SECONDS * 1000):
                raise Failed(f"{wanted.decode()} was not seen in /etc after {SECONDS:.0f} s")
        return time.monotonic_ns()
