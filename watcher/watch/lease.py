# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read leases: the kernel says that no process is writing to a file, and that none has begun to.

`F_SETLEASE` with `F_RDLCK` (fcntl(2), "Leases") succeeds only while no process has the file open for writing or mapped
writable. While we hold the lease, a process that opens the file for writing or truncates it waits until we give the
lease back (at most /proc/sys/fs/lease-break-time, 45 s). So we look between chunks, and give way at once.

The kernel announces such a writer to the holder by SIGIO, which by default kills it. A handler would do, but a process
can lose its handlers (exec, a library, a start-up not yet finished). So we change the signal to SIGURG before we take
the lease. Its default action is to be ignored, and an ignored signal is dropped without waking anything. Nothing is
lost by that: `held()` asks the kernel itself.

File systems without leases (NFS, FUSE, 9p), and files of other users where CAP_LEASE is missing (a user namespace),
cannot say so much. There the lease is not `exact`: size, mtime and ctime must stay the same, and the quiet time before
keeps half-written files out. The same goes for an image that systemd has mounted itself for a service. systemd opens
it for reading and writing for as long as it is mounted, though file systems of images are never written to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time

from watcher.model import Busy
from watcher.mounts import syscalls

# The clock that file systems take their timestamps from, before 6.13 always, since then at least as a lower bound.
CLOCK_REALTIME_COARSE = 5

# fcntl(2): EINVAL from file systems without leases and for what is no regular file; EACCES without CAP_LEASE.
_NO_LEASE = frozenset({errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS})


def coarse_now_ns() -> int:
    """Nanoseconds since the epoch as the next timestamp on a file would be: any later one is not smaller."""
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE)


class Lease:
    """A read lease on a descriptor open for reading only, as a context manager.

    Attributes:
        exact: the kernel vouches for it; False where only size and times are compared.
        proven_ns: `coarse_now_ns()` of the last `check()` that found the lease held. If the ctime of a file is older,
            any later change of it shows in its ctime.

    Raises:
        Busy: on entry, when a process has the file open for writing.
    """

    def __init__(self, fd: int) -> None:
        self.exact = False
        self.proven_ns = 0
        self._fd = fd
        self._open = False
        self._before = (0, 0, 0)

    def __enter__(self) -> Lease:
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            self.exact = True
        except OSError as error:
            if error.errno == errno.EAGAIN and not _is_in_a_loop_device(self._fd):
                raise Busy("open for writing") from error
            if error.errno not in (*_NO_LEASE, errno.EAGAIN):
                raise
        self._open = True
        self._before = self._signature()
        return self

    def held(self) -> bool:
        """True while the file has not changed since entry, so that what was read of it is consistent."""
        if not self._open:
            return False
        if self.exact and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            return False
        return self.exact or self._signature() == self._before

    def check(self) -> None:
        """Raise Busy unless `held()`; note the time otherwise."""
        if not self.held():
            raise Busy("opened for writing while it was read")
        self.proven_ns = coarse_now_ns()

    def release(self) -> None:
        """Give way to writers. May be called twice."""
        if not self._open:
            return
        self._open = False
        if not self.exact:
            return
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # the kernel has taken it back, after 45 s
                raise

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _signature(self) -> tuple[int, int, int]:
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_in_a_loop_device(fd: int) -> bool:
    """Whether a file is behind a loop device. Whose that is, and whether read-only, makes no difference."""
    try:
        names = os.listdir("/sys/block")
    except FileNotFoundError:
        return False
    file = os.fstat(fd)
    for name in names:
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop"):
            continue
        try:
            device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # we may not look at it, or it is gone: then it does not count
        try:
            if syscalls.loop_backing(device) == (file.st_dev, file.st_ino):
                return True
        except OSError:
            continue
        finally:
            os.close(device)
    return False
