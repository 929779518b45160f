# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mounts images with verity data by dm-verity, where there is a device mapper.

The verdict on an image does not depend on it: the whole hash tree was verified over the store's copy before, everywhere
(verification.py). dm-verity goes on with that: each block is verified again whenever it is read from the disk. So one
who can write to the disk under the store does harm to nobody: what he has changed cannot be read.

The kernel gets the signature, too, as it does from systemd. Where a key in its own keyring has made it, the image is
signed, whatever lies in `verity.d`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

from watcher.images.formats.base import loop_device
from watcher.images.formats.image import Image
from watcher.model import Copy, Protection, Trust
from watcher.mounts import image_mounts
from watcher.mounts.dm_verity import Devices, Unavailable, Verified
from watcher.records import journal
from watcher.resolve import sidecars
from watcher.settings import device_mapper

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class _How(NamedTuple):
    """How an image is mounted.

    Attributes:
        why_not: why without dm-verity; "": with it.
        signed: the kernel has the key of its signature.
    """

    why_not: str = ""
    signed: bool = False


class VerifiedMounts:
    """Threads may share it."""

    def __init__(self) -> None:
        self._devices = Devices()
        self._lock = threading.Lock()
        self._how: dict[str, _How] = {}
        # Path of a device, "" where none can be had, and how; by digest. For the worker that is to mount it.
        self._ready: dict[str, tuple[str, _How]] = {}
        # Fingerprints of certificates whose keys the kernel does not have. It gets new ones at boot, as a rule.
        self._unknown: set[str] = set()
        self._said: set[str] = set()

    @contextmanager
    def ready(self, copy: Copy) -> Iterator[None]:
        """Have the device of a copy while the block runs, in which a worker mounts it.

        It takes longer than anything else that a worker does, and swaps of other services would wait for it.
        """
        if not _is_for(copy):
            yield
            return
        with ExitStack() as stack:
            backing = os.open(copy.path, _READ)
            stack.callback(os.close, backing)
            mine = self._ready[copy.digest] = self._opened(copy, backing, stack)
            try:
                yield
            finally:
                with self._lock:
                    if self._ready.get(copy.digest) is mine:
                        del self._ready[copy.digest]

    def fsmount(self, copy: Copy, backing: int) -> int:
        """A detached mount of a copy, whose file is open. Raises as `Format.fsmount()`."""
        if not _is_for(copy):
            return image_mounts.plain(copy, backing)
        assert isinstance(copy.format, Image)
        with ExitStack() as stack:
            path, how = self._ready.get(copy.digest) or self._opened(copy, backing, stack)
            mounted = copy.format.fsmount_device(path) if path else image_mounts.plain(copy, backing)
        with self._lock:
            self._how[copy.digest] = how
        return mounted

    def trust(self, digest: str, trust: Trust) -> Trust:
        """What is proved of a content, with what the kernel says of it, as far as it was mounted."""
        with self._lock:
            how = self._how.get(digest)
        if how is None or how.why_not or trust.protection is Protection.UNPROTECTED:
            return trust
        found = replace(trust, how=f"{trust.how}; dm-verity verifies what is read of it")
        if not how.signed:
            return found
        found = replace(found, how=f"{found.how}, and its signature is of a key in the kernel's keyring")
        return replace(found, protection=Protection.SIGNED, remark="")

    def forget(self, digest: str) -> None:
        """Drop what is remembered of a content that has left the store."""
        with self._lock:
            self._how.pop(digest, None)

    def _opened(self, copy: Copy, backing: int, stack: ExitStack) -> tuple[str, _How]:
        """The path of a device, which is there until the end of `stack`; "" where none can be had."""
        assert isinstance(copy.format, Image) and copy.format.brought is not None
        signature, fingerprint = copy.format.brought.signature, copy.trust.fingerprint
        if fingerprint in self._unknown:
            signature = None
        try:
            if signature is not None:
                try:
                    return self._device(copy, copy.format, backing, signature, stack), _How(signed=True)
                except Unavailable as why:
                    if not why.refused:
                        raise
            path = self._device(copy, copy.format, backing, None, stack)
            if signature is not None and fingerprint:
                self._unknown.add(fingerprint)  # it was for the key: without the signature it works
            return path, _How()
        except Unavailable as why:
            self._say(str(why))
            return "", _How(str(why))

    def _device(
        self, copy: Copy, image: Image, backing: int, signature: bytes | None, stack: ExitStack
    ) -> str:
        brought = image.brought
        assert brought is not None

        def loop(fd: int, offset: int, size: int) -> str:
            opened, path = loop_device(fd, copy.digest, offset, size)
            stack.callback(os.close, opened)
            return path

        tree = backing
        if brought.beside:
            tree = os.open(f"{sidecars.stem(copy.protected)}{sidecars.VERITY}", _READ)
            stack.callback(os.close, tree)
        verified = Verified(
            loop(backing, image.offset, image.size),
            loop(tree, brought.offset, brought.size),
            brought.root_hash,
            signature,
            copy.digest,
        )
        # The loop devices are the mapped device's, too, and are freed with it.
        return stack.enter_context(self._devices.opened(verified))

    def _say(self, why: str) -> None:
        with self._lock:
            said = why in self._said
            self._said.add(why)
        if not said:
            journal.log.warning(
                f"images with verity data are mounted without dm-verity: {why}; their hash trees were verified"
            )


def _is_for(copy: Copy) -> bool:
    return isinstance(copy.format, Image) and copy.format.brought is not None and device_mapper.is_there()
