# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files beside an image that it is verified by: read as systemd reads them, and refused where they do not fit.

The rules are those of verity_settings_load() and dissect_image() of systemd: the extended attribute
`user.verity.roothash` of the image beats its `.roothash`; without a root hash the signature is not looked at; a
`.verity` beside a disk image is an error. Where systemd goes on without verifying anything (a root hash without a tree,
a tree without a root hash), the rest is taken to be on its way: image and files beside it are one drop.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

from watcher.images import tries
from watcher.images.files import stat_key
from watcher.images.formats import verity
from watcher.images.formats.base import Extent, read_all
from watcher.images.formats.image import Brought, Image
from watcher.images.opened import opened
from watcher.model import Candidate, Copy, Incomplete, Refused, Unsafe, shown
from watcher.resolve import sidecars
from watcher.resolve.sidecars import ROOT_HASH, SIGNATURE, VERITY
from watcher.resolve.strict_modes import StrictModes

XATTR = "user.verity.roothash"
_HASH_MIN = 16
"""Bytes. systemd takes no shorter one."""
_TEXT_MAX = 4096
_SIGNATURE_MAX = 64 * 1024
_NO_XATTR = (errno.ENODATA, errno.EOPNOTSUPP, errno.ERANGE, errno.E2BIG)


class Beside(NamedTuple):
    """What lies beside an image, open.

    Attributes:
        fds: by suffix; files.
        names: by suffix, for people.
        attribute: XATTR of the image, b"" without one.
    """

    fds: dict[str, int]
    names: dict[str, str]
    attribute: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.fds or self.attribute)

    @property
    def key(self) -> tuple[object, ...]:
        """What `stat` says of them."""
        files = ((one, *stat_key(os.fstat(fd))) for one, fd in self.fds.items())
        return (self.attribute, *files) if self else ()

    @property
    def changed_ns(self) -> int:
        """Ctime of the youngest; 0 without one."""
        return max((os.fstat(fd).st_ctime_ns for fd in self.fds.values()), default=0)


class VerityData(NamedTuple):
    """What the files beside an image say.

    Attributes:
        tree: the verity superblock and hash tree, None without.
        root_hash, signature: None without.
        root_hash_from: for people.
    """

    tree: Extent | None
    root_hash: bytes | None
    signature: bytes | None
    root_hash_from: str


@contextmanager
def beside(candidate: Candidate, image: int, modes: StrictModes | None) -> Iterator[Beside]:
    """What lies beside a candidate, open for reading; `image` is open, too.

    Raises: as `opened()`, with the name of the file.
    """
    with ExitStack() as stack:
        found = Beside({}, {}, _attribute(image))
        for name in candidate.sidecars:
            path = f"{os.path.dirname(candidate.path)}/{name}"
            one = replace(candidate, path=path, filename=name)
            try:
                fd, _ = stack.enter_context(opened(one, modes))
            except Unsafe as unsafe:
                text = f"{shown(name)} beside it: {unsafe}"
                raise Unsafe(text, unsafe.path, hidden=unsafe.hidden) from unsafe
            except Refused as refused:
                raise Refused(f"{shown(name)} beside it: {refused}") from refused
            found.fds[sidecars.suffix(name)] = fd
            found.names[sidecars.suffix(name)] = name
        yield found


@contextmanager
def explained(there_are: bool) -> Iterator[None]:
    """Say of a refusal that it is because of what lies beside an image, if there is anything."""
    try:
        yield
    except Refused as refused:
        if not there_are:
            raise
        raise type(refused)(f"with what lies beside it: {refused}") from refused


def found(path: str) -> tuple[str, ...]:
    """The names of what lies beside an image, as a look at its directory has them."""
    directory, name = os.path.split(path)
    names = (*sidecars.names(name), *sidecars.names(os.path.basename(tries.plain(path))))
    there = {sidecars.suffix(one): one for one in reversed(names) if os.path.lexists(f"{directory}/{one}")}
    return tuple(there[one] for one in sidecars.SUFFIXES if one in there)


def misnamed(path: str) -> Iterator[str]:
    """What to say of files beside an image that are meant for it, and called so that nobody looks at them."""
    directory, name = os.path.split(path)
    for suffix in sidecars.SUFFIXES:
        if os.path.lexists(f"{directory}/{name}{suffix}"):
            meant = sidecars.meant(name + suffix)
            yield f"{shown(name + suffix)} beside it is never looked at under that name: call it {shown(meant)}"


def has_new(candidate: Candidate) -> bool:
    """Whether something has come beside a candidate since the look that found it.

    A look finds nothing beside an image that is not called so (`/srv/x.v/web___.img`).
    """
    if not candidate.filename.endswith(".raw"):
        return False
    directory = os.path.dirname(candidate.path)
    had = {sidecars.suffix(name) for name in candidate.sidecars}
    names = (name for name in sidecars.names(candidate.filename) if sidecars.suffix(name) not in had)
    return any(os.path.lexists(f"{directory}/{name}") for name in names)


def read(found: Beside, image: str) -> VerityData:
    """What the files say; `image` is the name of the image, for people.

    Raises:
        Incomplete: one is empty, or one is missing.
        Refused: one is not what its name says.
        Busy, OSError: it cannot be read.
    """
    tree = _extent(found.fds.get(VERITY))
    root_hash, origin = _root_hash(found)
    signature = _signature(found)
    if root_hash is None and (tree is not None or signature is not None):
        raise _awaits(sidecars.stem(image) + ROOT_HASH)
    return VerityData(tree, root_hash, signature, origin)


def with_parts(image: Image, parts: VerityData, size: int, name: str) -> Image:
    """An image with what lies beside it.

    Args:
        size: of the file, bytes.
        name: of the image, for people.

    Raises:
        Incomplete: the tree is not there, or not all of it.
        Refused: it does not go with the image.
    """
    if image.offset:
        return _disk_image(image, parts)
    if parts.root_hash is None:
        return image
    if parts.tree is None:
        raise _awaits(sidecars.stem(name) + VERITY)
    covered = verity.read(parts.tree, size).data_size
    if covered < image.end:
        raise Refused(
            f"the hash tree beside it covers {covered} bytes, and the file system has {image.end}: they are of"
            " different images"
        )
    brought = Brought(0, parts.tree.size, parts.root_hash, parts.root_hash_from, parts.signature, beside=True)
    return replace(image, size=covered, brought=brought)


def awaited(candidate: Candidate, copy: Copy, *, signature: bool) -> str:
    """Which files beside an image may still come, where it is not trusted without them; "" if none would help.

    Args:
        signature: it needs that, too.
    """
    if not isinstance(copy.format, Image) or copy.format.offset:
        return ""
    there = {sidecars.suffix(name) for name in candidate.sidecars}
    needed = sidecars.SUFFIXES if signature else (VERITY, ROOT_HASH)
    missing = [one for one in needed if one not in there]
    stem = sidecars.stem(candidate.filename)
    return ", ".join(shown(stem + one) for one in missing)


def _disk_image(image: Image, parts: VerityData) -> Image:
    if parts.tree is not None:
        raise Refused(
            "a disk image with a .verity beside it: its verity data is a partition, remove the file"
        )
    if parts.root_hash is None:
        return image
    if image.brought is None:
        raise Refused(
            "a disk image without verity data, and a root hash beside it: they are not of each other"
        )
    if image.brought.root_hash != parts.root_hash:
        raise Refused("the root hash beside it is not that of the disk image: it is of another one")
    signature = parts.signature or image.brought.signature
    return replace(
        image, brought=replace(image.brought, signature=signature, root_hash_from=parts.root_hash_from)
    )


def _awaits(name: str) -> Incomplete:
    return Incomplete(f"incomplete: {shown(name)} beside it is awaited")


def _attribute(image: int) -> bytes:
    try:
        return os.getxattr(image, XATTR)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return b""
        raise


def _extent(fd: int | None) -> Extent | None:
    return None if fd is None else Extent(fd, 0, os.fstat(fd).st_size)


def _root_hash(found: Beside) -> tuple[bytes | None, str]:
    """The root hash, and where it is from."""
    if found.attribute:
        return _parsed(found.attribute, XATTR), f"its attribute {XATTR}"
    if ROOT_HASH not in found.fds:
        return None, ""
    name = found.names[ROOT_HASH]
    content = _content(found, ROOT_HASH, _TEXT_MAX)
    return _parsed(content.split(b"\n")[0], name), "the .roothash beside it"


def _parsed(text: bytes, name: str) -> bytes:
    digits = b"".join(text.split())
    if not re.fullmatch(rb"(?:[0-9A-Fa-f]{2})*", digits):
        raise Refused(f"{shown(name)} beside it is no root hash in hexadecimal digits")
    if len(digits) < 2 * _HASH_MIN:
        raise Refused(
            f"{shown(name)} beside it has a root hash of {len(digits) // 2} bytes, {_HASH_MIN} is the least"
        )
    return bytes.fromhex(digits.decode())


def _signature(found: Beside) -> bytes | None:
    return _content(found, SIGNATURE, _SIGNATURE_MAX) if SIGNATURE in found.fds else None


def _content(found: Beside, suffix: str, limit: int) -> bytes:
    fd, name = found.fds[suffix], shown(found.names[suffix])
    size = os.fstat(fd).st_size
    if size > limit:
        raise Refused(f"{name} beside it has {size} bytes, {limit} is the limit")
    if size == 0:
        raise Incomplete(f"incomplete: {name} beside it is empty")
    return read_all(fd, size, 0)
