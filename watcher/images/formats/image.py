# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file turned out to be: a file system, and where in the file it lies."""

from __future__ import annotations

from dataclasses import dataclass

from watcher.images.formats.base import Format

_UNVERIFIED = {
    "verity": "it has verity data, which this version does not verify",
    "signature": "it is signed (verity data and signature), which this version does not verify",
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is complete and does not contradict itself.

    Attributes:
        format: of its file system.
        end: bytes of the file that belong to the image; what follows is padding.
        offset: where in the file the file system begins, bytes.
        size: of the partition, bytes; 0 without a partition table.
        protection: of a disk image: "", "verity" (it has verity data), "signature" (and a signature of these).
    """

    format: Format
    end: int
    offset: int = 0
    size: int = 0
    protection: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"disk image with {self.format.name}" if self.size else self.format.name

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the administrator should know, one line each."""
        return (_UNVERIFIED[self.protection],) if self.protection else ()

    def fsmount(self, backing: int, label: str) -> int:
        """As `Format.fsmount()`."""
        return self.format.fsmount(backing, label, self.offset, self.size)
