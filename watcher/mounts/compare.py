# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does a service show a stack already, although its mount table does not say so?

A stack that systemd mounted when it started the service carries no identity. What it shows is compared with what the
wanted stack would show, name by name and byte by byte: if all is the same the service is taken over as it is, without
a swap and without a reload.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping

from watcher.model import Copy, Stack
from watcher.mounts.swap import build
from watcher.mounts.workshop import Workshop

_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Hostile or special files: never wait for one, never follow one.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def shows(shop: Workshop, namespace: int, stack: Stack, copies: Mapping[str, Copy]) -> bool:
    """Whether `/etc` in a mount namespace (a descriptor) is what a stack would make it. Runs on a worker.

    Types, modes, owners, link targets and contents count; times and extended attributes do not.

    Raises:
        Whatever `swap()` does.
    """
    with build(shop, namespace, stack, copies) as tree:
        with shop.entered(namespace):
            shown = os.open("/etc", _DIRECTORY)
        try:
            wanted = os.open(".", _DIRECTORY, dir_fd=tree)
            try:
                return _same_directory(shown, wanted)
            except FileNotFoundError:  # somebody edits it right now
                return False
            finally:
                os.close(wanted)
        finally:
            os.close(shown)


def _same_directory(one: int, other: int) -> bool:
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and all(_same(one, other, name) for name in names)


def _same(one: int, other: int, name: str) -> bool:
    first = os.stat(name, dir_fd=one, follow_symlinks=False)
    second = os.stat(name, dir_fd=other, follow_symlinks=False)
    if _visible(first) != _visible(second):
        return False
    if stat.S_ISLNK(first.st_mode):
        return os.readlink(name, dir_fd=one) == os.readlink(name, dir_fd=other)
    if stat.S_ISDIR(first.st_mode):
        return _with_both(one, other, name, _DIRECTORY, _same_directory)
    if stat.S_ISREG(first.st_mode):
        same_file = (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
        return same_file or _with_both(one, other, name, _FILE, _same_content)
    return True


def _visible(status: os.stat_result) -> tuple[int, ...]:
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, size)


def _with_both(one: int, other: int, name: str, flags: int, same: Callable[[int, int], bool]) -> bool:
    first = os.open(name, flags, dir_fd=one)
    try:
        second = os.open(name, flags, dir_fd=other)
        try:
            return same(first, second)
        finally:
            os.close(second)
    finally:
        os.close(first)


def _same_content(one: int, other: int) -> bool:
    while True:
        first, second = os.read(one, _CHUNK), os.read(other, _CHUNK)
        if first != second:
            return False
        if not first:
            return True
