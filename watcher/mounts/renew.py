# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mounts a service's stack anew where names of the host's `/etc` stay old in it: a process of the service holds them.

`refresh.py` says why, and what was tried before. What is mounted is the very stack that is there: neither is the
service told of it, nor does it become another one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from watcher.model import Copy, Stack
from watcher.mounts.converge import Compared, device_of
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.namespaces import of_service
from watcher.mounts.process import Process
from watcher.mounts.swap import open_layer, swap
from watcher.mounts.table import Mounted
from watcher.mounts.workers import MountWorkers

_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def renew(
    workers: MountWorkers,
    main: Process,
    pids: Iterable[int],
    stack: Stack,
    copies: Mapping[str, Copy],
    compared: Compared,
    *,
    old: Sequence[str],
    devices: Collection[int],
    kept: Callable[[], Iterable[Stack]],
    other_mains: Callable[[], Iterable[int]] = tuple,
) -> int:
    """Mount a stack anew in each namespace of a service that shows it on one of these overlays. On a mount worker.

    Args:
        stack: what shows another one is left as it is.
        compared: see `converge()`: what it found of a stack that systemd mounted.
        old: the paths below `/etc` that are not what the base has. If a layer has all of them, nothing is done.
        devices: of the overlays, `View.device`.
        pids, kept, other_mains: see `of_service()`.

    Returns:
        In how many namespaces that was done.

    Raises:
        Whatever `of_service()` and `swap()` do.
    """

    def is_other(mounted: Mounted) -> bool:
        if mounted.layers is None:
            return compared.get((mounted.mount, stack.id)) is None
        return mounted.stack != stack.id

    if _has_all(workers, stack, copies, old):
        return 0
    count = 0
    with of_service(workers, main, pids, kept, other_mains) as found:
        for namespace in (*found.apart, found.main, *found.following):
            # Most of those that follow the main one have followed it by now.
            if device_of(workers, namespace) in devices:
                count += swap(workers, namespace, stack, copies, keep=is_other).done
    return count


def _has_all(workers: MountWorkers, stack: Stack, copies: Mapping[str, Copy], paths: Iterable[str]) -> bool:
    """Whether the layers of a stack have their own for all of these paths, so that the base does not count."""
    used = [copies[digest] for digest in stack.digests]
    with workers.images.attached(used) as roots, Descriptors() as fds:
        etcs = [open_layer(fds, layer, roots[layer.digest]) for layer in stack.layers]
        return all(any(_has(etc, path) for etc in etcs) for path in paths)


def _has(etc: int, path: str) -> bool:
    """Whether a layer hides what the layers below it have at a path: by a file, or by what is no part of theirs."""
    names = path.split("/")
    for count in range(1, len(names) + 1):
        part = f"/proc/self/fd/{etc}/{'/'.join(names[:count])}"
        try:
            if not stat.S_ISDIR(os.lstat(part).st_mode) or _is_opaque(part):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
    return False


def _is_opaque(directory: str) -> bool:
    for attribute in _OPAQUE:
        try:
            return os.getxattr(directory, attribute, follow_symlinks=False) == b"y"
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
                raise
    return False
