# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd forgets of a unit's sandbox once the unit has `ExtensionImages=`, and how the drop-in puts it back.

For each of `/usr`, `/opt` and `/etc` systemd then plans an overlay, drops every other mount that it has planned for the
same path as a duplicate, and skips the overlay if no extension has that hierarchy (257 and 262, each case tried). So
with a confext, `ProtectSystem=full` leaves `/usr` writable, `TemporaryFileSystem=/opt` shows what it should hide, and
with `BindReadOnlyPaths=/usr` below a `RootDirectory=` nothing can be started. systemd keeps mounts further down: so
what was said of `/usr` is said again of each directory in it. `/etc` itself is read-only under an overlay in any case.

Pure but for `children()`; standard library only, for the generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from watcher.settings import syntax, values
from watcher.settings.syntax import Assignment

HIERARCHIES = ("/usr", "/opt", "/etc")

_USUAL = ("bin", "games", "include", "lib", "lib32", "lib64", "libexec", "local", "sbin", "share", "src")


class Again(NamedTuple):
    """A setting to be said again, of one path or of source and target; systemd is to ignore it if one is missing."""

    key: str
    paths: tuple[str, ...]
    options: str = ""


class Repair(NamedTuple):
    """What a drop-in with images has to say of a unit's sandbox.

    Attributes:
        needed: systemd would forget something (so the unit has a mount namespace of its own anyway).
        again: settings that put it back.
        lost: settings that nothing puts back: such a unit must not be given images.
    """

    needed: bool = False
    again: tuple[Again, ...] = ()
    lost: tuple[str, ...] = ()


def children(directory: str) -> tuple[str, ...]:
    """Names in a directory without those of links; none if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return tuple(sorted(entry.name for entry in entries if not entry.is_symlink()))
    except OSError:
        return ()


def repair(assignments: Sequence[Assignment], listing: Callable[[str], Iterable[str]] = children) -> Repair:
    """What has to be said again for a unit.

    Args:
        listing: names in a directory.
    """
    root = syntax.last(assignments, "Service", "RootDirectory")
    base = root.value.removeprefix("-").rstrip("/") if root else ""
    read_only = {"/usr"} if _protects(assignments) else set()
    again: list[Again] = []
    lost: list[str] = []
    for word in _words(assignments, "ReadOnlyPaths"):
        path = _normal(word.lstrip("-+"))
        read_only |= {path} & {"/usr", "/opt"}
    for path in sorted(read_only):
        names = sorted({*listing(base + path), *(_USUAL if path == "/usr" else ())})
        again += [Again("ReadOnlyPaths", (f"{path}/{name}",)) for name in names]
    for key in ("BindPaths", "BindReadOnlyPaths"):
        for word in _words(assignments, key):
            source, target, options = _bind(word)
            if target == "/etc":
                lost.append(f"{key}={word}")
            elif target in HIERARCHIES:
                again += [
                    Again(key, (f"{source}/{name}", f"{target}/{name}"), options) for name in listing(source)
                ]
    for key in ("TemporaryFileSystem", "MountImages"):
        lost += [f"{key}={word}" for word in _words(assignments, key) if _hides(key, word)]
    return Repair(bool(read_only or again or lost), tuple(again), tuple(lost))


def _protects(assignments: Sequence[Assignment]) -> bool:
    """`ProtectSystem=yes` and `full`; with `strict` all of it is below a read-only root, which is kept."""
    protect = syntax.last(assignments, "Service", "ProtectSystem")
    return values.flag(protect, default=protect is not None and protect.value == "full")


def _words(assignments: Sequence[Assignment], key: str) -> list[str]:
    found: list[str] = []
    for assignment in syntax.assigned(assignments, "Service", key):
        try:
            found += values.split(assignment.value)
        except ValueError:
            continue  # systemd ignores such a line, too
    return found


def _bind(word: str) -> tuple[str, str, str]:
    """Source, target and options of a word of BindPaths=."""
    source, _, rest = word.removeprefix("-").partition(":")
    target, _, options = rest.partition(":")
    return _normal(source), _normal(target or source), options


def _hides(key: str, word: str) -> bool:
    parts = word.removeprefix("-").split(":")
    target = parts[0] if key == "TemporaryFileSystem" else (parts[1] if len(parts) > 1 else "")
    return _normal(target) in HIERARCHIES


def _normal(path: str) -> str:
    return os.path.normpath(path) if path else ""
