# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a unit declares and what lies in its `.confext.d/` directories, made into one ordered list of entries.

Bottom to top: the declared `ExtensionImages=`, the images of `.confext.d/` by name, the declared
`ExtensionDirectories=`, the directories of `.confext.d/` by name. Pure: `scan.py` reads the directories.

An entry of `.confext.d/` goes by its own name, also if it is a link: `NAME.raw` (image), `NAME/` (directory tree),
`NAME.raw.v/` (versioned images), `NAME.v/` (versioned trees). The order is that of NAME, byte by byte, so that
`web.raw` may become `web.raw.v/` and keep its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from watcher.model import Declared, Entry, Kind, Remark, shown
from watcher.resolve import sidecars, vpick
from watcher.resolve.vpick import Dirent
from watcher.settings.values import normalized

ENTRY_NAME = vpick.NO_LEFTOVER
"""Regular expression (`re.fullmatch`) of the names in a `.confext.d/` that can be an entry."""

_RESERVED = ("stack.json",)
_NAME_MAX = 255


@dataclass(frozen=True, slots=True)
class Listing:
    """One `.confext.d/` as it was read."""

    path: str
    dirents: tuple[Dirent, ...]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Entries bottom to top, with what there is to say about the rest."""

    entries: tuple[Entry, ...]
    remarks: tuple[Remark, ...]


def declare(
    images: Iterable[tuple[str, str, bool]],
    directories: Iterable[tuple[str, bool]],
    confext_dirs: Iterable[str] = (),
) -> Declared:
    """What a unit, or the command line, declares.

    Args:
        images: (path, mount options, optional), as `values.extension_images()` gives them.
        directories: (path, optional), as `values.extension_directories()` gives them.
        confext_dirs: highest precedence first.
    """
    return Declared(
        tuple(entry(path, Kind.IMAGE, optional=opt, declared=True, options=o) for path, o, opt in images),
        tuple(entry(path, Kind.DIRECTORY, optional=opt, declared=True) for path, opt in directories),
        tuple(confext_dirs),
    )


def entry(path: str, kind: Kind, *, optional: bool, declared: bool, options: str = "") -> Entry:
    """An entry for `path`, in `.v/` form or not; its slot is unique only after `resolve()`."""
    path = normalized(path)
    spec = vpick.parse_path(path, kind)
    name = spec.basename if spec else vpick.split(path.rpartition("/")[2], kind)[0]
    return Entry(slot_name(name, kind), path, kind, optional, declared, options)


def slot_name(name: str, kind: Kind) -> str:
    """The slot for an extension's name: "web" is "web.raw" or "web".

    A slot stands in a unit file, between colons, under a unit's name. So "_" replaces what has a meaning there
    (specifiers, quotes, white space, backslashes), what is not ASCII, and what would read as `.v/` form.
    """
    suffix = ".raw" if kind is Kind.IMAGE else ""
    if kind is Kind.DIRECTORY and sidecars.suffix(name):
        name = name.replace(".", "_")  # beside the slot of an image, systemd would take it for its sidecar
    safe = re.sub(r"[^A-Za-z0-9._@~-]|\A\.", "_", name)[: _room(kind)] or "_"
    return re.sub(r"\.v\Z", "_v", safe).replace("___", "__-") + suffix


def _room(kind: Kind) -> int:
    """Characters for the name in a slot: systemd looks for the sidecars of an image beside it."""
    return _NAME_MAX - (len(sidecars.SIGNATURE) if kind is Kind.IMAGE else 0)


def resolve(declared: Declared, listings: Sequence[Listing]) -> Resolved:
    """All entries of a service, bottom to top, with slots of their own.

    Args:
        listings: the `.confext.d/` directories that exist, highest precedence first; a name in an earlier one wins.
    """
    dropped, remarks = _dropped(listings)
    entries = (
        *declared.images,
        *(entry for entry in dropped if entry.kind is Kind.IMAGE),
        *declared.directories,
        *(entry for entry in dropped if entry.kind is Kind.DIRECTORY),
    )
    return Resolved(_distinct(entries), tuple(remarks))


def _dropped(listings: Sequence[Listing]) -> tuple[list[Entry], list[Remark]]:
    found: list[Entry] = []
    remarks: list[Remark] = []
    taken: dict[str, str] = {}
    for listing in listings:
        for dirent in sorted(listing.dirents, key=lambda d: os.fsencode(d.name)):
            path = f"{listing.path}/{dirent.name}"
            outcome = _classify(path, dirent)
            if isinstance(outcome, Remark):
                remarks.append(outcome)
                continue
            if winner := taken.get(dirent.name):
                remarks.append(Remark("debug", path, f"overridden by {winner}"))
                continue
            taken[dirent.name] = path
            if isinstance(outcome, Entry):
                found.append(outcome)
            else:
                remarks.append(Remark("debug", path, "a link to /dev/null: masks entries of this name"))
    return sorted(found, key=_order), remarks


def _order(dropped: Entry) -> tuple[bytes, bytes]:
    filename = dropped.path.rpartition("/")[2]
    return os.fsencode(_form(filename)[0]), os.fsencode(filename)


def _classify(path: str, dirent: Dirent) -> Entry | Remark | None:
    """An entry, a reason why it is none, or None for a mask."""
    if not re.fullmatch(ENTRY_NAME, dirent.name):
        return Remark("debug", path, "ignored: a hidden, backup or temporary name")
    if dirent.type == "null":
        return None
    name, kind, versioned = _form(dirent.name)
    if remark := _mismatch(path, dirent, name, kind, versioned):
        return remark
    return Entry(slot_name(name, kind), path, kind, optional=True, declared=False)


def _form(filename: str) -> tuple[str, Kind, bool]:
    """(NAME, kind, in `.v/` form) by the file name alone."""
    stem, versioned = (filename[:-2], True) if filename.endswith(".v") else (filename, False)
    if stem.endswith(".raw"):
        return stem.removesuffix(".raw"), Kind.IMAGE, versioned
    return stem, Kind.DIRECTORY, versioned


def _mismatch(path: str, dirent: Dirent, name: str, kind: Kind, versioned: bool) -> Remark | None:
    """What is wrong with an entry of this form being what it is."""
    directory = versioned or kind is Kind.DIRECTORY
    if dirent.type != "directory" and (meant := sidecars.meant(dirent.name)):
        return Remark(
            "warning", path, f"ignored: a file beside an image is called without .raw: {shown(meant)}"
        )
    if dirent.type == "missing" and kind is Kind.DIRECTORY and not versioned:
        return Remark("warning", path, f"ignored: {dirent.problem or 'a dangling link'}")
    if dirent.type == "missing" or (dirent.type == "other" and dirent.problem):
        return None  # its file has yet to come, or cannot be reached: the look at it says so
    if dirent.type in (("directory",) if directory else ("file", "block")):
        return None
    if versioned:
        return Remark("warning", path, "ignored: not a directory, as the name promises")
    if directory:
        what = "beside an image" if sidecars.suffix(dirent.name) else "neither NAME.raw nor a directory"
        return Remark("debug", path, f"ignored: {what}")
    if dirent.type == "directory":
        hint = f"versions go into {shown(name)}.raw.v/"
        return Remark("warning", path, f"ignored: a directory, no image ({hint})")
    return Remark("warning", path, "ignored: not a regular file")


def _distinct(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Slots made unique, the lowest layer keeping its name: "web.raw", "web~2.raw"."""
    taken = set(_RESERVED)
    result = []
    for item in entries:
        slot, number = item.slot, 2
        while slot in taken:
            mark, suffix = f"~{number}", ".raw" if item.kind is Kind.IMAGE else ""
            stem = item.slot.removesuffix(suffix)
            slot, number = stem[: _room(item.kind) - len(mark)] + mark + suffix, number + 1
        taken.add(slot)
        result.append(replace(item, slot=slot))
    return tuple(result)
