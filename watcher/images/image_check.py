# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher check IMAGE...`: would it be admitted here? Nothing is copied, and no daemon is needed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import tempfile
from dataclasses import dataclass

from watcher.images import admit, tree
from watcher.images.admission import Host
from watcher.images.extension import RELEASE_DIRECTORY, read_release
from watcher.images.files import hash_file
from watcher.images.formats.base import Format
from watcher.images.formats.probe import probe
from watcher.images.marks import require_no_marks
from watcher.model import Busy, Candidate, Copy, Kind, Refused, shown
from watcher.mounts.process import may_mount
from watcher.mounts.workers import Hung, MountWorkers
from watcher.resolve import release, sources, vpick
from watcher.settings.os_release import parse_os_release
from watcher.settings.signals import reason_of
from watcher.watch.lease import Lease

# Seconds for a tool that reads an image without root, whoever made that.
_TOOL_SEC = 60
_DIRENTS: dict[Kind, vpick.Type] = {Kind.IMAGE: "file", Kind.DIRECTORY: "directory"}


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found out about an image that would be admitted.

    Attributes:
        candidate: its name and version.
        digest: SHA-256 of an image; of a tree as the store has it.
        format: "squashfs", "erofs" or "directory".
        size: bytes.
    """

    candidate: Candidate
    digest: str
    format: str
    size: int


def examine(path: str, made_for: Host, image_max: int) -> Examined:
    """Examine one image or directory tree.

    Raises:
        Refused, Incomplete: it would not be admitted; `str()` says why.
        Busy: somebody is writing to it, or the kernel gives no answer about it.
        OSError: it cannot be read, or not be mounted.
    """
    kind = Kind.DIRECTORY if stat.S_ISDIR(os.stat(path).st_mode) else Kind.IMAGE
    path = os.path.abspath(path)
    directory, filename = os.path.split(path)
    _require_name(directory, filename, kind)
    name, version = vpick.split(filename, kind)
    candidate = Candidate(path, filename, name, version, kind)
    place = admit.open_candidate(candidate)
    try:
        # O_NONBLOCK: its owner's lease makes this fail, not wait for 45 seconds.
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError as error:
        raise Busy("open for writing") from error
    finally:
        os.close(place)
    try:
        return (
            _tree(fd, candidate, made_for, image_max)
            if kind is Kind.DIRECTORY
            else _image(fd, candidate, made_for, image_max)
        )
    finally:
        os.close(fd)


def _require_name(directory: str, filename: str, kind: Kind) -> None:
    """Refuse what would not be looked at where it lies, or is not one image or tree."""
    if kind is Kind.DIRECTORY and filename.endswith(".v"):
        raise Refused("it is a directory for versions: name the versions in it")
    if not re.fullmatch(sources.ENTRY_NAME, filename):
        raise Refused("it would not be looked at: called like a copy in progress, or hidden")
    if kind is Kind.IMAGE and not filename.endswith(".raw"):
        raise Refused("it would not be looked at: its name does not end in .raw")
    spec = vpick.parse_path(directory, kind)
    if spec is not None:
        for passed in vpick.passed_over(spec, [vpick.Dirent(filename, _DIRENTS[kind])]):
            raise Refused(f"it would not be looked at: {passed.reason}")


def _tree(root: int, candidate: Candidate, made_for: Host, image_max: int) -> Examined:
    size = tree.size_of(root)
    if size > image_max:
        raise _too_large(size, image_max)
    names, strict_false = read_release(root)
    _match(candidate, names, strict_false, made_for)
    found = tree.digest(root)
    return Examined(candidate, found.digest, "directory", size)


def _too_large(size: int, image_max: int) -> Refused:
    return Refused(f"too large: {size} bytes, {image_max} are allowed (ImageMax=)")


def _image(fd: int, candidate: Candidate, made_for: Host, image_max: int) -> Examined:
    with Lease(fd) as lease:
        size = os.fstat(fd).st_size
        if size > image_max:
            raise _too_large(size, image_max)
        format = probe(fd, size)
        hasher = hashlib.sha256()
        hash_file(fd, size, hasher)
        copy = Copy(hasher.hexdigest(), os.path.realpath(candidate.path), size, Kind.IMAGE, format)
        names, strict_false = _mounted_release(copy) if may_mount() else _extracted_release(copy.path, format)
        lease.check()
        # It was mounted, or taken apart, by its path.
        if not os.path.samestat(os.fstat(fd), os.stat(copy.path)):
            raise Busy("it was replaced meanwhile")
    _match(candidate, names, strict_false, made_for)
    return Examined(candidate, copy.digest, format.name, size)


def _match(candidate: Candidate, names: dict[str, str], strict_false: set[str], made_for: Host) -> None:
    chosen = release.choose_release_file(candidate.filename, names, strict_false, candidate.kind)
    release.match(parse_os_release(names[chosen]), made_for.os_release, made_for.architecture)


def _mounted_release(copy: Copy) -> tuple[dict[str, str], set[str]]:
    def read() -> tuple[dict[str, str], set[str]]:
        with workers.images.attached([copy]) as roots:
            return _read(roots[copy.digest], unmarked=True)

    with MountWorkers(1) as workers:
        try:
            return workers.call(read)
        except Hung as error:
            raise Busy(str(error)) from error


def _extracted_release(path: str, format: Format) -> tuple[dict[str, str], set[str]]:
    """Without root no image can be mounted: its own tools take the few files out that are needed."""
    with tempfile.TemporaryDirectory() as directory:
        target = f"{directory}/root"
        words = format.unpack_command(path, target, "/".join(RELEASE_DIRECTORY))
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", check=False, timeout=_TOOL_SEC
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, f"not root, and {words[0]} is not installed: the release file cannot be read"
            ) from None
        except subprocess.TimeoutExpired as error:
            raise Refused(f"{words[0]} has not read it in {_TOOL_SEC} s") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or [reason_of(done.returncode)]
            raise Refused(f"{words[0]} cannot read it: {shown(said[-1])}")
        return _read(target)


def _read(root: str, *, unmarked: bool = False) -> tuple[dict[str, str], set[str]]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = read_release(fd)
        if unmarked:
            require_no_marks(fd)
        return found
    finally:
        os.close(fd)
