# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher build`: an image made from a directory or from single files, and checked before it is put in place.

The same content is the same image: no time, owner or place of the build machine gets in, see build_stage.py and
build_tools.py. So a service is not reloaded for what was only built again.

All is made in a private temporary directory. What is done where the image is to lie, which may be a drop directory, or
belong to a user, is done by descriptor, under a name that is not looked at, and ends with a rename.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

from watcher.images import build_tools, sidecars, staging
from watcher.images.build_sources import source
from watcher.images.build_stage import Stage
from watcher.images.extension import RELEASE_DIRECTORY, read_release
from watcher.images.image_check import Examined, examine, require_name
from watcher.images.made_for import Host, host, parsed
from watcher.model import Busy, Kind, Refused, shown
from watcher.mounts.descriptors import Descriptors
from watcher.resolve import release, vpick
from watcher.settings import architectures

FORMATS = ("squashfs", "erofs", "ddi")
SCOPES = ("system", "initrd", "portable")
"""CONFEXT_SCOPE= in os-release(5)."""

_EPOCH = 1
"""Time of all files without SOURCE_DATE_EPOCH: 1970, and not 0, which some programs take for "never"."""
_EPOCH_MAX = 0xFFFFFFFF
_VALUE = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be built.

    Attributes:
        sources: words of the command line, see `build_sources`.
        output: a file, or a directory for `NAME_VERSION.raw`; "": this one.
        name, version: "" where the file name has them.
        scope: words of SCOPES.
        made_for: "any", "host", "ID" or "ID:VERSION_ID"; "": what a source says, else any.
        format: one of FORMATS.
        key, certificate: paths of PEM files, "" for none.
    """

    sources: tuple[str, ...]
    output: str = ""
    name: str = ""
    version: str = ""
    scope: tuple[str, ...] = ()
    made_for: str = ""
    format: str = "squashfs"
    key: str = ""
    certificate: str = ""


class Built(NamedTuple):
    """
    Attributes:
        path: of the image.
        examined: what `check` finds, None where it could not look.
        unchecked: why it could not.
        notes: what is otherwise in the image than in the sources, and where it does not fit.
    """

    path: str
    examined: Examined | None
    unchecked: str
    notes: tuple[str, ...]


def build(order: Order, image_max: int) -> Built:
    """Make an image and put it in place.

    Args:
        image_max: bytes, of the image and of what is in it (`ImageMax=`).

    Raises:
        Refused: it cannot be made so, or would not be admitted; nothing has been written.
        Busy: a source is being written, or a tool is missing.
        OSError: reading or writing failed.
    """
    directory, filename = _target(order.output, order.name, order.version)
    epoch = _epoch()
    sources = [source(word) for word in order.sources]
    for path in filter(None, (order.key, order.certificate)):
        with open(path, "rb"):
            pass
    os.stat(directory or ".")
    with (
        tempfile.TemporaryDirectory(prefix="confext-watcher-build-", dir=staging.directory()) as scratch,
        Descriptors() as fds,
    ):
        os.mkdir(f"{scratch}/tree", 0o755)
        os.chmod(f"{scratch}/tree", 0o755)
        tree = fds.add(os.open(f"{scratch}/tree", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        stage = Stage(tree, image_max)
        try:
            for one in sources:
                stage.add(one)
        except OSError as error:
            error.filename = error.filename or scratch  # a write, such as to a disk that is full
            raise
        made_for, foreign = _release(stage, tree, filename, order)
        os.mkdir(f"{scratch}/made")
        made = f"{scratch}/made/{filename}"
        _make(order, scratch, made, epoch)
        examined, unchecked = _examined(made, made_for, image_max, filename)
        mode = 0o600 if stage.private else 0o666
        path = _place(made, directory, filename, mode)
    return Built(path, examined, unchecked, (*stage.notes(), *_placed(path, private=stage.private), *foreign))


def _target(output: str, name: str, version: str) -> tuple[str, str]:
    """The directory and file name of the image, by what was given of it. Raises Refused."""
    directory, filename = os.path.split(output)
    if not filename or os.path.isdir(output):
        directory = output
        spec = vpick.parse_path(os.path.abspath(directory), Kind.IMAGE)
        name = name or (spec.basename if spec else "")
        if not name:
            raise Refused("how is it to be called? `-o NAME_VERSION.raw`, or --name and --version")
        if spec and not version:
            raise Refused(f"{shown(output)} is a directory of versions: --version is missing")
        filename = f"{name}_{version}.raw" if version else f"{name}.raw"
    if "/" in filename or "\0" in filename:
        raise Refused(f"{shown(filename)}: a name has no / in it")
    try:
        require_name(os.path.abspath(directory), filename, Kind.IMAGE)
    except Refused as refused:
        raise Refused(f"{shown(filename)}: {refused}") from None
    _require_named(filename, name, version)
    return directory, filename


def _require_named(filename: str, name: str, version: str) -> None:
    """Refuse a file name that systemd takes for another name or version than was said."""
    found, found_version = vpick.split(filename, Kind.IMAGE)
    if not found:
        raise Refused(f"{shown(filename)} has no name before the version: call it NAME_VERSION.raw")
    if name not in ("", found):
        raise Refused(
            f"{shown(filename)} is an image of the name {shown(found)}, and not {shown(name)} (--name)"
        )
    if version not in ("", found_version):
        what = f"version {shown(found_version)}" if found_version else "no version"
        hint = "letters, digits and -.~^ may be in one"
        raise Refused(f"{shown(filename)} has {what}, and not {shown(version)} (--version): {hint}")


def _epoch() -> int:
    """Time of all files in the image, seconds since 1970: SOURCE_DATE_EPOCH, or always the same."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return _EPOCH
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _EPOCH_MAX:
        raise Refused(f"SOURCE_DATE_EPOCH={shown(text)}: must be seconds since 1970, {_EPOCH_MAX} at most")
    return int(text)


def _release(stage: Stage, tree: int, filename: str, order: Order) -> tuple[Host, tuple[str, ...]]:
    """Write the release file unless a source has one. Returns what the image is made for, and if that is not here."""
    name = release.PREFIX + release.base_name(filename)
    exact = release.PREFIX + release.image_name(filename)
    directory = tuple(RELEASE_DIRECTORY.split("/"))
    present = next((one for one in (exact, name) if stage.has((*directory, one))), "")
    if not present:
        stage.write(tree, (*directory, name), _release_text(order))
    elif order.made_for or order.scope:
        raise Refused(
            f"{RELEASE_DIRECTORY}/{shown(present)} is in it already: remove that, or leave out --for and --scope"
        )
    here = host()
    text = read_release(tree)[0][present or name]
    found = parsed(text)
    try:
        release.match(found, here.os_release, here.architecture)
    except Refused as refused:
        if "ID" not in found:
            return here, ()  # `check` refuses it anywhere
        theirs = {key: found[key] for key in ("ID", "VERSION_ID", "CONFEXT_LEVEL") if key in found}
        wanted = found.get("ARCHITECTURE", "")
        architecture = wanted if wanted in architectures.NAMES else here.architecture
        return Host(theirs, architecture), (f"it would be refused on this host: {refused}",)
    return here, ()


def _release_text(order: Order) -> str:
    identity, _, version = (order.made_for or "any").partition(":")
    if order.made_for == "host":
        ours = host().os_release
        identity, version = ours.get("ID", "linux"), ours.get("VERSION_ID", "")
    lines = {"ID": "_any" if identity == "any" else identity, "VERSION_ID": version}
    for key, value in lines.items():
        if (value or key == "ID") and not _VALUE.fullmatch(value):
            raise Refused(
                f"--for {shown(order.made_for)}: must be any, host, or ID:VERSION_ID as in /etc/os-release"
            )
    if identity == "any" and version:
        raise Refused(
            f"--for {shown(order.made_for)}: an image for any system is for any version: `--for any`"
        )
    lines["CONFEXT_SCOPE"] = f'"{" ".join(order.scope)}"' if order.scope else ""
    return "".join(f"{key}={value}\n" for key, value in lines.items() if value)


def _make(order: Order, scratch: str, made: str, epoch: int) -> None:
    tree = f"{scratch}/tree"
    if order.format == "erofs":
        build_tools.erofs(tree, made, epoch)
    elif order.format == "squashfs":
        build_tools.squashfs(tree, made, epoch)
    else:
        build_tools.squashfs(tree, f"{scratch}/content", epoch)
        build_tools.disk(f"{scratch}/content", f"{scratch}/disk", epoch, order.key, order.certificate)
        os.rename(f"{scratch}/disk", made)


def _examined(made: str, made_for: Host, image_max: int, filename: str) -> tuple[Examined | None, str]:
    try:
        return examine(made, made_for, image_max), ""
    except Refused as refused:
        raise Refused(f"{shown(filename)} is not written, it would be refused: {refused}") from None
    except Busy as busy:
        return None, str(busy)


def _placed(path: str, *, private: bool) -> list[str]:
    """What there is to say of an image where it lies."""
    said = (
        ["it can be read by you alone (mode 0600), since it has files that are for root alone"]
        if private
        else []
    )
    if beside := sidecars.found(os.path.abspath(path)):
        names = ", ".join(map(shown, beside))
        said.append(f"beside it is {names}: that has to be of this very image, or it is refused")
    return said


def _place(made: str, directory: str, filename: str, mode: int) -> str:
    """Bring a file into a directory, on the disk, by one rename. Returns its path."""
    with Descriptors() as fds:
        parent = fds.add(os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        part = f".#confext-watcher-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(made, "rb") as whole, open(os.open(part, flags, mode, dir_fd=parent), "wb") as file:
                shutil.copyfileobj(whole, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, filename, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=parent)
            if isinstance(error, OSError) and error.filename in (None, part):
                error.filename = os.path.join(directory, filename)
            raise
        os.fsync(parent)
    return os.path.join(directory, filename)
