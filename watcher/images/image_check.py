# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher check IMAGE...`: would it be admitted here? Nothing is copied, and no daemon is needed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from typing import NamedTuple

from watcher.images import sidecars, tree
from watcher.images.certificates import Keys
from watcher.images.copy_release import release_of
from watcher.images.effects import effects
from watcher.images.errors import require_size
from watcher.images.extension import RELEASE_DIRECTORY, Release, read_release
from watcher.images.files import digest_of
from watcher.images.formats.image import Image
from watcher.images.formats.probe import probe
from watcher.images.made_for import Host, passed_over, require_match
from watcher.images.opened import opened
from watcher.images.readable import require_readable
from watcher.images.sidecars import Beside
from watcher.images.verification import KEYS, verify
from watcher.model import Busy, Candidate, Copy, Kind, Later, Refused, Trust
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers
from watcher.resolve import sources, vpick
from watcher.resolve.sidecars import VERITY
from watcher.settings.signals import reason_of
from watcher.text import telling
from watcher.watch.lease import Lease

# Seconds. A tool that reads an image without root may never end: strangers made the image.
_TOOL_SEC = 60
_DIRENTS: dict[Kind, vpick.Type] = {Kind.IMAGE: "file", Kind.DIRECTORY: "directory"}


class Examined(NamedTuple):
    """
    Attributes:
        copy: its path is that of the original.
        trust: what is proved of it.
        effects: what it does to the host's `/etc` besides bringing files, see effects.py (not known without root), and
            what in it, and beside it, is passed over.
    """

    candidate: Candidate
    copy: Copy
    trust: Trust
    effects: tuple[str, ...]


def examine(path: str, made_for: Host, image_max: int, keys: Keys = KEYS) -> Examined:
    """What the daemon would make of one image or directory tree.

    Args:
        image_max: bytes (`ImageMax=`).
        keys: whose signatures count.

    Raises:
        Refused, Incomplete: it would not be admitted; `str()` says why.
        Busy: another process is writing to it, or the kernel gives no answer about it.
        OSError: it is not there.
    """
    kind = Kind.DIRECTORY if stat.S_ISDIR(os.stat(path).st_mode) else Kind.IMAGE
    path = os.path.abspath(path)
    directory, filename = os.path.split(path)
    require_name(directory, filename, kind)
    candidate = Candidate(path, filename, *vpick.split(filename, kind), kind, sidecars=sidecars.found(path))
    with opened(candidate) as (fd, _), sidecars.beside(candidate, fd, None) as files:
        if kind is Kind.IMAGE:
            copy, trust, found, done = _image(fd, os.path.realpath(path), image_max, keys, files)
        else:
            copy, trust, found, done = _tree(fd, os.path.realpath(path), image_max)
    require_match(candidate, found, made_for)
    aside = sidecars.misnamed(path) if kind is Kind.IMAGE else ()
    return Examined(candidate, copy, trust, (*aside, *done, *passed_over(found)))


def require_name(directory: str, filename: str, kind: Kind) -> None:
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


def _tree(root: int, path: str, image_max: int) -> tuple[Copy, Trust, Release, tuple[str, ...]]:
    size = tree.signature(root).size
    require_size(size, image_max, "ImageMax=")
    found = read_release(root)
    return Copy(tree.digest(root), path, size, Kind.DIRECTORY), Trust(), found, effects(root, "/")


def _image(
    fd: int, path: str, image_max: int, keys: Keys, files: Beside
) -> tuple[Copy, Trust, Release, tuple[str, ...]]:
    done: tuple[str, ...] = ()

    def read(root: int) -> None:
        nonlocal done
        require_readable(root, image_max)
        done = effects(root, "/")

    with Lease(fd) as lease:
        size = os.fstat(fd).st_size
        require_size(size, image_max, "ImageMax=")
        image = probe(fd, size)
        if files:
            name = os.path.basename(path)
            image = sidecars.with_parts(image, sidecars.read(files, name), size, name)
        copy = Copy(digest_of(fd, size), path, size, Kind.IMAGE, image)
        with sidecars.explained(bool(files)):
            verity = image.verity(fd, files.fds.get(VERITY))
            trust = verify(verity, keys, "the file") if verity else Trust()
        if may_mount():
            with MountWorkers() as workers:
                found = release_of(copy, workers, read)
        else:
            found = _unpacked_release(fd, path, image)
        lease.check()
        # It was mounted, or unpacked, by its path.
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise Busy("it was replaced meanwhile")
    return copy, trust, found, done


def _unpacked_release(fd: int, path: str, image: Image) -> Release:
    """Without root no image can be mounted: its own tool unpacks the few files that are needed."""
    with tempfile.TemporaryDirectory() as directory, Descriptors() as fds:
        target = f"{directory}/root"
        if image.size:
            path = f"{directory}/partition"  # not every version of the tools can begin at an offset
            _extract(fd, image, fds.add(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)))
        words = image.format.unpack_command(path, target, RELEASE_DIRECTORY)
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", check=False, timeout=_TOOL_SEC
            )
        except FileNotFoundError:
            raise Later(
                f"not root, and {words[0]} is not installed: the release file cannot be read"
            ) from None
        except subprocess.TimeoutExpired as error:
            raise Refused(f"{words[0]} has not read it in {_TOOL_SEC} s") from error
        if done.returncode:
            said = telling(done.stderr or done.stdout) or reason_of(done.returncode)
            raise Refused(f"{words[0]} cannot read it: {said}")
        return read_release(fds.add(os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))


def _extract(fd: int, image: Image, target: int) -> None:
    """Write the file system of a disk image to an empty file."""
    offset, end = image.offset, image.offset + image.size
    while offset < end and (sent := os.sendfile(target, fd, offset, end - offset)):
        offset += sent
