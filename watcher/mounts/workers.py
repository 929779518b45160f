# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mount workers: threads in a private mount namespace, which leave it to enter a service's.

`setns(CLONE_NEWNS)` refuses a thread that shares its root and working directory with others. A worker calls
`unshare(CLONE_FS)` once. From then on its mount namespace is its own: the other threads of the program are not
affected, and no process has to be forked for a swap.

All threads of a `MountWorkers` share one mount namespace that no other process is in. In it lies a small tmpfs:

    images/DIGEST       each image, mounted once for all services that use it
    N/                  the tmpfs of one swap, in which a stack is put together

The kernel removes all of it with the last thread, whatever kills the program. Layers have to be attached somewhere:
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
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from watcher.model import Copy
from watcher.mounts import image_mounts, syscalls
from watcher.mounts.process import Elsewhere, namespace_id
from watcher.records import journal

if TYPE_CHECKING:
    import trio

P = ParamSpec("P")
T = TypeVar("T")

# Hidden by our tmpfs, in the private namespace only. /sys is on every machine, and no step of a swap needs it.
PLACE = "/sys"

HANGS_SEC = 27.0
"""Seconds after which a job counts as hanging: before the job that it may be part of does (watch/offload.py)."""

_BUSY_SEC = 1.0  # until another worker takes over what is waiting
_GRACE_SEC = 0.4  # for a job that is under way when the program ends


class HostNamespace(Elsewhere):
    """The namespace is the host's (or our own), not the service's: nothing may be mounted in it."""


class WorkerLost(Exception):
    """A worker could not come back from a service's namespace. It ends, and another takes its place."""


class Hung(Exception):
    """A job does not end."""


class MountWorkers:
    """Worker threads in a private mount namespace.

    Args:
        threads: how many; two already overlap one swap's waiting for the kernel with another's work.
        privileged: False in a user namespace, where overlayfs keeps its marks in `user.` attributes and only
            directory trees can be layers.
        fsmount: mounts an image, see `Images`.
    """

    def __init__(
        self,
        threads: int = 2,
        *,
        privileged: bool = True,
        fsmount: Callable[[Copy, int], int] = image_mounts.plain,
    ) -> None:
        self.privileged = privileged
        self.images = image_mounts.Images(f"{PLACE}/images", fsmount)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._forbidden = {namespace_id("/proc/self/ns/mnt")}
        # In a user namespace we may not look at PID 1. Then we cannot enter its namespace either.
        with contextlib.suppress(PermissionError):
            self._forbidden.add(namespace_id("/proc/1/ns/mnt"))
        self._namespace = -1
        self._attended: dict[tuple[int, int], float] = {}
        self._attention = threading.Condition()
        self._leftovers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        for _ in range(threads):
            self._start_thread()
        self._forbidden.add(namespace_id(self._namespace))

    def close(self) -> None:
        """End the threads, and with them the mounts of their namespace. What a service shows stays."""
        threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _GRACE_SEC
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1

    def __enter__(self) -> MountWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stand(self) -> None:
        """From now on the calling thread, which is not a worker, may reconfigure what the workers have mounted.

        In a user namespace it has to be in the workers' mount namespace for that (fspick(2)): ours may be another
        user's. Paths lead where they did, as long as they do not lead below `PLACE`.
        """
        if self.privileged:
            return
        syscalls.unshare(syscalls.CLONE_FS)
        syscalls.setns(self._namespace, syscalls.CLONE_NEWNS)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> _Job[T]:
        """Run `function` on a worker."""
        job = _Job(lambda: function(*args, **kwargs))
        self._jobs.put(job)
        return job

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit()` for a trio task.

        Cancellation waits for a job that is under way: it takes a millisecond. A job that hangs (in a service on a dead
        network file system) keeps its thread; another thread takes its place, and the task goes on.

        Raises:
            Hung: the job did not end, or its turn did not come.
        """
        import trio  # who only looks has no tasks, and does not wait for it to load

        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        job = self.submit(function, *args, **kwargs)
        job.add_done_callback(lambda _: _wake(token, done))
        for seconds in self._patience(job):
            with trio.move_on_after(seconds):
                try:
                    await done.wait()
                except trio.Cancelled:
                    with trio.move_on_after(_GRACE_SEC, shield=True):
                        await done.wait()
                    if not done.is_set():
                        raise
        return job.result()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`run()` for a thread that may wait; not for a worker. Raises Hung: see there."""
        job = self.submit(function, *args, **kwargs)
        for seconds in self._patience(job):
            with contextlib.suppress(TimeoutError):
                job.exception(seconds)
        return job.result()

    def _patience(self, job: _Job[Any]) -> Iterator[float]:
        """Seconds to wait for a job, again and again until it is done. Raises Hung."""
        left = HANGS_SEC
        while left > 0:
            yield min(_BUSY_SEC, left)
            if job.done():
                return
            self._relieve(job)
            left -= _BUSY_SEC
        if job.cancel():
            raise Hung(f"all workers have been waiting for the kernel for {HANGS_SEC:g} s")
        if not job.done():
            raise Hung(f"no answer from the kernel for {HANGS_SEC:g} s")

    def _relieve(self, job: _Job[Any]) -> None:
        """Start a worker in place of the one that is at this job, which leaves when it has done it.

        The jobs that wait must not wait until a service that hangs is given up.
        """
        if job.thread in self._threads and not job.done():
            self._start_thread()
            self._threads.discard(job.thread)

    def check_foreign(self, identity: tuple[int, int]) -> None:
        """Refuse a namespace that is the host's or our own.

        Raises HostNamespace: nothing may be mounted there.
        """
        if identity in self._forbidden:
            raise HostNamespace("shares the host's mount namespace")

    @contextlib.contextmanager
    def entered(self, namespace: int) -> Iterator[None]:
        """Be in the mount namespace behind the descriptor; root and working directory are its root.

        In the block: system calls only. An import, a log line or a path of ours would resolve in the service's files.
        After it the working directory is the root of the workers' namespace.

        Raises:
            HostNamespace: before anything was entered, or the kernel shows another namespace than was asked for.
            WorkerLost: there was no way back.
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
        """Be the only worker that changes a namespace; another one waits for its turn.

        Raises Hung: a worker has been in that namespace for HANGS_SEC. We do not send one worker after another there.
        """
        identity = namespace_id(namespace)
        with self._attention:
            since = self._attended.get(identity)
            while identity in self._attended:
                assert since is not None
                left = since + HANGS_SEC - time.monotonic()
                if left <= 0:
                    raise Hung("a step in its mount namespace still does not end")
                self._attention.wait(left)
                since = self._attended.get(identity, since)
            self._attended[identity] = time.monotonic()
        try:
            yield
        finally:
            with self._attention:
                del self._attended[identity]
                self._attention.notify_all()

    def own_namespace(self) -> int:
        """A descriptor of the mount namespace that this worker is in."""
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)

    def open_mountinfo(self) -> int:
        """A descriptor of the mount table of the namespace that this worker is in, whatever /proc there shows.

        poll(2) gives POLLPRI when that table changes after this call (proc_pid_mounts(5)).
        """
        return os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Work in a fresh tmpfs. One unmount after the block takes away all that was mounted in it.

        That unmount waits for the kernel's other processors (27 to 700 us), so the worker does it after it has given
        the result. The working directory is the tmpfs when the block starts; entering a namespace changes that.
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
            os.chdir("/")  # a working directory in it would keep the tmpfs

    def _start_thread(self) -> None:
        ready: Future[None] = Future()
        threading.Thread(target=self._work, args=(ready,), name="confext-mounts", daemon=True).start()
        ready.result()

    def _work(self, ready: Future[None]) -> None:
        try:
            self._isolate()
        except BaseException as error:  # noqa: BLE001 -- raised again where the result is waited for
            ready.set_exception(error)
            return
        thread = threading.current_thread()
        self._threads.add(thread)
        ready.set_result(None)
        try:
            while thread in self._threads:  # else another has taken its place
                self._remove_leftovers()
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

    def _isolate(self) -> None:
        syscalls.unshare(syscalls.CLONE_FS)
        if self._namespace < 0:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            # Slave: what the host unmounts goes away here too, and we never keep it busy. Nothing of ours goes back.
            syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
            syscalls.mount("confext-watcher", PLACE, "tmpfs", 0, "mode=0700")
            syscalls.mount("none", PLACE, None, syscalls.MS_PRIVATE)
            os.mkdir(f"{PLACE}/images", 0o700)
            self._namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        else:
            syscalls.setns(self._namespace, syscalls.CLONE_NEWNS)
        # Not /proc/self, which is the leader of the thread group, in another namespace.
        _worker.task = os.open("/proc/thread-self", os.O_PATH | os.O_CLOEXEC)
        _worker.lost = False

    def _remove_leftovers(self) -> None:
        """Unmount what the swaps before have left: by path, so that any worker does it for one that was lost."""
        for _ in range(self._leftovers.qsize()):
            try:
                place = self._leftovers.get_nowait()
            except queue.Empty:
                return  # another worker has taken the rest
            try:
                _remove(place)
            except OSError as error:
                self._leftovers.put(place)
                journal.log.warning(f"mount workers: leftovers of a swap stay, it is tried again: {error}")

    def _replace(self) -> None:
        """Runs on a thread of its own: the lost worker may still be in a service's namespace."""
        try:
            self._start_thread()
        except OSError as error:
            journal.log.error(f"mount workers: none could be started in place of one that was lost: {error}")


def _wake(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    import trio

    # The program may have ended without waiting for a job that hangs.
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)


class _Job(Future[T]):
    """A function, and what comes of it; `thread` is the worker that has begun it."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__()
        self.thread: threading.Thread | None = None
        self._function = function

    def run(self, thread: threading.Thread) -> None:
        self.thread = thread
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001 -- raised again where the result is waited for
            self.set_exception(error)
        else:
            self.set_result(result)


class _Worker(threading.local):
    """Of one worker thread: a descriptor of its directory in /proc, and whether it failed to come back."""

    task: int
    lost: bool


_worker = _Worker()


def _remove(place: str) -> None:
    try:
        syscalls.umount2(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:  # unmounted already, and only the directory is left
            raise
    os.rmdir(place)
