# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file of a `.v/` directory is the newest that fits: systemd.v(7), without reading any directory.

Where the manual page leaves room, systemd 262 decides, whose `systemd-vpick` the tests hold this against:

- What follows the last `_` of the version is taken for the architecture and dropped, known or not: "web_1_2.raw" is
  version 1, and "web_x86-64.raw" is version "x86-64". A known architecture that this host cannot run is passed over.
- A counter is read as C does, so "+010" is 8, and "+09" is no counter at all and makes the version invalid.
- A version has letters, digits and "-.~^"; any other character, and the name is none of ours.

One thing is better than there: a dangling link makes systemd fail the whole pick, here it is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from . import arch, version
from .model import Candidate, Kind

Type = Literal["file", "directory", "block", "null", "other", "missing"]

_TYPES: dict[Kind, tuple[Type, ...]] = {Kind.IMAGE: ("file", "block"), Kind.DIRECTORY: ("directory",)}
_SUFFIX = {Kind.IMAGE: ".raw", Kind.DIRECTORY: ""}
_VERSION = re.compile(r"[A-Za-z0-9.~^-]+")
_COUNTER = re.compile(r"(.*)\+([0-9]+)(?:-([0-9]+))?", re.DOTALL)
_UINT_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Dirent:
    """A name in a directory.

    Attributes:
        name: as `os.fsdecode()` makes it.
        type: what it is, or what its link leads to. "null": a link to /dev/null. "missing": a link that leads nowhere.
        link: it is a symbolic link.
        problem: why it is "missing" or "other", in a few words.
    """

    name: str
    type: Type
    link: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to look for, and where: `directory/basename_VERSION[_ARCHITECTURE][+LEFT[-DONE]]suffix`."""

    directory: str
    basename: str
    suffix: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Passed:
    """A name that would have counted, and why it does not."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Match:
    dirent: Dirent
    version: str
    architecture: int  # 0 native, 1 secondary, 2 any
    left: int
    done: int

    def key(self) -> tuple[Any, ...]:
        """Greater is better (systemd.v(7), "Example" and the list before it)."""
        name = os.fsencode(self.dirent.name)
        return (self.left != 0, version.key(self.version), -self.architecture, self.left, -self.done, name)


def parse_path(path: str, kind: Kind) -> Spec | None:
    """What a path in `.v/` form asks for: "/srv/web.raw.v", "/srv/web.v" or "/srv/x.v/web___.raw".

    Returns:
        None if `path` is not in that form: then it names its one file itself.
    """
    parent, _, name = path.rstrip("/").rpartition("/")
    if name.endswith(".v"):
        basename = name[:-2].removesuffix(_SUFFIX[kind])
        return Spec(f"{parent}/{name}", basename, _SUFFIX[kind], kind)
    if "___" in name and parent.endswith(".v") and parent:
        at = name.rindex("___")
        return Spec(parent, name[:at], name[at + 3 :], kind)
    return None


def pattern(spec: Spec) -> str:
    """Regular expression (`re.fullmatch`) of the names that can matter in `spec.directory`; upload leftovers do not."""
    prefix = re.escape(f"{spec.basename}_") if spec.basename else ""
    rest = r"[A-Za-z0-9.~^-]+(?:_[^_]*)?(?:\+[0-9]+(?:-[0-9]+)?)?"
    return f"(?s:{prefix}{rest}{re.escape(spec.suffix)})"


def pick(spec: Spec, dirents: Iterable[Dirent], architecture: str | None = None) -> tuple[Candidate, ...]:
    """All that fit, best first.

    Args:
        architecture: systemd's name of the native one; None: this host's.
    """
    right = (m for m in _matches(spec, dirents, architecture) if m.dirent.type in _TYPES[spec.kind])
    return tuple(_candidate(spec, match) for match in sorted(right, key=_Match.key, reverse=True))


def passed_over(spec: Spec, dirents: Iterable[Dirent], architecture: str | None = None) -> tuple[Passed, ...]:
    """Those whose name fits while what they are does not, with the reason."""
    wanted = "a directory" if spec.kind is Kind.DIRECTORY else "a regular file"
    return tuple(
        Passed(match.dirent.name, match.dirent.problem or f"not {wanted}")
        for match in _matches(spec, dirents, architecture)
        if match.dirent.type not in _TYPES[spec.kind]
    )


def split(name: str, kind: Kind) -> tuple[str, str]:
    """Extension name and version of a file that is named directly: "web_1.4+3.raw" is ("web", "1.4").

    The name is what systemd calls it: cut at the first "_" or "+", without ".confext.raw" or ".raw".
    """
    if kind is Kind.IMAGE:
        name = re.sub(r"(\.sysext|\.confext)?\.raw\Z", "", name)
    end = re.search(r"[_+]", name)
    if end is None:
        return name, ""
    spec = Spec("", name[: end.start()], "", kind)
    match = _match(spec, Dirent(name, "file"), tuple(arch.NAMES))
    return spec.basename, match.version if match else ""


def _matches(spec: Spec, dirents: Iterable[Dirent], architecture: str | None) -> Iterable[_Match]:
    native = architecture or arch.native()
    runnable = tuple(a for a in (native, arch.secondary(native)) if a)
    for dirent in dirents:
        if match := _match(spec, dirent, runnable):
            yield match


def _match(spec: Spec, dirent: Dirent, runnable: tuple[str, ...]) -> _Match | None:
    rest = dirent.name
    if spec.basename:
        if not rest.startswith(f"{spec.basename}_"):
            return None
        rest = rest[len(spec.basename) + 1 :]
    if not rest.endswith(spec.suffix):
        return None
    rest, left, done = _counters(rest.removesuffix(spec.suffix))
    rest, underscore, suffix = rest.rpartition("_") if "_" in rest else (rest, "", "")
    if underscore and suffix in arch.NAMES:
        if suffix not in runnable:
            return None
        index = min(runnable.index(suffix), 1)
    else:
        index = 2
    if not _VERSION.fullmatch(rest):
        return None
    return _Match(dirent, rest, index, left, done)


def _counters(text: str) -> tuple[str, int, int]:
    """`+LEFT` or `+LEFT-DONE` taken off the end; without them systemd counts with UINT_MAX, and so do we."""
    match = _COUNTER.fullmatch(text)
    if match:
        left, done = _atou(match[2]), _atou(match[3] or "0")
        if left is not None and done is not None:
            return match[1], left, done
    return text, _UINT_MAX, _UINT_MAX


def _atou(text: str) -> int | None:
    """Digits as C's strtoul() with base 0 reads them into an unsigned int, None if it would not."""
    try:
        value = int(text, 8 if text.startswith("0") else 10)
    except ValueError:  # "+09"
        return None
    return value if value <= _UINT_MAX else None


def _candidate(spec: Spec, match: _Match) -> Candidate:
    counted = match.left != _UINT_MAX
    return Candidate(
        path=f"{spec.directory}/{match.dirent.name}",
        filename=match.dirent.name,
        name=spec.basename or match.version,
        version=match.version,
        kind=spec.kind,
        tries_left=match.left if counted else None,
        tries_done=match.done if counted else None,
    )
