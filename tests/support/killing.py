# SPDX-License-Identifier: LGPL-2.1-or-later
"""A function in a process of its own that is killed before the N-th of its system calls that change something.

By ptrace(2). strace's `inject=...:signal=KILL` can do it, too, but takes a new interpreter for each call; and with
`--seccomp-bpf`, which would make that bearable, it sends no signal (6.1).
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

_PTRACE_TRACEME = 0
_PTRACE_SYSCALL = 24
_PTRACE_SETOPTIONS = 0x4200
_PTRACE_GET_SYSCALL_INFO = 0x420E
_PTRACE_O_TRACESYSGOOD = 0x1
_PTRACE_O_EXITKILL = 0x100000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1
# Calls that only look. A kill before one leaves what a kill before the next call leaves. Not complete, nor needs to be.
_LOOKS = {
    # read close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask ioctl pread64 getpid fcntl readlink
    # getdents64 futex newfstatat readlinkat statx
    "x86_64": {0, 3, 5, 8, 9, 10, 11, 12, 13, 14, 16, 17, 39, 72, 89, 217, 202, 262, 267, 332},
    "aarch64": {63, 57, 80, 62, 222, 226, 215, 214, 134, 135, 29, 67, 172, 25, 61, 98, 79, 78, 291},
}.get(os.uname().machine, set())


class _SyscallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, as far as it is needed."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def killed_before(number: int, function: Callable[[], object]) -> bool:
    """Run the function, which starts no thread and no process, and kill it before its call of that number, from 1.

    Returns:
        False: it came to its end before.

    Raises:
        AssertionError: it raised something, which is on standard error.
    """
    pid = os.fork()
    if pid == 0:
        _traced(function)
    status = os.waitpid(pid, 0)[1]
    try:
        _ptrace(_PTRACE_SETOPTIONS, pid, 0, _PTRACE_O_TRACESYSGOOD | _PTRACE_O_EXITKILL)
        while number:
            _ptrace(_PTRACE_SYSCALL, pid)
            status = os.waitpid(pid, 0)[1]
            if not os.WIFSTOPPED(status):
                break
            assert os.WSTOPSIG(status) == _SYSCALL_STOP, status
            number -= _changes_something(pid)
    finally:
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert not number or status == 0, f"the function failed: {status}"
    return not number


def _changes_something(pid: int) -> bool:
    """Whether it is about to make a call that may change something."""
    info = _SyscallInfo()
    _ptrace(_PTRACE_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
    return info.op == _ENTRY and info.number not in _LOOKS


def _traced(function: Callable[[], object]) -> None:
    try:
        _ptrace(_PTRACE_TRACEME)
        os.kill(os.getpid(), signal.SIGSTOP)
        function()
        os._exit(0)
    except BaseException:  # noqa: BLE001 -- the process ends here, whatever it was
        traceback.print_exc()
        os._exit(1)


def _ptrace(request: int, pid: int = 0, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
