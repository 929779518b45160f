# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that records are in: read, written, set aside. `stacks.py` says where they lie, and has the locks."""

from __future__ import annotations

import errno
import os
import time
from typing import NamedTuple

from watcher.model import shown
from watcher.records import durable
from watcher.records.state import Damaged, State, decoded, encoded
from watcher.records.together import Gathering, Together

# No slot has that name: scan.py ignores hidden entries.
RECORD = ".state.json"
EMPTY = "empty"
"""In the place of a stack's identity."""

DAMAGE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENXIO,
        errno.EIO,
        errno.EUCLEAN,
        errno.EBADMSG,
    }
)
"""Errors that say what is on the disk. With any other the next attempt may read it."""

# Bytes of a unit's name in the name of a record that is set aside.
_NAME_MAX = 180

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class _Key(NamedTuple):
    """What identifies the content of a record: each is written as a new file."""

    device: int
    inode: int
    mtime_ns: int
    size: int


class RecordFiles:
    """Records by the path of the stack that they lie in; what was read once is read again only if it has changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[_Key, State]] = {}

    def read(self, stack: str) -> State:
        """The record of a stack, which costs one system call if it is known.

        Args:
            stack: path of its directory, "NUMBER-IDENTITY" at the end.

        Raises:
            Damaged: it cannot be read, or is that of another stack.
            OSError: not now.
        """
        path = f"{stack}/{RECORD}"
        try:
            known = self._known.get(stack)
            if known and known[0] == _key(os.stat(path)):
                return known[1]
            with open(os.open(path, _READ), "rb") as file:
                key = _key(os.fstat(file.fileno()))
                content = file.read()
        except OSError as error:
            if error.errno not in DAMAGE:
                raise
            raise Damaged(f"{shown(path)}: the record cannot be read: {error.strerror}") from error
        state = decoded(content, path)
        if identity(state) != os.path.basename(stack).partition("-")[2]:
            raise Damaged(f"{shown(path)}: the record is that of another stack")
        self._known[stack] = key, state
        return state

    def replacing(self, stack: str, state: State, directory: int, temporary: str) -> Gathering[None]:
        """Put another record in the place of the one of a stack. On the disk when it returns. Raises OSError.

        Args:
            directory: descriptor of the directory above the stack, locked.
            temporary: a name in there.
        """
        path = f"{stack}/{RECORD}"
        key = create(temporary, state, directory)
        yield Together(durable.fsync_all, (f"{os.path.dirname(stack)}/{temporary}",))
        os.rename(temporary, path, src_dir_fd=directory)
        self._known[stack] = key, state
        yield Together(durable.fsync_all, (stack,))

    def create(self, stack: str, state: State, directory: int) -> None:
        """Write the first record of a stack, which is put together in a directory. Raises OSError.

        Args:
            stack: path that the directory is to have.
            directory: its descriptor.
        """
        self._known[stack] = create(RECORD, state, directory), state

    def forget(self, stack: str) -> None:
        """A stack is gone."""
        self._known.pop(stack, None)


def create(name: str, state: State, directory: int) -> _Key:
    """Make a new file with a record. Raises OSError."""
    with open(os.open(name, _WRITE, 0o600, dir_fd=directory), "wb") as file:
        file.write(encoded(state))
        file.flush()
        return _key(os.fstat(file.fileno()))


def set_aside(path: str, state_directory: str, unit: str, suffix: str) -> str:
    """Give a record a second name, which stays: on the disk when it returns.

    Returns:
        That path, "" if there is nothing that could be kept.

    Raises:
        OSError
    """
    directory = f"{state_directory}/set-aside"
    durable.make(directory, 0o700)
    prefix = f"{os.fsdecode(os.fsencode(unit)[:_NAME_MAX])}{RECORD}.{suffix}-"
    for name in os.listdir(directory):
        if name.startswith(prefix) and _is_same(f"{directory}/{name}", path):
            return f"{directory}/{name}"  # by one that was killed then, or had no room for a new record
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    aside = f"{directory}/{prefix}{moment}.{nanoseconds:09d}Z"
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            os.rename(path, aside)  # a directory has one name
        else:
            os.link(path, aside, follow_symlinks=False)
    except OSError as error:
        if error.errno not in DAMAGE and error.errno != errno.EPERM:
            raise
        return ""
    durable.fsync(directory, state_directory)
    return aside


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False


def identity(state: State) -> str:
    """What stands behind the number in the name of a stack."""
    return state.accepted.stack.id or EMPTY


def _key(found: os.stat_result) -> _Key:
    return _Key(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
