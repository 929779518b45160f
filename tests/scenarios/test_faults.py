# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed before each system call of a swap that changes something, and with an error from each call: the real daemon,
and a real service.

Which calls these are is found out by tracing a drop first: a call that is added to the way of a drop is in the test
the next time it runs. It is the worker's calls, from mounting the image to taking the bench apart; what the other
threads leave behind (the store, the slots, notes, the ledger) is killed at by name.

Two lanes, each with a daemon and a service of its own, share the cases.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import disks, dying, images
from support.needs import loop, root, tool
from support.place import Place, eventually
from support.records import under_way
from watcher.mounts.workers import PLACE, THREAD

pytestmark = [root, loop, tool("mksquashfs"), tool("strace"), pytest.mark.limit(600)]

Call = tuple[str, int]
"""A system call by name, and which one of these it is since the drop (from 1)."""

# What only keeps the interpreter going comes at any time, in any number.
STRACE_SEC = 20
NOISE = frozenset(
    "futex mmap munmap mremap mprotect madvise brk sched_yield restart_syscall rt_sigprocmask rt_sigaction "
    "clock_nanosleep gettid getpid getrandom rseq membarrier".split()
)
# What changes something. All else only looks, or keeps the interpreter going, and a kill closes what is open: killed
# before another call, the daemon leaves behind what it leaves when it is killed before the next one of these.
CHANGES = (
    "rename,renameat,renameat2,symlink,symlinkat,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "write,pwrite64,ftruncate,copy_file_range,ioctl,fsync,fdatasync,chmod,fchmod,fchown,setxattr,fsetxattr,"
    "setns,mount,umount2,open_tree,fsopen,fsconfig,fsmount,mount_setattr,move_mount,pidfd_send_signal"
)
# An error that is injected into close(2) leaves the descriptor open, which the kernel never does; sendto(2) is trio's,
# who wakes itself by a byte.
# (fstat(2) of an open file is among them: Python would lose the descriptor.)
NEVER_FAIL = frozenset({"close", "sendto", "geteuid", "getegid", "newfstatat"})

# When it starts and on a reload it notes what it finds. What is hidden and what is bound is made ready before.
PROGRAM = """
import signal, subprocess, sys, time
for command in (
    "mount -t tmpfs none /etc/fault/dir", "touch /etc/fault/dir/mine",
    "mount --bind {covered} /etc/fault/hidden", "mount --bind /etc/fault/bound /etc/fault/bound",
):
    subprocess.run(command.split(), check=True)
def reload(*_):
    with open("/etc/fault/one") as found, open({seen!r}, "a") as seen:
        seen.write(found.read() + "\\n")
signal.signal(signal.SIGHUP, reload)
reload()
while True:
    signal.pause()
"""


class Lane(Place):
    """A daemon and a service that is on version "A" or "B" of one image: a bare file system, or a disk image."""

    def __init__(self, scratch: Path, versions: dict[str, Path]) -> None:
        super().__init__(scratch)
        (self.settings / "watcher.conf").write_text("[Watcher]\nSettleSec=0\nSettleTreeSec=0\nRemoveSec=0\n")
        self.versions = versions
        self.seen = scratch / "seen"
        covered = scratch / "covered"
        covered.write_text("covered")
        self.wanted = "A"
        self.baseline = (0, 0, 0)
        self.drop("A")
        program = PROGRAM.format(seen=str(self.seen), covered=covered)
        self.service = self.start(sys.executable, "-c", program, options=("--reload-signal", "SIGHUP"))
        eventually(lambda: self.seen.exists() and self.told() == "A")
        self.host = self.host_rows()
        # A swap makes them anew, and what the sandbox mounted on the stack is then also what is beneath the cover.
        self.rows = len(self.service_rows())

    def drop(self, version: str) -> None:
        """By rename, as rsync does it."""
        hidden = self.drops / ".fault.raw"
        os.link(self.versions[version], hidden)
        os.rename(hidden, self.drops / "fault.raw")
        self.wanted = version

    def drop_other(self) -> None:
        self.drop("B" if self.wanted == "A" else "A")

    def service_rows(self) -> list[str]:
        rows = Path(f"/proc/{self.service.pid}/mountinfo").read_text().splitlines()
        return [row for row in rows if (row.split()[4] + "/").startswith("/etc/")]

    def host_rows(self) -> list[str]:
        """What we could have mounted; others may mount things on this machine too."""
        rows = Path("/proc/self/mountinfo").read_text().splitlines()
        pattern = re.compile(
            r"(\S+ ){4}(/etc\S*|/sys|/) |.* confext-watcher |.*" + re.escape(str(self.scratch))
        )
        return [row for row in rows if pattern.match(row)]

    def told(self) -> str:
        """What the service found when it was last told to reload."""
        return self.seen.read_text().rstrip("\n").rpartition("\n")[2]

    def check_whole(self) -> str:
        """The service has a complete old or new /etc with its sandbox, and the host has what it had; the version."""
        found = {
            path: self.shown(self.service, f"/etc/fault/{path}") for path in ("one", "two", "bound/version")
        }
        assert set(found.values()) in ({"A"}, {"B"}), found
        assert self.shown(self.service, "/etc/fault/hidden") == "covered"
        assert os.listdir(f"/proc/{self.service.pid}/root/etc/fault/dir") == ["mine"]
        assert self.host_rows() == self.host
        return found["one"] or ""

    def settled(self) -> bool:
        """The service has what is wanted, knows it, and nothing is left of the way there."""
        return (
            self.told() == self.wanted
            and self.shown(self.service, "/etc/fault/one") == self.wanted
            and len(self.service_rows()) == self.rows
            and not under_way(self.state)
        )

    def check_settles(self) -> None:
        try:
            eventually(self.settled)
        except AssertionError:
            state = self.told(), self.wanted, self.service_rows(), under_way(self.state)
            raise AssertionError(f"{state}\n{''.join(self.log[-20:])}") from None
        assert self.check_whole() == self.wanted

    def died(self) -> bool:
        """Whether the daemon dies on the way; it has not when nothing has happened for a while after the end of it."""
        assert self.daemon is not None
        quiet = 0
        while self.daemon.poll() is None:
            quiet = quiet + 1 if self.settled() else 0
            if quiet > 120:  # what follows a round half a second later is over, too
                return False
            time.sleep(0.01)
        return True

    @property
    def workers(self) -> list[int]:
        """The threads that make the swaps."""
        assert self.daemon is not None
        found = []
        for task in Path(f"/proc/{self.daemon.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if (task / "comm").read_text().strip() == THREAD:
                    found.append(int(task.name))
        return found

    def _mounts(self) -> int:
        """How many there are in the workers' namespace."""
        assert self.daemon is not None
        process = Path(f"/proc/{self.daemon.pid}")
        own = os.readlink(process / "ns/mnt")
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                link = os.readlink(fd)
                if link.startswith("mnt:") and link != own:
                    words = ["nsenter", f"--mount={fd}", "cat", "/proc/self/mountinfo"]
                    table = subprocess.run(words, capture_output=True, check=False).stdout
                    if f" {PLACE}/images ".encode() in table or f" {PLACE} ".encode() in table:
                        return table.count(b"\n")
        raise AssertionError("no namespace of the workers")

    @contextlib.contextmanager
    def strace(self, *words: str, all_threads: bool = False) -> Iterator[None]:
        """Trace the workers, or all threads of the daemon, from now on."""
        assert self.daemon is not None
        pids = [self.daemon.pid] if all_threads else self.workers
        whom = [*(["-f"] if all_threads else []), *(word for pid in pids for word in ("-p", str(pid)))]
        command = ["strace", *whom, *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            said = [tracer.stderr.readline()]
            while said[-1] and "attached" not in said[-1]:  # a thread that was just ending could not be
                said.append(tracer.stderr.readline())
            assert said[-1], said
            try:
                yield
            finally:
                tracer.send_signal(signal.SIGINT)
                try:
                    tracer.wait(STRACE_SEC)
                except subprocess.TimeoutExpired:
                    # Told to end while the daemon dies, strace may wait for good for a thread that is a zombie already.
                    tracer.kill()

    def loops(self) -> int:
        found = 0
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                found += backing.read_text().startswith(str(self.scratch))
            except OSError:  # it has just gone
                continue
        return found

    def held(self) -> tuple[int, int, int]:
        """Descriptors of the daemon, without one for each worker; its workers; the mounts in their namespace."""
        assert self.daemon is not None
        workers = len(self.workers)
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd")) - workers, workers, self._mounts()

    def holds_no_more(self) -> bool:
        (fds, _, mounts), before = self.held(), self.baseline
        # A worker that cannot come back drops what it has opened there, at most what keeps one overlay fresh.
        lost = sum("no way back" in line for line in self.log)
        # An image that is not needed any more goes when the daemon has time: it may be there in one of the two.
        return fds <= before[0] + 2 * lost and mounts <= before[2] + 1


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("versions")
    found = {}
    for version in "AB":
        files = dict.fromkeys(("one", "two", "bound/version"), version) | {
            "hidden": "to be hidden",
            "dir/place": "",
        }
        contents = {f"etc/fault/{path}": text.encode() for path, text in files.items()}
        tree = images.confext(scratch / f"tree-{version}", "fault", contents)
        found[version] = images.image(tree, scratch / f"{version}.raw")
    # So every other drop is of a disk image, which needs a loop device over a part of it.
    found["B"].write_bytes(disks.disk(found["B"].read_bytes()))
    return found


@pytest.fixture
def lanes(tmp_path: Path, versions: dict[str, Path]) -> Iterator[list[Lane]]:
    with Lane(tmp_path / "one", versions) as one, Lane(tmp_path / "two", versions) as two:
        for lane in (one, two):
            # A link to a file on another file system could not be made.
            lane.host = one.host
        yield [one, two]


def traced(lane: Lane, *words: str, all_threads: bool = False) -> list[Call]:
    """The calls on the way of one drop, in order; of all threads, each that any of them makes."""
    log = lane.scratch / "trace"
    with lane.strace("-o", str(log), *words, all_threads=all_threads):
        lane.drop_other()
        lane.check_settles()
        before = -1
        while (size := log.stat().st_size) != before:
            # Nothing announces that it is idle.
            before = size
            time.sleep(0.3)
    counts: Counter[tuple[str, str]] = Counter()
    calls: dict[Call, None] = {}
    for thread, name in re.findall(r"^(\d+ +)?(\w+)\(", log.read_text(), re.MULTILINE):
        if name not in NOISE:
            counts[thread, name] += 1
            calls[name, counts[thread, name]] = None
    return list(calls)


def names_of(log: Path) -> list[str]:
    """The names of the calls of the thread that makes the swap."""
    rows = re.findall(r"^(\d+ +)?(\w+)\(", log.read_text(), re.MULTILINE)
    (thread,) = {thread for thread, name in rows if name == "pidfd_send_signal"}
    return [name for one, name in rows if one == thread]


def look_of(log: Path) -> list[Call]:
    """The calls of a look by which it reads directories, up to the copy of what it has found."""
    names = names_of(log)
    counts: Counter[str] = Counter()
    calls = []
    for name in names[: names.index("ftruncate")]:
        counts[name] += 1
        if name in ("openat", "getdents64"):
            calls.append((name, counts[name]))
    return calls


def swap_of(log: Path) -> list[Call]:
    """The calls of a swap, by the thread that makes it: from where it leaves home until it tells the service."""
    names = names_of(log)
    begin = max(number for number in range(names.index("pidfd_send_signal")) if names[number] == "mkdir")
    begin = max(number for number in range(begin) if names[number : number + 2] == ["unshare", "setns"])
    counts: Counter[str] = Counter()
    calls = []
    for number, name in enumerate(names[: names.index("pidfd_send_signal")]):
        counts[name] += 1
        if number >= begin and name not in NOISE and name not in NEVER_FAIL:
            calls.append((name, counts[name]))
    return calls


def share(lanes: list[Lane], calls: list[Call], case: Callable[[Lane, Call], bool]) -> list[Call]:
    """Try all cases; those that did not come about are given back (`case` says False)."""
    left = iter(calls)
    lock = threading.Lock()

    def run(lane: Lane) -> list[Call]:
        missed = []
        while True:
            with lock:
                call = next(left, None)
            if call is None:
                return missed
            try:
                if not case(lane, call):
                    missed.append(call)
            except BaseException as error:
                error.add_note(f"at {call[0]} number {call[1]}")
                raise

    with ThreadPoolExecutor(len(lanes)) as pool:
        return [call for missed in pool.map(run, lanes) for call in missed]


def killed(lane: Lane, call: Call) -> bool:
    """Whether the daemon was killed at that call; it is another one afterwards, and all is well."""
    name, number = call
    inject = f"inject={name}:signal=KILL:when={number}"
    with lane.strace("-o", "/dev/null", "-e", f"trace={name}", "-e", inject, all_threads=True):
        lane.drop_other()
        died = lane.died()
    if not died:
        lane.check_settles()
        return False
    lane.ended()
    lane.check_whole()
    assert len(lane.service_rows()) <= 2 * lane.rows
    lane.start_daemon()
    lane.check_settles()
    eventually(lambda: lane.loops() <= 3)
    return True


def failed(lane: Lane, call: Call, error: str = "ENOMEM") -> bool:
    """Whether that call failed; the daemon got over it by itself, and all is well."""
    if _fails(lane, call, error):
        return True
    # One that is only made for what the daemon has not seen before.
    lane.stop_daemon()
    lane.start_daemon()
    lane.check_settles()
    return _fails(lane, call, error)


def _fails(lane: Lane, call: Call, error: str) -> bool:
    name, number = call
    log = lane.scratch / "trace"
    with lane.strace("-o", str(log), "-e", f"inject={name}:error={error}:when={number}"):
        lane.drop_other()
        lane.check_settles()
        # What only failed to be tidied up is tried again at the next opportunity.
        lane.drop_other()
        lane.check_settles()
    try:
        eventually(lane.holds_no_more)
    except AssertionError:
        raise AssertionError(f"{lane.held()} instead of {lane.baseline}\n{''.join(lane.log[-20:])}") from None
    eventually(lambda: lane.loops() <= 2)  # the kernel takes the last one away in its own time
    return "(INJECTED)" in log.read_text()


@pytest.fixture
def running(lanes: list[Lane]) -> list[Lane]:
    """Both daemons run."""
    for lane in lanes:
        lane.start_daemon()
        lane.check_settles()
    return lanes


def test_killed_before_each_system_call_of_a_drop(running: list[Lane]) -> None:
    """From the copy to the record of the outcome, whichever thread makes the call."""
    calls = traced(running[0], "-e", f"trace={CHANGES}", all_threads=True)
    assert {
        "setns",
        "fsconfig",
        "move_mount",
        "umount2",
        "rename",
        "symlink",
        "fsync",
        "pidfd_send_signal",
    } <= {name for name, _ in calls}
    missed = share(running, calls, killed)
    print(f"killed before {len(calls) - len(missed)} of {len(calls)} calls")
    assert len(missed) <= len(calls) // 5, missed  # which thread takes which job is not always the same


def test_an_error_from_each_system_call_of_a_swap(running: list[Lane]) -> None:
    lanes = running
    traced(lanes[0])
    traced(lanes[1])
    calls = swap_of(lanes[1].scratch / "trace")
    for lane in lanes:
        lane.baseline = lane.held()
    missed = share(lanes, calls, failed)
    print(f"an error from {len(calls) - len(missed)} of {len(calls)} calls")
    assert len(missed) <= len(calls) // 20, missed


def test_an_io_error_from_each_system_call_of_a_look(running: list[Lane]) -> None:
    """No event tells when a disk can be read again."""
    lanes = running
    traced(lanes[0])
    traced(lanes[1])
    calls = look_of(lanes[1].scratch / "trace")
    for lane in lanes:
        lane.baseline = lane.held()
    missed = share(lanes, calls, lambda lane, call: failed(lane, call, "EIO"))
    print(f"an error from {len(calls) - len(missed)} of {len(calls)} calls")
    assert len(calls) > 10 and len(missed) <= len(calls) // 10, missed


def test_killed_before_each_name_that_a_drop_makes_or_changes(lanes: list[Lane]) -> None:
    """In the store, the slots, the notes and the ledger, by whatever thread."""
    wanted = {"os.rename", "os.symlink", "os.unlink", "signal.pidfd_send_signal", "ledger"}
    found = killed_at_each(lanes)
    while not wanted <= found and len(lanes) > 1:
        # What a kill has left is cleared away by the next drop: its steps have other numbers then, in that lane alone.
        found |= killed_at_each([lanes.pop()])
    assert wanted <= found


def killed_at_each(lanes: list[Lane]) -> set[str]:
    """What the daemon was about to do when it was killed, at each of its steps."""
    steps: dict[int, str] = {}
    missed: list[int] = []

    def case(lane: Lane, call: Call) -> bool:
        _, number = call
        if len(missed) > 1:
            return False
        step = killed_at(lane, number)
        if step:
            steps[number] = step
        else:
            missed.append(number)
        return bool(step)

    share(lanes, [("step", number) for number in range(1, 100)], case)
    print(f"killed before {len(steps)} steps: {', '.join(sorted(set(steps.values())))}")
    # Not every drop has as many: two that end at the same time share a commit of the ledger.
    assert sorted([*steps, *missed]) == list(range(1, len(steps) + len(missed) + 1))
    assert len(missed) > 1 and min(missed) >= len(steps) - 1
    return {*steps.values()}


def killed_at(lane: Lane, number: int) -> str:
    """What the daemon was about to do when it was killed, "" if it was not; after it another brings all to its end."""
    armed = lane.scratch / "armed"
    lane.environment |= {"DYING_ARMED": str(armed), "DYING_STEP": str(number)}
    lane.start_daemon((sys.executable, dying.__file__))
    lane.check_settles()
    armed.touch()
    lane.drop_other()
    died = lane.died()
    step = armed.read_text()
    armed.unlink()
    if died:
        lane.ended()
        lane.check_whole()
        lane.start_daemon()
    lane.check_settles()
    lane.stop_daemon()
    assert bool(step) == died
    return step
