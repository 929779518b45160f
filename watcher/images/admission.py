# SPDX-License-Identifier: LGPL-2.1-or-later
"""May this become a layer of that service? Complete, whole, made for its host; copied into the store on the way.

What is asked of the content alone is asked once, whoever wants it: the copy (`admit.py`) and its release files are
remembered by digest. What depends on the service (its root's os-release, the file's name) is asked each time; it costs
microseconds.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from watcher.images import admit
from watcher.images.extension import NoRelease, read_release
from watcher.images.marks import require_no_marks
from watcher.images.store import Store
from watcher.model import Candidate, Copy, Incomplete, Kind, Later, Refused, problem
from watcher.mounts import syscalls
from watcher.mounts.workers import Hung, MountWorkers
from watcher.resolve import release
from watcher.resolve.strict_modes import StrictModes
from watcher.settings import architectures
from watcher.settings.os_release import parse_os_release

Release = tuple[Mapping[str, str], frozenset[str]]

_OS_RELEASE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_OS_RELEASE_MAX = 64 * 1024

# What the kernel says when it is short of something, rather than displeased with the image.
_SHORT = {
    errno.ENOMEM: "no memory",
    errno.ENOSPC: "no free loop device",
    errno.ENXIO: "no loop device",
    errno.EBUSY: "no free loop device",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.EPERM: "images need root of the host, a user namespace has directories only",
    errno.ENODEV: "no file system for it in this kernel (or its module is not loaded)",
}


@dataclass(frozen=True, slots=True)
class Host:
    """What an image must be made for: the os-release of the service's root, and the architecture (systemd's name)."""

    os_release: Mapping[str, str]
    architecture: str

    @property
    def terms(self) -> tuple[object, ...]:
        """All of that in a form that can be compared and hashed."""
        return (*sorted(self.os_release.items()), self.architecture)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Mapping[str, str]:
    """The same few texts are met again and again."""
    return MappingProxyType(parse_os_release(text))


def host(root: str = "/") -> Host:
    """The host of a service, os-release(5): `/etc/os-release` of its root, else `/usr/lib/os-release`.

    Links lead nowhere out of that root, whoever made them.

    Raises:
        FileNotFoundError: there is neither.
        OSError: it cannot be read.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in ("etc/os-release", "usr/lib/os-release"):
            try:
                fd = syscalls.openat2(directory, name, os.O_PATH, _IN_ROOT)
            except FileNotFoundError:
                continue
            return Host(_parsed(_text(fd)), architectures.native())
    finally:
        os.close(directory)
    raise FileNotFoundError(errno.ENOENT, "no os-release in it", root)


def _text(fd: int) -> str:
    """What is in a regular file; nothing in anything else, which may do something when it is opened. Closes `fd`."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        with open(os.open(f"/proc/self/fd/{fd}", _OS_RELEASE), encoding="utf-8", errors="replace") as file:
            return file.read(_OS_RELEASE_MAX)
    finally:
        os.close(fd)


class Admission:
    """Admits candidates; safe to use from several threads."""

    def __init__(self, store: Store, workers: MountWorkers) -> None:
        self._store = store
        self._workers = workers
        self._releases: dict[str, Release] = {}

    def admit(
        self,
        candidate: Candidate,
        made_for: Host,
        at_hand: set[str],
        modes: StrictModes | None,
    ) -> Copy:
        """The store's copy of a candidate. Blocks; not on a worker of the workshop.

        Hold `Store.using()` until a stack with the copy has been accepted.

        Args:
            at_hand: gets the digest, also of what has to wait.
            modes: whom the service trusts; None: everybody.

        Raises:
            Refused, Incomplete: it will not do; `str()` says what is wrong, to go behind its path.
            Busy: somebody is writing to it.
            Later: something is missing here, not in the image.
        """

        def judge(copy: Copy) -> None:
            names, strict_false = self._release(copy)
            # A directory comes file by file, and nobody says when that ends.
            if not names and candidate.kind is Kind.DIRECTORY:
                raise Incomplete(
                    "incomplete: there is no etc/extension-release.d/extension-release.* in it yet"
                )
            name = release.choose_release_file(candidate.filename, names, strict_false, candidate.kind)
            release.match(_parsed(names[name]), made_for.os_release, made_for.architecture)

        terms = candidate.filename, made_for.terms
        return admit.admit(self._store, candidate, judge, terms, at_hand, modes)

    def forget(self, digests: Iterable[str]) -> None:
        """Drop what is remembered of content that has left the store."""
        for digest in digests:
            self._releases.pop(digest, None)

    def _release(self, copy: Copy) -> Release:
        known = self._releases.get(copy.digest)
        if known is None:
            try:
                if copy.kind is Kind.DIRECTORY:
                    known = _read_tree(copy)
                else:
                    known = self._workers.call(_read_mounted, self._workers, copy)
            except OSError as error:
                short = _SHORT.get(error.errno or 0)
                if short is None:
                    raise
                raise Later(f"{short}: {problem(error)}") from error
            except Hung as error:
                raise Later(str(error)) from error
            self._releases[copy.digest] = known
        return known


def _read_tree(copy: Copy) -> Release:
    try:
        return _read(copy.path)
    except NoRelease:
        return {}, frozenset()


def _read_mounted(workers: MountWorkers, copy: Copy) -> Release:
    with workers.images.attached([copy]) as roots:
        try:
            return _read(roots[copy.digest])
        except OSError as error:
            if error.errno in _SHORT:
                raise
            raise Refused(f"broken: its extension-release cannot be read: {error.strerror}") from error


def _read(root: str) -> Release:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        names, strict_false = read_release(fd)
        require_no_marks(fd)
        return names, frozenset(strict_false)
    finally:
        os.close(fd)
