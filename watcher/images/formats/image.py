# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file turned out to be: a file system, where in the file it lies, and what it can be verified by."""

from __future__ import annotations

from dataclasses import dataclass

from watcher.images.formats.base import Extent, Format
from watcher.images.verification import Verity


@dataclass(frozen=True, slots=True)
class Brought:
    """What a disk image brings to be verified by.

    Attributes:
        offset, size: of the partition with its verity data, bytes.
        root_hash: of the signature; without one, of the UUIDs of the two partitions (UAPI.2).
        root_hash_from: which of the two, for people.
        signature: PKCS#7, DER; None without one.
        beside: the verity data is in a file beside the image.
    """

    offset: int
    size: int
    root_hash: bytes
    root_hash_from: str
    signature: bytes | None = None
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is complete and does not contradict itself.

    Attributes:
        format: of its file system.
        end: bytes of the file that belong to the image; what follows is padding.
        offset: where in the file the file system begins, bytes.
        size: bytes of the partition, or of what the verity data covers; 0: all of the file.
        brought: of an image with verity data.
        parts: partitions and their flags, by the names of systemd.image-policy(7); none of a bare file system.
    """

    format: Format
    end: int
    offset: int = 0
    size: int = 0
    brought: Brought | None = None
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"disk image with {self.format.name}" if self.offset else self.format.name

    @property
    def file_system(self) -> str:
        """By the kernel's name."""
        return self.format.name

    def verity(self, fd: int, beside: int | None = None) -> Verity | None:
        """What the image is to be verified by; None where it brings nothing.

        Args:
            fd: its file.
            beside: the file with its verity data, where that is not in it.
        """
        brought = self.brought
        if brought is None:
            return None
        data, tree = Extent(fd, self.offset, self.size), Extent(fd, brought.offset, brought.size)
        if brought.beside and beside is not None:
            tree = tree._replace(fd=beside)
        return Verity(data, tree, brought.root_hash, brought.signature, brought.root_hash_from)

    def fsmount(self, backing: int, label: str) -> int:
        """As `Format.fsmount()`."""
        return self.format.fsmount(backing, label, self.offset, self.size)

    def fsmount_device(self, path: str) -> int:
        """As `Format.fsmount_device()`."""
        return self.format.fsmount_device(path)
