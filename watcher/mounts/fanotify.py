# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who opens a file, and who closes it after writing: fanotify(7), as far as this program needs it.

inotify names no process, and makes one event of equal ones in a row. fanotify merges only events of one process on one
file. We take file handles in place of descriptors (FAN_REPORT_FID): for a descriptor the kernel would open the file for
us, and wait where a file system does not answer. Python has none of this, and no library for it is well kept.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

CLOSE_WRITE = 0x8
CLOSE_NOWRITE = 0x10
OPEN = 0x20
Q_OVERFLOW = 0x4000
_EVENT_ON_CHILD = 0x08000000

_CLOEXEC, _NONBLOCK = 0x1, 0x2
_REPORT_FID, _REPORT_DFID_NAME = 0x200, 0xC00
_MARK_ADD, _MARK_ONLYDIR = 0x1, 0x8
_INFO_TYPE_FID, _INFO_TYPE_DFID_NAME = 1, 2

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
# From Linux 6.5: also of a file system that cannot open by handle, as an overlay.
_AT_HANDLE_FID = 0x200
_HANDLE_MAX = 128

_READ_MAX = 1 << 16

# struct fanotify_event_metadata, fanotify_event_info_header with its fsid, and the head of struct file_handle.
_metadata = struct.Struct("=IBBHQii")
_info = struct.Struct("=BBHii")
_handle = struct.Struct("=Ii")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
_libc.fanotify_mark.argtypes = [
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_char_p,
]
_libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]

Handle = tuple[int, bytes]
"""What a file system calls a file, until it is deleted: no other file has it later, as with an inode number alone."""


Place = tuple[Handle, str]


class Event(NamedTuple):
    """What one process did to one file.

    Attributes:
        mask: OPEN and CLOSE_WRITE, both if it is not known which was first; Q_OVERFLOW: events were lost.
        pid: of the process; 0 where our PID namespace does not have it.
        handle: of the file; None if the kernel has told of none.
        place: its directory, and the name in it by which it was opened.
    """

    mask: int
    pid: int
    handle: Handle | None = None
    place: Place | None = None


def init() -> int:
    """A new group, which never blocks. Raises OSError: EPERM without CAP_SYS_ADMIN, EMFILE."""
    flags = _CLOEXEC | _NONBLOCK | _REPORT_FID | _REPORT_DFID_NAME
    return _check(_libc.fanotify_init(flags, os.O_CLOEXEC), "fanotify_init")


def mark(group: int, directory: str) -> None:
    """Tell of files in a directory from now on. Once more is no error.

    Raises:
        OSError: ENODEV, EOPNOTSUPP, EXDEV: its file system has no lasting handles (FUSE, NFS); ENOENT, ENOTDIR.
    """
    flags, mask = _MARK_ADD | _MARK_ONLYDIR, OPEN | CLOSE_WRITE | CLOSE_NOWRITE | _EVENT_ON_CHILD
    _check(_libc.fanotify_mark(group, flags, mask, _AT_FDCWD, os.fsencode(directory)), directory)


def read(group: int) -> Iterator[Event]:
    """All events that are there, in the order in which the first of each began."""
    while True:
        try:
            content = os.read(group, _READ_MAX)
        except BlockingIOError:
            return
        at = 0
        while at < len(content):
            length, _, _, head, mask, _, pid = _metadata.unpack_from(content, at)
            yield _told(Event(mask, pid), content[at + head : at + length])
            at += length


def _told(event: Event, infos: bytes) -> Event:
    """With what the records after its head say."""
    begin = _info.size + _handle.size
    while infos:
        kind, _, length, _, _ = _info.unpack_from(infos)
        size, type_ = _handle.unpack_from(infos, _info.size)
        if kind == _INFO_TYPE_FID:
            event = event._replace(handle=(type_, infos[begin : begin + size]))
        elif kind == _INFO_TYPE_DFID_NAME:
            name = os.fsdecode(infos[begin + size : length].partition(b"\0")[0])
            event = event._replace(place=((type_, infos[begin : begin + size]), name))
        infos = infos[length:]
    return event


def name_to_handle_at(fd: int) -> Handle:
    """The handle of an open file. Raises OSError: its file system has none."""
    buffer = ctypes.create_string_buffer(_handle.pack(_HANDLE_MAX, 0), _handle.size + _HANDLE_MAX)
    mount = ctypes.c_int()
    flags = _AT_EMPTY_PATH | _AT_HANDLE_FID
    _check(_libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), flags), fd)
    size, type_ = _handle.unpack_from(buffer.raw)
    return type_, buffer.raw[_handle.size : _handle.size + size]


def _check(result: int, what: str | int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(what))
    return result
