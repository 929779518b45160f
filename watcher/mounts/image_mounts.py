# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image files, mounted: each once, in the workshop, for as many stacks as want them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from watcher.model import Copy, Kind, Later, Refused, problem
from watcher.mounts import syscalls
from watcher.records import journal

_IMAGE_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
)

# How file systems say that what they were given is not well-formed, or uses what this kernel does not know.
_BROKEN_IMAGE = {
    errno.EINVAL,
    errno.EIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.EOPNOTSUPP,
    errno.ENOENT,
    errno.E2BIG,
}


@dataclass(slots=True)
class _Image:
    """One digest.

    Attributes:
        turn: held while it is mounted, which may take for ever: then only who wants the same one waits.
        users: who has it, or waits for it.
        inode: of the copy that is mounted, 0 if none is.
    """

    turn: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    inode: int = 0


class Images:
    """Images mounted in the workshop: each digest once, for as long as somebody wants it.

    Args:
        place: directory of their mount points, in the workshop.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._known: dict[str, _Image] = {}

    @contextlib.contextmanager
    def attached(self, copies: Iterable[Copy]) -> Iterator[dict[str, str]]:
        """Have the copies mounted while the block runs: absolute paths of their roots, by digest.

        Raises:
            Refused: the kernel will not mount it.
            OSError: no loop device, no memory.
        """
        roots: dict[str, str] = {}
        held: list[_Image] = []
        try:
            for copy in copies:
                if copy.digest not in roots:
                    roots[copy.digest] = copy.path
                    if copy.kind is Kind.IMAGE:
                        held.append(self._hold(copy.digest))
                        roots[copy.digest] = self._mounted(copy, held[-1])
            yield roots
        finally:
            with self._lock:
                for image in held:
                    image.users -= 1

    def retain(self, digests: Iterable[str]) -> None:
        """Unmount every image that is neither in use nor among these."""
        kept = set(digests)
        with self._lock:
            for digest, image in list(self._known.items()):
                if image.users or digest in kept:
                    continue
                try:
                    if image.inode:
                        syscalls.umount2(self._path(digest), syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
                    del self._known[digest]
                    if image.inode:
                        os.rmdir(self._path(digest))
                except OSError as error:  # it is tried again; a directory that stays is used again
                    journal.log.warning(f"workshop: an image stays mounted for the moment: {problem(error)}")

    def _hold(self, digest: str) -> _Image:
        with self._lock:
            image = self._known.setdefault(digest, _Image())
            image.users += 1
        return image

    def _mounted(self, copy: Copy, image: _Image) -> str:
        path = self._path(copy.digest)
        with image.turn:
            inode = os.stat(copy.path, follow_symlinks=False).st_ino
            if image.inode and image.inode != inode:
                # That copy was damaged, and was made anew. Who still puts something together of it tries again.
                syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
                image.inode = 0
            if not image.inode:
                _mount_image(copy, path)
                image.inode = inode
        return path

    def _path(self, digest: str) -> str:
        return f"{self._place}/{digest}"


def _mount_image(copy: Copy, target: str) -> None:
    backing = os.open(copy.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mounted = _fsmount_image(copy, backing)
    finally:
        os.close(backing)
    try:
        os.makedirs(target, 0o700, exist_ok=True)
        syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mounted)


def _fsmount_image(copy: Copy, backing: int) -> int:
    if copy.fstype == "erofs":
        # Since Linux 6.12 straight from the file, but not on every file system (ENOTBLK); what is wrong with the
        # image itself shows again, and is told, when it is tried through a loop device.
        with contextlib.suppress(OSError):
            return _fsmount_source(copy.fstype, f"/proc/self/fd/{backing}")
    device, name = _loop_device(backing, copy.digest)
    try:
        return _fsmount_source(copy.fstype, name)
    except OSError as error:
        if error.errno in _BROKEN_IMAGE:
            raise Refused(f"the kernel cannot mount it as {copy.fstype}: {error.strerror}") from error
        raise
    finally:
        os.close(device)


def _loop_device(backing: int, label: str) -> tuple[int, str]:
    try:
        return syscalls.loop_attach(backing, label)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Later(f"no loop device is to be had: {where}{error.strerror}") from error


def _fsmount_source(fstype: str, source: str) -> int:
    context = syscalls.fsopen(fstype)
    try:
        syscalls.fsconfig_set_string(context, "source", source)
        syscalls.fsconfig_set_flag(context, "ro")
        syscalls.fsconfig_cmd_create(context, source)
        return syscalls.fsmount(context, _IMAGE_ATTRIBUTES)
    finally:
        os.close(context)
