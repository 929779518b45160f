# SPDX-License-Identifier: LGPL-2.1-or-later
"""A new ext4 for each part of the bench: users have ext4, and what one part deletes would make the next one slower.

They are made one after the other in one file, by way of a loop device. The file is written out first: otherwise the
host's file system would allocate blocks while something is measured. It has no name, and the kernel frees the device
with its last user: nothing of them is left, whatever the bench dies of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.needs import which
from watcher.mounts import syscalls

from .report import Failed

SIZE = 2 << 30
"""Bytes: a thousand images of 1 MiB, if nobody tidies up meanwhile, and their copies."""
SECONDS = 30.0

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_NONE_LATER = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
"""mke2fs(8): nothing is left for the kernel to do after it is mounted."""


@contextlib.contextmanager
def mounted(where: Path) -> Iterator[None]:
    """A new ext4 on an existing directory.

    Raises:
        Failed: there is none to be had, or it is still in use at the end.
    """
    with device() as path:
        syscalls.mount(path, str(where), "ext4", 0)
        try:
            yield
        finally:
            syscalls.umount2(str(where), syscalls.MNT_DETACH)


@contextlib.contextmanager
def device() -> Iterator[str]:
    """A block device with a new ext4 on it, for whoever mounts it. It waits for its unmount.

    Raises:
        Failed: there is none to be had, or it is still in use at the end.
    """
    try:
        fd, number = _attach(_file())
    except OSError as error:
        raise Failed(f"no file system to measure on: {error}") from None
    try:
        path = f"/dev/loop{number}"
        mkfs = which("mkfs.ext4")
        assert mkfs is not None
        subprocess.run([mkfs, "-q", "-E", _NONE_LATER, path], check=True, stdin=subprocess.DEVNULL)
        yield path
    finally:
        os.close(fd)
        _wait_until_gone(number)


def describe() -> str:
    """What is measured on, "ext4 in a file on xfs"."""
    command = ["findmnt", "--noheadings", "--output=FSTYPE", "--target", _directory()]
    below = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    return f"ext4 in a file on {below or 'an unknown file system'}"


def _directory() -> str:
    # As file-hierarchy(7) has it: /tmp is in memory on many hosts.
    return os.environ.get("TMPDIR", "/var/tmp")


@functools.cache
def _file() -> int:
    """Descriptor of the file, which is there until we end."""
    fd, path = tempfile.mkstemp(prefix="confext-bench-", dir=_directory())
    os.unlink(path)
    nothing = bytes(1 << 20)
    for _ in range(SIZE // len(nothing)):
        os.write(fd, nothing)
    os.fsync(fd)
    return fd


def _attach(backing: int) -> tuple[int, int]:
    """A loop device over a file, past its page cache; a descriptor of it, and its number."""
    # struct loop_config; see loop_attach() in watcher/mounts/syscalls.py, which attaches for reading only.
    flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
    config = struct.pack("=II52xI64s112x64x", backing, 0, flags, b"confext-bench")
    with open("/dev/loop-control", "rb", buffering=0) as control:
        while True:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # else another process was faster
                    raise
            else:
                return fd, number


def _wait_until_gone(number: int) -> None:
    """The device has been unmounted everywhere: a service's namespace may end a moment after the service."""
    ours = os.readlink(f"/proc/self/fd/{_file()}")
    deadline = time.monotonic() + SECONDS
    while _backing_file(number) == ours:
        if time.monotonic() > deadline:
            raise Failed(f"/dev/loop{number} is still in use")
        time.sleep(0.02)  # nothing announces it


def _backing_file(number: int) -> str:
    try:
        return Path(f"/sys/block/loop{number}/loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return ""
