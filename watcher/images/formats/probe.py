# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file is. The formats are asked one by one; what none of them knows gets the most helpful word.

A disk image has its file system in a partition. There the formats are asked again, and nothing else is: a disk image
within a partition is not looked into.
"""

from __future__ import annotations

from watcher.images import signature
from watcher.images.formats import disk, gpt, verity
from watcher.images.formats.base import HEAD, Extent, Format, read_all
from watcher.images.formats.btrfs import BTRFS
from watcher.images.formats.erofs import EROFS
from watcher.images.formats.ext4 import EXT4
from watcher.images.formats.image import Brought, Image
from watcher.images.formats.squashfs import SQUASHFS
from watcher.model import Incomplete, Refused

_FORMATS: tuple[Format, ...] = (SQUASHFS, EROFS, EXT4, BTRFS)

# What people drop by mistake, for a better word than "unknown".
_TEXTS = (
    ("<!doctype html", "a web page: download the image itself"),
    ("<html", "a web page: download the image itself"),
    ("<?xml", "an XML document, perhaps what a server answered: download it again"),
    ("{", "JSON, perhaps what a server answered: download it again"),
    (
        "version https://git-lfs.github.com/spec/",
        "a git-lfs pointer and not the file itself: run git lfs pull",
    ),
    ("-----begin ", "a certificate, key or signature: drop the image"),
    ("#!", "a script: build an image with mksquashfs"),
)
"""How texts begin, in lower case, without white space and a byte order mark before that."""
_HINTS = (
    (512, b"EFI PART", "a disk image within a disk image: put the file system there itself"),
    (0, b"LUKS\xba\xbe", "encrypted (LUKS): confexts are not"),
    (0, b"\x1f\x8b", "gzip data: unpack it first"),
    (0, b"\xfd7zXZ\x00", "xz data: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
    (0, b"BZh", "bzip2 data: unpack it first"),
    (257, b"ustar", "a tar archive: build an image from its contents"),
    (0, b"PK\x03\x04", "a zip archive: build an image from its contents"),
    (0, b"XFSB", "an XFS file system: use squashfs or erofs"),
    (0x8001, b"CD001", "an ISO 9660 image: use squashfs or erofs"),
    (0, b"sqsh", "a big-endian squashfs: build it with mksquashfs 4 or later"),
)


_FROM_UUIDS = (
    "the UUIDs of its partitions (where systemd 257 and older look for none, and see it as unprotected)"
)
_NO_IMAGE = "no squashfs, erofs, ext4 or btrfs image"
_TEXT = 1024


def probe(fd: int, size: int) -> Image:
    """What the file behind `fd` is: complete, and not in contradiction with itself.

    Args:
        size: of the file, bytes.

    Raises:
        Incomplete: bytes are missing; says how many there are and how many it takes.
        Sysext: a disk image with a usr partition alone.
        Refused: empty, of an unknown kind, of two kinds at once, or contradicting itself.
        Busy: it became shorter meanwhile.
        OSError: it could not be read.
    """
    if size == 0:
        raise Refused("empty")
    head = read_all(fd, min(size, HEAD), 0)
    if gpt.recognises(head):
        return _in_partition(fd, head, size)
    found = _recognised(head, size)
    end = found.complete(head, size)
    found.verify(head)
    return Image(found, end)


def _in_partition(fd: int, head: bytes, size: int) -> Image:
    for format in _FORMATS:
        if format.recognises(head):
            raise Refused(f"ambiguous: it is a disk image and {format.name}")
    table = gpt.read(fd, head, size)
    root = disk.root(table)
    partition = root.partition
    brought, end = _brought(fd, root)
    inner = read_all(fd, min(end, HEAD), partition.start)
    try:
        found = _recognised(inner, end)
        found.complete(inner, end)
        found.verify(inner)
    except Refused as refused:
        raise Refused(f"its root partition (number {partition.number}): {refused}") from None
    return Image(found, table.end, partition.start, end, brought, parts=root.parts)


def _brought(fd: int, root: disk.Root) -> tuple[Brought | None, int]:
    """What a disk image brings to be verified by, and how many bytes of its root partition that covers.

    Without verity data that is all of it. Nothing is verified here.
    """
    if root.verity is None:
        return None, root.partition.size
    tree = Extent(fd, root.verity.start, root.verity.size)
    data_size = verity.read(tree, root.partition.size).data_size
    if root.signature is None:
        root_hash = root.partition.id.bytes + root.verity.id.bytes
        return Brought(tree.offset, tree.size, root_hash, _FROM_UUIDS), data_size
    if root.signature.size > signature.PARTITION_MAX:
        raise Refused(
            f"its signature partition has {root.signature.size} bytes, {signature.PARTITION_MAX} is the limit"
        )
    signed = signature.parse(read_all(fd, root.signature.size, root.signature.start))
    return Brought(tree.offset, tree.size, signed.root_hash, "its signature", signed.signature), data_size


def _recognised(head: bytes, size: int) -> Format:
    found = [format for format in _FORMATS if format.recognises(head)]
    if len(found) > 1:
        # libblkid, and so systemd, takes it for neither.
        raise Refused(f"ambiguous: it is {' and '.join(format.name for format in found)}")
    if not found:
        raise _unknown(head, size)
    return found[0]


def _unknown(head: bytes, size: int) -> Refused:
    for offset, magic, hint in _HINTS:
        if head[offset : offset + len(magic)] == magic:
            return Refused(hint)
    if size >= 1024 and not any(head):
        # Space set aside by `rsync --preallocate` or fallocate(1) before the bytes come.
        return Incomplete(f"nothing but zeros in its first {len(head)} bytes: not uploaded yet")
    try:
        # The last character may be cut off by the end of what was read.
        text = head[:_TEXT].decode("utf-8-sig", "strict" if size <= _TEXT else "ignore").lstrip().lower()
    except UnicodeDecodeError:
        return Refused(_NO_IMAGE)
    for start, hint in _TEXTS:
        if text.startswith(start):
            return Refused(f"{_NO_IMAGE}, but {hint}")
    printable = text and all(char.isprintable() or char.isspace() for char in text)
    return Refused(f"{_NO_IMAGE}, but a text: build an image with mksquashfs" if printable else _NO_IMAGE)
