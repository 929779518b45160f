# SPDX-License-Identifier: LGPL-2.1-or-later
"""The release files of a copy, for which an image is mounted: what extension.py reads of a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from watcher.images.extension import NoRelease, Release, read_release
from watcher.images.walk import DIRECTORY
from watcher.model import Copy, Kind, Later, Refused, problem
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.workers import Hung, MountWorkers

# Errors that say what this machine lacks, and nothing about the image.
_SHORT = {
    errno.ENOMEM: "no memory",
    errno.EAGAIN: "too many threads",
    errno.ENOSPC: "no free loop device",
    errno.ENXIO: "no loop device",
    errno.EBUSY: "no free loop device",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.EPERM: "images need root of the host, a user namespace has directories only",
    errno.ENODEV: "no file system for it in this kernel (or its module is not loaded)",
}


def release_of(
    copy: Copy,
    workers: MountWorkers,
    read: Callable[[int], object],
    ready: Callable[[Copy], AbstractContextManager[None]] = lambda copy: nullcontext(),
) -> Release:
    """The release files of a copy. An image is mounted for that; blocks, must not run inside `MountWorkers.call()`.

    Args:
        read: gets a descriptor of the root: see `require_readable()`.
        ready: what a copy needs to be mounted, see `VerifiedMounts`.

    Raises:
        Refused: not a confext; broken; or with attributes that mean something to overlayfs.
        Later: something is missing here, not in the copy.
        OSError: it cannot be read.
    """
    try:
        if copy.kind is Kind.IMAGE:
            with nullcontext() if workers.images.has(copy) else ready(copy):
                found, root = workers.call_apart(_read_mounted, workers, copy)
            try:
                read(root)
            finally:
                os.close(root)
            return found
        return _read_tree(copy.path, read)
    except OSError as error:
        short = _SHORT.get(error.errno or 0)
        if short is None:
            raise
        raise Later(f"{short}: {problem(error)}") from error
    except Hung as error:
        raise Later(str(error)) from error


def _read_tree(path: str, read: Callable[[int], object]) -> Release:
    with Descriptors() as fds:
        root = fds.add(os.open(path, DIRECTORY))
        read(root)
        try:
            return read_release(root)
        except NoRelease:
            return {}, frozenset()


def _read_mounted(workers: MountWorkers, copy: Copy) -> tuple[Release, int]:
    """The release files, and a descriptor of the image's root: all threads can read by it, and it stays mounted."""
    with workers.images.attached([copy]) as roots:
        try:
            return _read(roots[copy.digest]), os.open(roots[copy.digest], DIRECTORY)
        except OSError as error:
            if error.errno in _SHORT:
                raise
            raise Refused(f"broken: its extension-release cannot be read: {error.strerror}") from error


def _read(root: str) -> Release:
    with Descriptors() as fds:
        fd = fds.add(os.open(root, DIRECTORY))
        return read_release(fd)
