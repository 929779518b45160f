# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a candidate on the disk to a copy in the store, or one clear line why not.

The path is looked up once, and each step of it judged on the way (`strict_modes.py`). Links are followed (they are how
people deploy), and from then on everything happens to the file that was found. Each content is read once: its verdict,
good or bad, is remembered by what `stat` says of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

from watcher.images import tree
from watcher.images.formats.probe import probe
from watcher.images.store import Store
from watcher.images.verdicts import Key
from watcher.model import Busy, Candidate, Copy, Kind, Later, Refused
from watcher.resolve.strict_modes import Guard, StrictModes
from watcher.watch.lease import Lease, coarse_now_ns

_SECOND_NS = 1_000_000_000

Judge = Callable[[Copy], object]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
_EXPECTED = {Kind.IMAGE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR}


def open_candidate(candidate: Candidate) -> int:
    """An O_PATH descriptor of what the candidate's path leads to, links followed.

    Raises:
        Refused: a link that leads nowhere or in a circle, or not the type its kind asks for.
        Busy: it has just vanished.
        Later: the machine could not look it up.
    """
    with _translated(), _tell_apart(candidate):
        return _of_its_kind(candidate, os.open(candidate.path, os.O_PATH | os.O_CLOEXEC))


def admit(
    store: Store,
    candidate: Candidate,
    judge: Judge | None = None,
    terms: Hashable = None,
    at_hand: set[str] | None = None,
    modes: StrictModes | None = None,
) -> Copy:
    """The store's copy of the candidate, made now or before.

    Hold `store.using()` until a stack with the copy has been accepted.

    Args:
        judge: whether the copy will do as a confext; raises Refused if not.
        terms: all that the judgement depends on besides the content. A refusal is remembered with them, or else what
            is refused, and so collected from the store, would be copied again at every look.
        at_hand: gets the digest of what is not refused: what has to wait is in no stack, and must not be collected
            all the same, or else it would be copied again at every look.
        modes: whom the service trusts; None: everybody. Whom it does not trust is no verdict on a content, and never
            remembered as one.

    Raises:
        Refused, Incomplete: this content will not do; the line says why, to go behind the path.
        Busy: somebody writes to it, or it has just vanished; an event will follow.
        Later: the machine cannot now.
    """
    with _translated():
        place, guard = _open(candidate, modes)
    with _translated(), _closing(place):
        if candidate.kind is Kind.IMAGE:
            with _closing(_reopen(place, os.O_RDONLY)) as fd:
                return _admit(store, _Image(fd), judge, terms, at_hand)
        with _closing(_reopen(place, os.O_RDONLY | os.O_DIRECTORY)) as root:
            return _admit(store, _Tree(root, guard), judge, terms, at_hand)


class _Content(Protocol):
    """An image or a tree, open."""

    key: Key

    def copy(self, store: Store) -> tuple[Copy | Refused, bool]:
        """The verdict on it, and whether `key` stands for exactly that content from now on."""
        ...


def _admit(
    store: Store, content: _Content, judge: Judge | None, terms: Hashable, at_hand: set[str] | None
) -> Copy:
    store.known.recall((content.key, terms))
    with store.known.turn(content.key):
        copy = store.known.recall(content.key)
        if copy is None or not store.has(copy):
            copy = _copy(store, content)
    if judge is not None:
        try:
            judge(copy)
        except Refused as refused:
            if store.known.recall(content.key) == copy:
                store.known.remember((content.key, terms), refused)
            raise
        except (OSError, Busy):
            _note(at_hand, copy)
            raise
    _note(at_hand, copy)
    return copy


def _note(at_hand: set[str] | None, copy: Copy) -> None:
    if at_hand is not None:
        at_hand.add(copy.digest)


def _copy(store: Store, content: _Content) -> Copy:
    verdict, lasting = content.copy(store)
    if lasting:
        store.known.remember(content.key, verdict)
    if isinstance(verdict, Refused):
        raise verdict
    return verdict


class _Image:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.key = _image_key(os.fstat(fd))

    def copy(self, store: Store) -> tuple[Copy | Refused, bool]:
        verdict: Copy | Refused
        with Lease(self._fd) as lease:
            found = os.fstat(self._fd)
            self.key = _image_key(found)
            try:
                verdict = store.add_image(self._fd, probe(self._fd, found.st_size), lease)
            except Refused as refused:
                lease.check()
                verdict = refused
        return verdict, _is_past(found.st_ctime_ns, lease.proven_ns)


class _Tree:
    def __init__(self, root: int, guard: Guard | None) -> None:
        self._root = root
        self._signature = tree.signature(root, guard)
        self.key: Key = ("tree", self._signature.key)

    def copy(self, store: Store) -> tuple[Copy | Refused, bool]:
        verdict: Copy | Refused
        try:
            verdict = store.add_tree(self._root, self._signature)
        except Refused as refused:
            verdict = refused
        return verdict, _is_past(self._signature.youngest_ns, coarse_now_ns())


def _image_key(found: os.stat_result) -> Key:
    return "image", found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_past(ctime_ns: int, proven_ns: int) -> bool:
    """Whether a change after `proven_ns` must show in the ctime: timestamps are as coarse as the timer's tick.

    A time far in the future (the clock was set back) will not come again by itself.
    """
    return ctime_ns < proven_ns or ctime_ns > proven_ns + _SECOND_NS


def _open(candidate: Candidate, modes: StrictModes | None) -> tuple[int, Guard | None]:
    if modes is None:
        return open_candidate(candidate), None
    with _tell_apart(candidate):
        found = modes.open(candidate.path)
    if found.unsafe is not None:
        os.close(found.fd)
        raise found.unsafe
    return _of_its_kind(candidate, found.fd), found.guard


def _of_its_kind(candidate: Candidate, fd: int) -> int:
    found = stat.S_IFMT(os.fstat(fd).st_mode)
    expected = _EXPECTED[candidate.kind]
    if found != expected:
        os.close(fd)
        raise Refused(f"{_KINDS.get(found, 'of an unknown type')}, not {_KINDS[expected]}")
    return fd


@contextmanager
def _tell_apart(candidate: Candidate) -> Iterator[None]:
    """What it means that a path cannot be opened."""
    try:
        yield
    except OSError as error:
        raise _not_opened(candidate, error) from error


def _not_opened(candidate: Candidate, error: OSError) -> Refused | Busy | OSError:
    match error.errno:
        case errno.ELOOP:
            return Refused("a link that leads in a circle")
        case errno.ENOENT | errno.ENOTDIR:
            return (
                Refused("a link that leads nowhere") if os.path.islink(candidate.path) else Busy("vanished")
            )
        case errno.EACCES | errno.EPERM:
            return Refused(f"cannot be read: {error.strerror}")
        case _:
            return error


def _reopen(place: int, flags: int) -> int:
    """The very file that `place` (O_PATH) is, for reading. Raises Busy where somebody holds a write lease on it."""
    try:
        return os.open(f"/proc/self/fd/{place}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except PermissionError as error:
        raise Refused(f"cannot be read: {error.strerror}") from error
    except BlockingIOError as error:
        raise Busy("open for writing") from error


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Later(f"cannot be read: {error.strerror}") from error
