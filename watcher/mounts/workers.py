# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mount workers: threads that can enter a service's mount namespace, and come back.

`setns(CLONE_NEWNS)` refuses a thread that shares its root and working directory with others. A worker calls
`unshare(CLONE_FS)` for that. From then on the namespace it is in is its own affair: the other threads of the program
are not affected, and no process has to be forked for a swap.

At home a worker is in the program's own namespace, and does any other work there, too. To mount something it goes to
the workers' namespace, which no process is in otherwise, and from there to a service's. In the workers' namespace lies
a small tmpfs:

    images/DIGEST       each image, mounted once for all services that use it
    N/                  the tmpfs of one swap, in which a stack is put together

The kernel removes all of it with the program, whatever kills that. Layers have to be attached somewhere: before Linux
6.15 overlayfs refuses layers from detached mounts, and nothing can be attached to a detached mount.

A job that hangs (in a service on a dead network file system) keeps its thread. The next job gets another one.
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
from typing import ParamSpec, TypeVar

from watcher.model import Copy
from watcher.mounts import image_mounts, syscalls
from watcher.mounts.process import Elsewhere, namespace_id
from watcher.mounts.whereabouts import Ours, Place, WorkerLost, come_back, go, here, is_root, name_it, root
from watcher.records import journal

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[[], None]

# Hidden by our tmpfs, in the private namespace only. /sys is on every machine, and no step of a swap needs it.
PLACE = "/sys"

THREAD = "confext-mounts"
"""What the threads are called, whatever they do just now."""

HANGS_SEC = 27.0
"""Seconds after which others do not wait any more for a step in a service's namespace, or for the first mount of an
image: before the job that waits counts as hanging (watch/offload.py)."""

_IDLE_SEC = 10.0  # a thread that has nothing to do for so long leaves, if there is another one
_GRACE_SEC = 0.4  # for a job that is under way when the program ends
_LEFTOVERS_MAX = 64  # so many wait until a worker has nothing else to do


class HostNamespace(Elsewhere):
    """The namespace is the host's (or our own), not the service's: nothing may be mounted in it."""


class Hung(Exception):
    """A step in a mount namespace does not end."""


class MountWorkers:
    """Worker threads, as many as have something to do, and their mount namespace.

    Args:
        privileged: False in a user namespace, where overlayfs keeps its marks in `user.` attributes and only
            directory trees can be layers.
        fsmount: mounts an image, see `Images`.

    Raises:
        OSError: there can be none here.
    """

    def __init__(
        self, *, privileged: bool = True, fsmount: Callable[[Copy, int], int] = image_mounts.plain
    ) -> None:
        self.privileged = privileged
        self.images = image_mounts.Images(f"{PLACE}/images", fsmount)
        self._numbers = itertools.count(1)
        self._forbidden = {namespace_id("/proc/self/ns/mnt")}
        # In a user namespace we may not look at PID 1. Then we cannot enter its namespace either.
        with contextlib.suppress(PermissionError):
            self._forbidden.add(namespace_id("/proc/1/ns/mnt"))
        self._home = self._namespace = Ours()
        self._attended: dict[tuple[int, int], float] = {}
        self._attention = threading.Condition()
        self._leftovers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        # Of each thread that has nothing to do: where it waits for that.
        self._idle: list[queue.SimpleQueue[Work | None]] = []
        self._idle.append(self._new_thread())
        self._forbidden.add(namespace_id(self._namespace.fd))

    def close(self) -> None:
        """End the threads, and with them the mounts of their namespace. What a service shows stays."""
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)
        deadline = time.monotonic() + _GRACE_SEC
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        for ours in {self._home, self._namespace}:
            ours.close()
        self._home = self._namespace = Ours()

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
        self._namespace.go()

    def start(self, work: Work) -> None:
        """Do some work on a worker, at home: one that has nothing to do, or a new one.

        Raises:
            OSError: no thread can be had.
        """
        if self._closed:
            raise OSError(errno.ECANCELED, "the workers have ended")
        try:
            waits = self._idle.pop()
        except IndexError:
            waits = self._new_thread()
        waits.put(work)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on a worker, in the workers' namespace. Raises as `start()`."""
        result: Future[T] = Future()

        def work() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                found = self.call(function, *args, **kwargs)
            except BaseException as error:  # noqa: BLE001 -- raised again where the result is waited for
                result.set_exception(error)
            else:
                result.set_result(found)

        self.start(work)
        return result

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the workers' namespace. On another thread it waits for a worker: see `submit()`.

        Raises:
            WorkerLost: there was no way home.
        """
        if here.lost:
            raise WorkerLost("it is not known where this worker is")
        if here.place is Place.ELSEWHERE:
            return self.submit(function, *args, **kwargs).result()
        if here.place is Place.WORKERS:
            return function(*args, **kwargs)
        come_back(self._namespace)
        here.place = Place.WORKERS
        try:
            if self._leftovers.qsize() > _LEFTOVERS_MAX:
                self._remove_leftovers()
            return function(*args, **kwargs)
        finally:
            if not here.lost:
                come_back(self._home)
                here.place = Place.HOME

    def call_apart(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call()` on a worker of its own, for what may never end: the kernel looks at an image for the first time.

        Raises:
            Hung: it does not end within HANGS_SEC.
        """
        job = self.submit(function, *args, **kwargs)
        try:
            return job.result(HANGS_SEC)
        except TimeoutError:
            if job.done():
                return job.result()
            raise Hung(f"no answer from the kernel for {HANGS_SEC:g} s") from None

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
        go(namespace)
        try:
            status = os.stat("ns/mnt", dir_fd=here.task)
            if (status.st_dev, status.st_ino) != wanted:
                raise HostNamespace("is not in the mount namespace that was entered")
            yield
        finally:
            come_back(self._namespace)

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
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=here.task)

    def open_mountinfo(self) -> int:
        """A descriptor of the mount table of the namespace that this worker is in, whatever /proc there shows.

        poll(2) gives POLLPRI when that table changes after this call (proc_pid_mounts(5)).
        """
        return os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=here.task)

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

    def _new_thread(self) -> queue.SimpleQueue[Work | None]:
        """Where a new thread waits for work."""
        waits: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        thread = threading.Thread(target=self._live, args=(waits, ready), name=THREAD, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "no thread can be started") from error
        ready.result()
        return waits

    def _live(self, waits: queue.SimpleQueue[Work | None], ready: Future[None]) -> None:
        try:
            self._stand_alone()
        except BaseException as error:  # noqa: BLE001 -- raised again where the result is waited for
            if here.task >= 0:
                os.close(here.task)
            ready.set_exception(error)
            return
        thread = threading.current_thread()
        self._threads.add(thread)
        ready.set_result(None)
        try:
            while (work := self._next(waits)) is not None:
                work()
                del work
                if not here.lost and self._leftovers.qsize():
                    with contextlib.suppress(WorkerLost):
                        self.call(self._remove_leftovers)
                if here.lost:
                    return
                self._idle.append(waits)
                if self._closed:
                    return
        finally:
            self._threads.discard(thread)
            os.close(here.task)

    def _next(self, waits: queue.SimpleQueue[Work | None]) -> Work | None:
        """What a thread does next; None: it leaves."""
        with contextlib.suppress(queue.Empty):
            return waits.get(timeout=_IDLE_SEC)
        if len(self._idle) > 1:
            with contextlib.suppress(ValueError):  # something has just come for it
                self._idle.remove(waits)
                return None
        return waits.get()

    def _stand_alone(self) -> None:
        syscalls.unshare(syscalls.CLONE_FS)
        if self._namespace.fd >= 0:
            self._home.go()  # who has asked for this thread may be somewhere else
        # Not /proc/self, which is the leader of the thread group, in another namespace.
        here.task = os.open("/proc/thread-self", os.O_PATH | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # for who looks at the threads: ps -L, top -H
            name_it(THREAD)
        if self._namespace.fd < 0:
            self._make_namespace()
        here.place = Place.HOME

    def _make_namespace(self) -> None:
        home = Ours(self.own_namespace(), root())
        syscalls.unshare(syscalls.CLONE_NEWNS)
        # Slave: what the host unmounts goes away here too, and we never keep it busy. Nothing of ours goes back.
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
        syscalls.mount("confext-watcher", PLACE, "tmpfs", 0, "mode=0700")
        syscalls.mount("none", PLACE, None, syscalls.MS_PRIVATE)
        os.mkdir(f"{PLACE}/images", 0o700)
        self._namespace = Ours(self.own_namespace(), root())
        try:
            go(home.fd)
        except PermissionError:  # another user's, so all workers stay here
            home.close()
            self._home = self._namespace
            return
        if is_root(home.root):
            self._home, self._namespace = home.without_root(), self._namespace.without_root()
        else:  # chroot(2)
            self._home = home
            home.go()

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


def _remove(place: str) -> None:
    try:
        syscalls.umount2(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:  # unmounted already, and only the directory is left
            raise
    os.rmdir(place)
