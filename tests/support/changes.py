# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a path shows, and all that can change it, for tests that change it at random.

A change is a function of two paths. The second one is where something is moved to or linked to; not all need it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from watcher.model import Interest, Scope

AT_FDCWD = -100
RENAME_EXCHANGE = 2
MS_BIND = 4096
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
LIBC = ctypes.CDLL(None, use_errno=True)


# What there is to see


def shows(interest: Interest) -> object:
    """What the interest's path shows to somebody who looks: entries with all that can matter about them."""
    try:
        names = os.listdir(interest.path)
        top = os.stat(interest.path).st_mode if interest.scope is Scope.TREE else None
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return top, {
        name: _entry(f"{interest.path}/{name}", interest) for name in names if _matters(name, interest)
    }


def _matters(name: str, interest: Interest) -> bool:
    return interest.pattern is None or name in interest.pattern.split("|")


def _entry(path: str, interest: Interest) -> object:
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            return found.st_ino, os.readlink(path)
        if stat.S_ISREG(found.st_mode):
            return found.st_ino, found.st_mode, found.st_mtime_ns, found.st_size
        if interest.scope is Scope.TREE:
            return shows(Interest(path, Scope.TREE))
        return found.st_dev, found.st_ino, found.st_mode
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# What can happen to it


def write(path: str, _: str) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def replace(path: str, _: str) -> None:
    write(f"{path}~", "")
    os.rename(f"{path}~", path)


def move(path: str, other: str) -> None:
    os.rename(path, other)


def exchange(path: str, other: str) -> None:
    _libc(LIBC.renameat2(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE), path)


def link(path: str, other: str) -> None:
    os.symlink(os.path.relpath(other, os.path.dirname(path)), path)


def link_by_way_of_the_parent(path: str, other: str) -> None:
    os.symlink(f"{other}/../{os.path.basename(path)}", path)


def retarget(path: str, other: str) -> None:
    link(f"{path}~", other)
    os.rename(f"{path}~", path)


def remove(path: str, _: str) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def make(path: str, _: str) -> None:
    os.mkdir(path)


def deep(path: str, _: str) -> None:
    os.makedirs(path)


def make_deep(path: str, _: str) -> None:
    os.makedirs(f"{path}/a/b/c")
    write(f"{path}/a/b/c/a", "")


def hide(path: str, _: str) -> None:
    os.chmod(path, 0)


def bind(path: str, other: str) -> None:
    _libc(LIBC.mount(os.fsencode(other), os.fsencode(path), None, MS_BIND, None), path)


def mount_empty(path: str, _: str) -> None:
    _libc(LIBC.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=1M"), path)


def unmount(path: str, _: str) -> None:
    _libc(LIBC.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW), path)


def _libc(result: int, path: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), path)


def block(path: str, _: str) -> None:
    os.chmod(path, 0o600)


def reveal(path: str, _: str) -> None:
    os.chmod(path, 0o755)


CHANGES = [write, replace, move, exchange, link, link_by_way_of_the_parent, retarget, remove, make, make_deep]
MODES = [hide, block, reveal]
MOUNTS = [bind, mount_empty, unmount]

Step = tuple[Callable[[str, str], None], str, str]


def apply(step: Step, root: str) -> None:
    change, path, other = step
    try:
        change(f"{root}/{path}", f"{root}/{other}")
    except (OSError, shutil.Error):
        pass  # what cannot happen does not


def interests(root: str) -> dict[str, Interest]:
    return {
        "near": Interest(f"{root}/a"),
        "far": Interest(f"{root}/a/b/c"),
        "picky": Interest(f"{root}/b/a", pattern="a|c"),
        "tree": Interest(f"{root}/b", Scope.TREE),
        "tree within": Interest(f"{root}/b/b", Scope.TREE),
        "back": Interest(f"{root}/c/../a/c"),
    }


@contextmanager
def world() -> Iterator[str]:
    """An empty directory."""
    root = tempfile.mkdtemp(prefix="watch-")
    try:
        yield root
    finally:
        while (mounted := _mounted(root)) is not None:
            unmount(mounted, "")
        for directory, _, _ in os.walk(root):  # top down: made readable before it is entered
            for name in os.listdir(directory):
                if not os.path.islink(f"{directory}/{name}"):
                    os.chmod(f"{directory}/{name}", 0o700)
        shutil.rmtree(root)


def _mounted(root: str) -> str | None:
    rows = Path("/proc/self/mountinfo").read_text().splitlines()
    return next((row.split()[4] for row in reversed(rows) if row.split()[4].startswith(f"{root}/")), None)
