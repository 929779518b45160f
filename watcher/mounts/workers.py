# SPDX-License-Identifier: LGPL-2.1-or-later
"""The workshop: a private mount namespace, and the threads that may leave it to enter a service's.

`setns(CLONE_NEWNS)` refuses a caller that shares its root and working directory with others. A thread that has once
called `unshare(CLONE_FS)` shares them with nobody, and from then on its mount namespace is its own: the other threads
of the program are not affected, and no process has to be forked for a swap.

All threads of a `MountWorkers` share one mount namespace that nobody else sees. In it lies a small tmpfs:

    images/DIGEST       each image, mounted once however many services use it
    N/                  the tmpfs of one swap, in which a stack is put together

Everything in it vanishes with the last thread, whatever kills the program. Layers have to be attached somewhere:
before Linux 6.15 overlayfs refuses layers from detached mounts, and nothing can be attached to a detached mount.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, Generic, ParamSpec, TypeVar

import trio

from watcher.mounts import syscalls
from watcher.mounts.image_mounts import Images
from watcher.mounts.process import Elsewhere, namespace_id
from watcher.records import journal

P = ParamSpec("P")
T = TypeVar("T")

# Mounted over in the workshop's own namespace only. /sys is on every machine, and no step of a swap needs it.
PLACE = "/sys"

# Seconds: after which a job counts as hanging; and how long one that is under way may still take when we are to end.
HANGS_SEC = 30.0
_BUSY_SEC = 1.0  # after which another worker takes over what is waiting
_GRACE_SEC = 0.4


class HostNamespace(Elsewhere):
    """The namespace is the host's (or our own), not the service's: nothing may be mounted in it."""


class WorkerLost(Exception):
    """A worker could not come back from a service's namespace; it ends, and another takes its place."""


class Hung(Exception):
    """A job does not end."""


class MountWorkers:
    """Worker threads in a private mount namespace.

    Args:
        threads: how many; two already overlap one swap's waiting for the kernel with another's work.
        privileged: False in a user namespace, where overlayfs keeps its marks in `user.` attributes and only
            directory trees can be layers.
    """

    def __init__(self, threads: int = 2, *, privileged: bool = True) -> None:
        self.privileged = privileged
        self.images = Images(f"{PLACE}/images")
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._forbidden = {namespace_id("/proc/self/ns/mnt")}
        # Without the right to look at PID 1 (a user namespace) its namespace cannot be entered by us either.
        with contextlib.suppress(PermissionError):
            self._forbidden.add(namespace_id("/proc/1/ns/mnt"))
        self._namespace = -1
        self._attended: dict[tuple[int, int], float] = {}
        self._leftovers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._wanted = threads
        for _ in range(threads):
            self._start_thread()
        self._forbidden.add(namespace_id(self._namespace))

    def close(self) -> None:
        """End the threads and with them the workshop's mounts; what a service shows stays."""
        threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _GRACE_SEC  # one that hangs must not keep the program from ending
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1

    def __enter__(self) -> MountWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `function` on a worker that stands in the workshop."""
        return self._submit(lambda: function(*args, **kwargs)).future

    def _submit(self, function: Callable[[], T]) -> _Job[T]:
        job = _Job(function)
        self._jobs.put(job)
        return job

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit()` for a trio task.

        A job is not given up by cancellation, it takes a millisecond; one that hangs (a service whose base is a dead
        network file system) keeps its thread, another takes its place, and the task goes on.

        Raises:
            Hung: it did not end, or it did not get its turn.
        """
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        job = self._submit(lambda: function(*args, **kwargs))
        job.future.add_done_callback(lambda _: _wake(token, done))
        for seconds in _patience():
            with trio.move_on_after(seconds):
                try:
                    await done.wait()
                except trio.Cancelled:
                    with trio.move_on_after(_GRACE_SEC, shield=True):
                        await done.wait()
                    if not done.is_set():
                        raise
            if job.future.done():
                return job.future.result()
            self._relieve(job)
        self._give_up(job)
        return job.future.result()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`run()` for a thread that may wait; not for a worker.

        Raises:
            Hung: see there.
        """
        job = self._submit(lambda: function(*args, **kwargs))
        for seconds in _patience():
            if wait([job.future], seconds).done:
                return job.future.result()
            self._relieve(job)
        self._give_up(job)
        return job.future.result()

    def _relieve(self, job: _Job[Any]) -> None:
        """Another worker takes the place of the one that is at this job, which leaves when it has done it.

        So that those whose turn comes next do not wait for a service that hangs until it is given up.
        """
        if job.thread in self._threads and not job.future.done():
            self._start_thread()
            self._threads.discard(job.thread)

    def _give_up(self, job: _Job[Any]) -> None:
        if job.future.cancel():  # its turn never came
            raise Hung(f"all workers have been waiting for the kernel for {HANGS_SEC:g} s")
        if job.future.done():
            return
        raise Hung(f"no answer from the kernel for {HANGS_SEC:g} s")

    def check_foreign(self, identity: tuple[int, int]) -> None:
        """Refuse a namespace that is the host's or our own.

        Raises:
            HostNamespace: nothing may be mounted there.
        """
        if identity in self._forbidden:
            raise HostNamespace("shares the host's mount namespace")

    @contextlib.contextmanager
    def entered(self, namespace: int) -> Iterator[None]:
        """Stand in the mount namespace behind the descriptor; root and working directory are its root.

        In the block: system calls only. An import, a log line or a path of ours would resolve in the service's files.
        Afterwards the working directory is the workshop's root.

        Raises:
            HostNamespace: before anything was entered, or when the kernel shows another namespace than was asked for.
            Lost: there was no way back.
        """
        wanted = namespace_id(namespace)
        self.check_foreign(wanted)
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            status = os.stat("ns/mnt", dir_fd=_worker.task)
            if (status.st_dev, status.st_ino) != wanted:
                raise HostNamespace("is not in the mount namespace that was entered")
            yield
        finally:
            try:
                syscalls.setns(self._namespace, syscalls.CLONE_NEWNS)
            except OSError as error:
                _worker.lost = True
                raise WorkerLost(f"no way back from a service's mount namespace: {error}") from error

    @contextlib.contextmanager
    def attending(self, namespace: int) -> Iterator[None]:
        """Keep from sending one worker after the other to where one hangs already.

        Raises:
            Hung: one works on that namespace and does not come back.
        """
        identity = namespace_id(namespace)
        now = time.monotonic()
        if now - self._attended.setdefault(identity, now) >= HANGS_SEC:
            raise Hung("a step in its mount namespace still does not end")
        try:
            yield
        finally:
            self._attended.pop(identity, None)

    def own_namespace(self) -> int:
        """A descriptor of the mount namespace in which this worker stands."""
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)

    def open_mountinfo(self) -> int:
        """A descriptor of the mount table of where this worker stands, whatever /proc there shows.

        It becomes readable with POLLPRI when that table changes after this call (proc_pid_mounts(5)).
        """
        return os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Work in a fresh tmpfs of one's own; all that was mounted below it is lifted off afterwards, by one call.

        That call waits for the kernel's other processors (27 to 700 us), so it is left for after the result. The
        working directory is the tmpfs when the block starts; entering a namespace changes that.
        """
        place = f"{PLACE}/{next(self._numbers)}"
        os.mkdir(place, 0o700)
        try:
            syscalls.mount("confext-watcher", place, "tmpfs", 0, "mode=0755")
        except BaseException:
            os.rmdir(place)
            raise
        try:
            os.chdir(place)
            yield
        finally:
            self._leftovers.put(place)
            # The tmpfs could not go while somebody stands in it.
            os.chdir("/")

    def _start_thread(self) -> None:
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(ready,), name="confext-mounts", daemon=True)
        thread.start()
        failure = ready.get()
        if failure is not None:
            raise failure

    def _work(self, ready: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            self._settle_in()
        except BaseException as error:  # noqa: BLE001 -- raised again by the thread that waits for this one
            ready.put(error)
            return
        thread = threading.current_thread()
        self._threads.add(thread)
        ready.put(None)
        try:
            while thread in self._threads:  # else another took its place while it hung
                self._clear()
                job = self._jobs.get()
                if job is None:
                    return
                job.run(thread)
                if _worker.lost:
                    threading.Thread(target=self._replace, daemon=True).start()
                    return
                del job
        finally:
            self._threads.discard(thread)
            os.close(_worker.task)

    def _settle_in(self) -> None:
        syscalls.unshare(syscalls.CLONE_FS)
        if self._namespace < 0:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            # Slave: what the host unmounts goes away here too and is never held busy by us; nothing goes back.
            syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
            syscalls.mount("confext-watcher", PLACE, "tmpfs", 0, "mode=0700")
            syscalls.mount("none", PLACE, None, syscalls.MS_PRIVATE)
            os.mkdir(f"{PLACE}/images", 0o700)
            self._namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        else:
            syscalls.setns(self._namespace, syscalls.CLONE_NEWNS)
        # /proc/self is the leader of the thread group, which stands elsewhere.
        _worker.task = os.open("/proc/thread-self", os.O_PATH | os.O_CLOEXEC)
        _worker.lost = False

    def _clear(self) -> None:
        """Take the benches apart that are left behind; by name, so that a worker can do it for one that was lost."""
        failed = []
        while True:
            try:
                place = self._leftovers.get_nowait()
            except queue.Empty:
                break
            try:
                _remove(place)
            except OSError as error:
                failed.append(place)
                journal.log.warning(f"workshop: not taken apart, it is tried again: {error}")
        for place in failed:
            self._leftovers.put(place)

    def _replace(self) -> None:
        try:
            self._start_thread()
        except OSError as error:
            journal.log.error(f"workshop: no worker could be started in place of one that was lost: {error}")


def _patience() -> Iterator[float]:
    """Seconds after each of which a job is looked at, until it is given up; its turn may come late."""
    left = HANGS_SEC
    while left > 0:
        yield min(_BUSY_SEC, left)
        left -= _BUSY_SEC


def _wake(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    # The program may have ended without waiting for a job that hangs.
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)


class _Job(Generic[T]):
    __slots__ = ("_function", "future", "thread")

    def __init__(self, function: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self.thread: threading.Thread | None = None
        self._function = function

    def run(self, thread: threading.Thread) -> None:
        self.thread = thread
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001 -- raised again where the future is waited for
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Worker(threading.local):
    """What one worker thread holds: its own directory in /proc, and whether it found back."""

    task: int
    lost: bool


_worker = _Worker()


def _remove(place: str) -> None:
    try:
        syscalls.umount2(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:  # lifted off already, and only the directory is left
            raise
    os.rmdir(place)
