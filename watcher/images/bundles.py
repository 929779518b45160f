# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image in the store with what lies beside it: a directory of that digest.

    image.raw
    protected.raw -> image.raw  protected.verity  protected.roothash  protected.roothash.p7s

The digest is that of the directory as a tree (tree.py). So a content is image, root hash and signature together: what
is proved depends on all of them, an image with another signature is another content, and a rollback gets them all. The
root hash is written in one form, wherever it came from; the copy of the image has no attribute that would beat it.

Where there is a device mapper, a slot gets a link for each of the second line, so that systemd finds beside the slot
what it finds beside the image, and sets up dm-verity. Where there is none it could not: it gets the image alone, which
was verified, and the unit's drop-in says that this will do (unit_drop_in.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from watcher.images import sidecars as beside_image
from watcher.images import tree
from watcher.images.files import copy_file, digest_of
from watcher.images.formats.image import Image
from watcher.images.formats.probe import probe
from watcher.images.sidecars import Beside, VerityData
from watcher.images.verification import Verity
from watcher.model import Copy, Kind, Layer
from watcher.resolve import sidecars
from watcher.settings import device_mapper
from watcher.watch.lease import Lease

IMAGE = "image.raw"
STEM = "protected"
PROTECTED = f"{STEM}.raw"
_SMALL = 1 << 16
"""Bytes. Root hash and signature take no more."""
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_STORE = "../../../store"


class _Unhashed:
    """The digest is taken of the whole directory."""

    def update(self, data: bytes | memoryview, /) -> None:
        pass


def write(target: int, image: int, image_lease: Lease, parts: VerityData) -> tuple[str, int]:
    """Fill the empty directory `target`: the digest of it, and how many files there are.

    Raises:
        Busy: an image or tree is written to.
        OSError: reading or writing failed.
    """
    _copy(target, IMAGE, image, os.fstat(image).st_size, image_lease)
    files = 2
    if parts.tree is not None:
        with Lease(parts.tree.fd) as lease:
            _copy(target, STEM + sidecars.VERITY, parts.tree.fd, parts.tree.size, lease)
        files += 1
    os.symlink(IMAGE, PROTECTED, dir_fd=target)
    for suffix, content in (
        (sidecars.ROOT_HASH, _line(parts.root_hash)),
        (sidecars.SIGNATURE, parts.signature),
    ):
        if content is not None:
            _write(target, STEM + suffix, content)
            files += 1
    return tree.digest(target, whole=True), files


def find(store: int, image: int, image_lease: Lease, parts: VerityData) -> str:
    """The digest of the bundle in a store that `write()` would make, "" if it is not there. Takes no room.

    Raises: as `write()`.
    """
    contents = {
        sidecars.ROOT_HASH: _line(parts.root_hash),
        sidecars.SIGNATURE: parts.signature,
        sidecars.VERITY: parts.tree and _content(parts.tree.fd, parts.tree.size),
        ".raw": _content(image, os.fstat(image).st_size),
    }
    image_lease.check()
    wanted = {suffix: content for suffix, content in contents.items() if content is not None}
    for name in os.listdir(store):
        with suppress(NotADirectoryError, FileNotFoundError):  # a plain image, or it has just been collected
            directory = os.open(name, _READ | os.O_DIRECTORY, dir_fd=store)
            try:
                if not name.startswith(".") and is_bundle(directory) and _has(directory, wanted):
                    return name
            finally:
                os.close(directory)
    return ""


def _content(fd: int, size: int) -> tuple[int, str]:
    """What tells a large file from others."""
    return size, digest_of(fd, size)


def _has(directory: int, wanted: Mapping[str, object]) -> bool:
    with _opened(directory) as fds:
        if fds.keys() != wanted.keys():
            return False
        for suffix, content in wanted.items():
            size = os.fstat(fds[suffix]).st_size
            if isinstance(content, bytes):
                if os.pread(fds[suffix], len(content) + 1, 0) != content:
                    return False
            elif isinstance(content, tuple) and (
                size != content[0] or _content(fds[suffix], size) != content
            ):
                return False
    return True


def size_of(directory: int) -> int:
    """Bytes that a bundle takes, as `tree.in_blocks()` has it."""
    sizes = (os.stat(name, dir_fd=directory, follow_symlinks=False).st_size for name in os.listdir(directory))
    return sum(map(tree.in_blocks, sizes))


def room(image: int, parts: VerityData) -> int:
    """Bytes to set aside for a bundle with an image of so many bytes."""
    return tree.in_blocks(image) + tree.in_blocks(parts.tree.size if parts.tree else 0) + _SMALL


def is_bundle(directory: int) -> bool:
    """Whether a directory in the store is one, and not the copy of a tree, which has nothing but `etc` in it."""
    return is_at(f"/proc/self/fd/{directory}")


def is_at(path: str) -> bool:
    """`is_bundle()` by path."""
    return os.path.lexists(f"{path}/{IMAGE}")


def image_in(directory: int) -> Image:
    """What is in a bundle. Raises as `probe()`."""
    with _opened(directory) as fds:
        return _image(fds)


def copy(directory: int, digest: str, path: str) -> Copy:
    """The copy that a bundle at that path is. Raises as `probe()`."""
    size, image = size_of(directory), image_in(directory)
    return Copy(digest, f"{path}/{IMAGE}", size, Kind.IMAGE, image, protected=f"{path}/{PROTECTED}")


@contextmanager
def verity(copy: Copy) -> Iterator[Verity | None]:
    """What the copy of an image is to be verified by. Raises OSError."""
    if not isinstance(copy.format, Image) or copy.format.brought is None:
        yield None
        return
    if not is_in_bundle(copy):
        fd = os.open(copy.path, _READ)
        try:
            yield copy.format.verity(fd)
        finally:
            os.close(fd)
        return
    directory = os.open(os.path.dirname(copy.path), _READ | os.O_DIRECTORY)
    try:
        with _opened(directory) as fds:
            yield copy.format.verity(fds[".raw"], fds.get(sidecars.VERITY))
    finally:
        os.close(directory)


def is_in_bundle(copy: Copy) -> bool:
    return copy.kind is Kind.IMAGE and os.path.basename(copy.path) == IMAGE


def links(store: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """The slots that a layer needs, and where each leads to, from a stack (stacks.py)."""
    copy = f"{store}/{layer.digest}"
    if layer.kind is Kind.DIRECTORY or not os.path.isdir(copy):
        yield layer.slot, f"{_STORE}/{layer.digest}"
        return
    if not device_mapper.is_there():
        yield layer.slot, f"{_STORE}/{layer.digest}/{IMAGE}"
        return
    for name in sorted(os.listdir(copy)):
        if name.startswith(STEM):
            yield sidecars.stem(layer.slot) + name.removeprefix(STEM), f"{_STORE}/{layer.digest}/{name}"


def fits(stack: str) -> bool:
    """Whether the links of a stack at that path are those of `links()`: a device mapper may have come or gone."""
    there = {os.path.basename(os.readlink(one.path)) for one in os.scandir(stack) if one.is_symlink()}
    if device_mapper.is_there():
        return IMAGE not in there
    return not any(name.startswith(STEM) for name in there)


def slots(stack: str) -> dict[str, str]:
    """Digest by slot, as the links of a stack at that path have it: a start goes by these, not by the record."""
    names = (name for name in os.listdir(stack) if not name.startswith("."))
    found = {name: _digest_in(os.readlink(f"{stack}/{name}")) for name in names}
    return {name: digest for name, digest in found.items() if digest}


def _digest_in(link: str) -> str:
    """The digest of the layer that a link of `links()` stands for, "" for one of what lies beside an image."""
    digest, _, name = link.removeprefix(f"{_STORE}/").partition("/")
    return digest if name in ("", IMAGE, PROTECTED) else ""


def _image(fds: Mapping[str, int]) -> Image:
    size = os.fstat(fds[".raw"]).st_size
    others = {suffix: fd for suffix, fd in fds.items() if suffix != ".raw"}
    parts = beside_image.read(Beside(others, {one: STEM + one for one in others}), IMAGE)
    return beside_image.with_parts(probe(fds[".raw"], size), parts, size, IMAGE)


@contextmanager
def _opened(directory: int) -> Iterator[dict[str, int]]:
    """All files of a bundle, by suffix."""
    with ExitStack() as stack:
        fds = {}
        for suffix in (".raw", *sidecars.SUFFIXES):
            name = IMAGE if suffix == ".raw" else STEM + suffix
            try:
                fd = os.open(name, _READ, dir_fd=directory)
            except FileNotFoundError:
                continue
            stack.callback(os.close, fd)
            fds[suffix] = fd
        yield fds


def _line(root_hash: bytes | None) -> bytes | None:
    return None if root_hash is None else f"{root_hash.hex()}\n".encode()


def _copy(target: int, name: str, source: int, size: int, lease: Lease) -> None:
    made = os.open(name, _NEW, 0o400, dir_fd=target)
    try:
        os.fchmod(made, 0o400)  # open(2) has applied the umask
        copy_file(source, made, size, _Unhashed(), lease)
    finally:
        os.close(made)


def _write(target: int, name: str, content: bytes) -> None:
    made = os.open(name, _NEW, 0o400, dir_fd=target)
    with os.fdopen(made, "wb") as file:
        os.fchmod(made, 0o400)
        file.write(content)
