# SPDX-License-Identifier: LGPL-2.1-or-later
"""The workshop: a private mount namespace, and the threads that may leave it to enter a service's.

`setns(CLONE_NEWNS)` refuses a caller that shares its root and working directory with others. A thread that has once
called `unshare(CLONE_FS)` shares them with nobody, and from then on its mount namespace is its own: the other threads
of the program are not affected, and no process has to be forked for a swap.

All threads of a `Workshop` share one mount namespace that nobody else sees. In it lies a small tmpfs:

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import trio

from watcher.model import Copy, Kind, Refused
from watcher.mounts import syscalls
from watcher.process import namespace_id

P = ParamSpec("P")
T = TypeVar("T")

# Mounted over in the workshop's own namespace only. /sys is on every machine, and no step of a swap needs it.
PLACE = "/sys"

_IMAGE_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
)

# Seconds: after which a job counts as hanging; and how long one that is under way may still take when we are to end.
_HANGS_SEC = 30
_GRACE_SEC = 0.7

# How file systems say that what they were given is not well-formed, or uses what this kernel does not know.
_BROKEN_IMAGE = {
    errno.EINVAL,
    errno.EIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.EOPNOTSUPP,
    errno.ENOENT,
    errno.E2BIG,
}


class HostNamespace(Exception):
    """The namespace is the host's (or our own), not the service's: nothing may be mounted in it."""


class Lost(Exception):
    """A worker could not come back from a service's namespace; it ends, and another takes its place."""


class Hung(Exception):
    """A job does not end."""


class Workshop:
    """Worker threads in a private mount namespace.

    Args:
        threads: how many; two already overlap one swap's waiting for the kernel with another's work.
        privileged: False in a user namespace, where overlayfs keeps its marks in `user.` attributes and only
            directory trees can be layers.
    """

    def __init__(self, threads: int = 2, *, privileged: bool = True) -> None:
        self.privileged = privileged
        self.images = _Images()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._forbidden = {namespace_id("/proc/self/ns/mnt")}
        # Without the right to look at PID 1 (a user namespace) its namespace cannot be entered by us either.
        with contextlib.suppress(PermissionError):
            self._forbidden.add(namespace_id("/proc/1/ns/mnt"))
        self._namespace = -1
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start_thread()
        self._forbidden.add(namespace_id(self._namespace))

    def close(self) -> None:
        """End the threads and with them the workshop's mounts; what a service shows stays."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `function` on a worker that stands in the workshop; what it defers runs after the result is out."""
        future: Future[T] = Future()
        self._jobs.put(_Job(future, lambda: function(*args, **kwargs)))
        return future

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit()` for a trio task.

        A job is not given up by cancellation, it takes a millisecond; one that hangs (a service whose base is a dead
        network file system) keeps its thread, another takes its place, and the task goes on.

        Raises:
            Hung: it did not end.
        """
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        future = self.submit(function, *args, **kwargs)
        future.add_done_callback(lambda _: _wake(token, done))
        with trio.move_on_after(_HANGS_SEC):
            try:
                await done.wait()
            except trio.Cancelled:
                with trio.move_on_after(_GRACE_SEC, shield=True):
                    await done.wait()
                if not done.is_set():
                    raise
        if not done.is_set():
            self._start_thread()
            raise Hung(f"no answer from the kernel for {_HANGS_SEC} s")
        return future.result()

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

        Raises:
            HostNamespace: before anything was entered, or when the kernel shows another namespace than was asked for.
            Lost: there was no way back.
        """
        wanted = namespace_id(namespace)
        self.check_foreign(wanted)
        task = _worker.task
        here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            status = os.stat("ns/mnt", dir_fd=task)
            if (status.st_dev, status.st_ino) != wanted:
                raise HostNamespace("is not in the mount namespace that was entered")
            yield
        finally:
            try:
                syscalls.setns(self._namespace, syscalls.CLONE_NEWNS)
                os.fchdir(here)
            except OSError as error:
                _worker.lost = True
                raise Lost(f"no way back from a service's mount namespace: {error}") from error
            finally:
                os.close(here)

    def own_namespace(self) -> int:
        """A descriptor of the mount namespace in which this worker stands."""
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)

    def mountinfo(self) -> str:
        """The mount table of where this worker stands, whatever /proc there shows."""
        fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=_worker.task)
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    @contextlib.contextmanager
    def bench(self) -> Iterator[None]:
        """Work in a fresh tmpfs of one's own; all that was mounted below it is lifted off afterwards, by one call.

        That call waits for the kernel's other processors (27 to 700 us), so it is left for after the result.
        """
        name = str(next(self._numbers))
        os.mkdir(name, 0o700)
        try:
            syscalls.mount("confext-watcher", name, "tmpfs", 0, "mode=0755")
            _worker.deferred.append(lambda: _clear(name))
        except BaseException:
            os.rmdir(name)
            raise
        os.chdir(name)
        try:
            yield
        finally:
            os.chdir(PLACE)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="confext-mounts", daemon=True)
        thread.start()
        failure = self._ready.get()
        if failure is not None:
            raise failure
        self._threads.append(thread)

    def _work(self) -> None:
        try:
            self._settle_in()
        except BaseException as error:  # noqa: BLE001 -- raised again by the thread that waits for this one
            self._ready.put(error)
            return
        self._ready.put(None)
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job
            if _worker.lost:
                threading.Thread(target=self._replace, daemon=True).start()
                return
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
        _worker.deferred = []
        os.chdir(PLACE)

    def _do(self, job: _Job) -> None:
        try:
            result = job.function()
        except BaseException as error:  # noqa: BLE001 -- raised again where the future is waited for
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        while _worker.deferred:
            _worker.deferred.pop()()

    def _replace(self) -> None:
        self._start_thread()


def _wake(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    with contextlib.suppress(trio.RunFinishedError):  # the daemon has ended without waiting for a job that hangs
        token.run_sync_soon(done.set)


class _Job:
    __slots__ = ("function", "future")

    def __init__(self, future: Future[Any], function: Callable[[], Any]) -> None:
        self.future = future
        self.function = function


class _Worker(threading.local):
    """What one worker thread holds: its own directory in /proc, what is left to do, whether it found back."""

    task: int
    lost: bool
    deferred: list[Callable[[], None]]


_worker = _Worker()


def _clear(name: str) -> None:
    syscalls.umount2(name, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    os.rmdir(name)


class _Images:
    """Images mounted in the workshop: each digest once, for as long as somebody wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}

    @contextlib.contextmanager
    def attached(self, copies: Iterable[Copy]) -> Iterator[dict[str, str]]:
        """Have the copies mounted while the block runs: absolute paths of their roots, by digest.

        Raises:
            Refused: the kernel will not mount it.
            OSError: no loop device, no memory.
        """
        with contextlib.ExitStack() as stack:
            yield {copy.digest: stack.enter_context(self._attached(copy)) for copy in copies}

    def retain(self, digests: Iterable[str]) -> None:
        """Unmount every image that is neither in use nor among these."""
        kept = set(digests)
        with self._lock:
            for digest in [one for one, users in self._users.items() if not users and one not in kept]:
                _unmount_image(digest)
                del self._users[digest]

    @contextlib.contextmanager
    def _attached(self, copy: Copy) -> Iterator[str]:
        if copy.kind is Kind.DIRECTORY:
            yield copy.path
            return
        with self._lock:
            if copy.digest not in self._users:
                _mount_image(copy)
                self._users[copy.digest] = 0
            self._users[copy.digest] += 1
        try:
            yield f"{PLACE}/images/{copy.digest}"
        finally:
            with self._lock:
                self._users[copy.digest] -= 1


def _mount_image(copy: Copy) -> None:
    backing = os.open(copy.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mounted = _fsmount_image(copy, backing)
    finally:
        os.close(backing)
    try:
        target = f"{PLACE}/images/{copy.digest}"
        os.makedirs(target, 0o700, exist_ok=True)
        syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mounted)


def _fsmount_image(copy: Copy, backing: int) -> int:
    if copy.fstype == "erofs":
        # Since Linux 6.12 straight from the file, but not on every file system (ENOTBLK); what is wrong with the
        # image itself shows again, and is told, when it is tried through a loop device.
        with contextlib.suppress(OSError):
            return _fsmount_source(copy.fstype, copy.path)
    device, name = syscalls.loop_attach(backing, copy.digest)
    try:
        return _fsmount_source(copy.fstype, name)
    except OSError as error:
        if error.errno in _BROKEN_IMAGE:
            raise Refused(f"the kernel cannot mount it as {copy.fstype}: {error.strerror}") from error
        raise
    finally:
        os.close(device)


def _fsmount_source(fstype: str, source: str) -> int:
    context = syscalls.fsopen(fstype)
    try:
        syscalls.fsconfig_set_string(context, "source", source)
        syscalls.fsconfig_set_flag(context, "ro")
        syscalls.fsconfig_cmd_create(context, source)
        return syscalls.fsmount(context, _IMAGE_ATTRIBUTES)
    finally:
        os.close(context)


def _unmount_image(digest: str) -> None:
    target = f"{PLACE}/images/{digest}"
    syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    os.rmdir(target)
