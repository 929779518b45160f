# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether paths of others answer, for a program without threads that is about to be replaced by execve(2)."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
from collections.abc import Callable


def comes_back(look: Callable[[], object], seconds: float) -> bool:
    """Whether a function that follows paths of others ends, well or not. For a program without threads.

    A file system can keep a thread in the kernel so that nothing can kill it, and execve(2) waits for all threads of
    its process. So a grandchild tries it, and the program that we execute later has no child to wait for. The
    grandchild holds nothing of ours open, and ends as soon as the kernel lets it.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            _try(look, writing, math.ceil(seconds))
        os.close(writing)
        os.waitpid(child, 0)
        return bool(select.select([reading], [], [], seconds)[0])
    finally:
        os.close(reading)


def _try(look: Callable[[], object], writing: int, seconds: int) -> None:
    try:
        if os.fork() == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.alarm(seconds)
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(writing, 3 + (kept := max(null, writing)))
            for fd in range(3):
                os.dup2(null, fd)
            os.closerange(3, 3 + kept)
            os.closerange(4 + kept, os.sysconf("SC_OPEN_MAX"))
            os.chdir("/")
            with contextlib.suppress(Exception):
                look()
    finally:
        os._exit(0)  # which closes the last end of the pipe
