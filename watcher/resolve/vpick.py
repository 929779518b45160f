# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file of a `.v/` directory is the newest that fits: systemd.v(7). Pure: it reads no directory.

Where the manual page leaves room we do as systemd 262 does; the tests compare this with its `systemd-vpick`:

- What follows the last `_` of the version is taken for the architecture and dropped, known or not: "web_1_2.raw" is
  version 1, and "web_x86-64.raw" is version "x86-64". A known architecture that this host cannot run is passed over.
- A counter is read as C does, so "+010" is 8, and "+09" is no counter at all and makes the version invalid.
- A version has letters, digits and "-.~^"; a name with any other character is passed over.

One thing is different: a dangling link makes systemd fail the whole pick, here it is passed over.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from watcher.model import Candidate, Kind, shown
from watcher.resolve import sidecars, version
from watcher.settings import architectures

Type = Literal["file", "directory", "block", "null", "other", "missing"]

_TYPES: dict[Kind, tuple[Type, ...]] = {Kind.IMAGE: ("file", "block"), Kind.DIRECTORY: ("directory",)}
_SUFFIX = {Kind.IMAGE: ".raw", Kind.DIRECTORY: ""}
_VERSION = re.compile(r"[A-Za-z0-9.~^-]+")
_COUNTER = re.compile(r"(.*)\+([0-9]+)(?:-([0-9]+))?", re.DOTALL)
_UINT_MAX = 0xFFFFFFFF
_REMEMBERED = 8
"""Directories whose answer is remembered, for the other services that share one. One of 10,000 names takes 5 MiB."""
_NAMES_REMEMBERED = 4096
"""Names of which is remembered what each asks for: one that is new among a thousand is taken apart alone."""
_turn = threading.Lock()

# systemd's hidden_or_backup_file(), and the names under which uploads grow.
_LEFTOVER = (
    r"\..*|lost\+found|aquota\.(?:user|group)|.*~|"
    r".*\.(?:bak|old|orig|new|swp|tmp|part|partial|filepart|rpm(?:new|save|orig)|(?:dpkg|ucf)-[a-z]+)"
)
NO_LEFTOVER = rf"(?s:(?!(?:{_LEFTOVER})\Z).+)"
"""Regular expression (`re.fullmatch`) of all names but these."""


class Dirent(NamedTuple):
    """A name in a directory. A tuple, because there may be thousands of them.

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
class NotPicked:
    """A name that does not count, and why; `level` as that of a `Remark`."""

    name: str
    reason: str
    level: str = "warning"


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
    """Regular expression (`re.fullmatch`) of the names worth a look in `spec.directory`: not the leftovers of uploads.

    It matches more than can be picked, so that we can report a file with a wrong name.
    """
    prefix = re.escape(f"{spec.basename}_") if spec.basename else ""
    rest = r"[A-Za-z0-9.~^-]+(?:_[^_]*)?(?:\+[0-9]+(?:-[0-9]+)?)?"
    return f"(?s:{prefix}{rest}{re.escape(spec.suffix)}|{NO_LEFTOVER})"


def pick(spec: Spec, dirents: Iterable[Dirent], architecture: str | None = None) -> tuple[Candidate, ...]:
    """All that fit, best first.

    Args:
        architecture: systemd's name of the native one; None: this host's.
    """
    return _remembered(spec, tuple(dirents), _runnable(architecture))[0]


def passed_over(
    spec: Spec, dirents: Iterable[Dirent], architecture: str | None = None
) -> tuple[NotPicked, ...]:
    """Everything else, with the reason."""
    return _remembered(spec, tuple(dirents), _runnable(architecture))[1]


def _remembered(
    spec: Spec, dirents: tuple[Dirent, ...], runnable: tuple[str, ...]
) -> tuple[tuple[Candidate, ...], tuple[NotPicked, ...]]:
    """`_sorted_out()`, of threads that ask for the same at once by the first one alone."""
    with _turn:
        return _sorted_out(spec, dirents, runnable)


@functools.lru_cache(_REMEMBERED)
def _sorted_out(
    spec: Spec, dirents: tuple[Dirent, ...], runnable: tuple[str, ...]
) -> tuple[tuple[Candidate, ...], tuple[NotPicked, ...]]:
    """What fits, best first, and the rest."""
    beside = _Beside(spec, dirents)
    considered = [
        _considered(spec, dirent, runnable) for dirent in dirents if dirent.name not in beside.names
    ]
    right = [one for one in considered if not isinstance(one, NotPicked)]
    right.sort(key=itemgetter(0), reverse=True)
    passed = (one for one in considered if isinstance(one, NotPicked))
    return tuple(beside.added(candidate) for _, candidate in right), (*passed, *beside.passed_over())


@functools.lru_cache(_NAMES_REMEMBERED)
def _considered(
    spec: Spec, dirent: Dirent, runnable: tuple[str, ...]
) -> tuple[tuple[Any, ...], Candidate] | NotPicked:
    """What fits, with its place in the order, or why it does not."""
    match = _match(spec, dirent, runnable)
    if isinstance(match, NotPicked):
        return match
    if dirent.type not in _TYPES[spec.kind]:
        wanted = "a directory" if spec.kind is Kind.DIRECTORY else "a regular file"
        return NotPicked(dirent.name, dirent.problem or f"not {wanted}")
    return match.key(), _candidate(spec, match)


class _Beside:
    """The sidecars among the images of a directory.

    Attributes:
        names: theirs.
    """

    def __init__(self, spec: Spec, dirents: tuple[Dirent, ...]) -> None:
        images = spec.kind is Kind.IMAGE and spec.suffix.endswith(_SUFFIX[Kind.IMAGE])
        self.names = {one.name for one in dirents if sidecars.suffix(one.name)} if images else set[str]()
        # By suffix the first of each image: whoever drops files may give one thousands, and all services would wait.
        self._by_image: dict[str, dict[str, str]] = {}
        for name in sorted(self.names, key=lambda name: (len(name), name)):  # without counters first
            of_image = self._by_image.setdefault(_plain(sidecars.image_of(name)), {})
            of_image.setdefault(sidecars.suffix(name), name)
        self._images = (
            {_plain(one.name) for one in dirents if one.name.endswith(spec.suffix)} if self.names else ()
        )

    def added(self, candidate: Candidate) -> Candidate:
        """A candidate with its sidecars."""
        found = self._of(candidate.filename) if self._by_image else ()
        return replace(candidate, sidecars=found) if found else candidate

    def _of(self, image: str) -> tuple[str, ...]:
        """The sidecars of an image, of each kind one: the one whose counters are the same before all others."""
        exact = {sidecars.suffix(name): name for name in sidecars.names(image) if name in self.names}
        found = self._by_image.get(_plain(image), {}) | exact
        return tuple(found[one] for one in sidecars.SUFFIXES if one in found)

    def passed_over(self) -> Iterator[NotPicked]:
        """Those that belong to no image."""
        for name in sorted(self.names):
            if meant := sidecars.meant(name):
                yield NotPicked(
                    name,
                    f"never looked at under that name: {_EACH[sidecars.suffix(name)]} is called"
                    f" {shown(meant)}",
                )
            elif _plain(sidecars.image_of(name)) not in self._images:
                yield NotPicked(name, f"there is no {shown(sidecars.image_of(name))}", "debug")


_EACH = {
    sidecars.VERITY: "the hash tree of an image",
    sidecars.ROOT_HASH: "the root hash of an image",
    sidecars.SIGNATURE: "the signature of an image",
}


def _plain(image: str) -> str:
    """The name of an image without counters."""
    found = counters(sidecars.stem(image))
    return f"{found[0]}{_SUFFIX[Kind.IMAGE]}" if found else image


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
    match = _match(spec, Dirent(name, "file"), tuple(architectures.NAMES))
    return spec.basename, match.version if isinstance(match, _Match) else ""


def called(spec: Spec) -> str:
    """How a file must be called to fit, for people: "web_VERSION.raw"."""
    return shown(f"{spec.basename}_VERSION{spec.suffix}" if spec.basename else f"VERSION{spec.suffix}")


def _runnable(architecture: str | None) -> tuple[str, ...]:
    native = architecture or architectures.native()
    return tuple(a for a in (native, architectures.SECONDARY.get(native)) if a)


def _match(spec: Spec, dirent: Dirent, runnable: tuple[str, ...]) -> _Match | NotPicked:
    name, prefix = dirent.name, f"{spec.basename}_" if spec.basename else ""
    if not name.startswith(prefix) or not name[len(prefix) :].endswith(spec.suffix):
        # In `web.raw.v/` an image can only be meant for it; in the `x.v/` of `x.v/web___.raw` there may be others.
        its_own = os.path.basename(spec.directory) in (
            f"{spec.basename}.v",
            f"{spec.basename}{spec.suffix}.v",
        )
        other = its_own and spec.kind is Kind.IMAGE and name.endswith(spec.suffix)
        meant = spec.basename != "" and (name.startswith(spec.basename) or other)
        return NotPicked(name, f"not called {called(spec)}", "warning" if meant else "debug")
    rest = name[len(prefix) :].removesuffix(spec.suffix)
    rest, left, done = counters(rest) or (rest, _UINT_MAX, _UINT_MAX)  # systemd counts so without counters
    text, underscore, suffix = rest.rpartition("_") if "_" in rest else (rest, "", "")
    index = 2
    if underscore and suffix in architectures.NAMES:
        if suffix not in runnable:
            return NotPicked(name, f"made for {suffix}, and this host is {runnable[0]}", "info")
        index = min(runnable.index(suffix), 1)
    if not _VERSION.fullmatch(text):
        return NotPicked(name, f"not called {called(spec)}, with letters, digits and -.~^ for VERSION")
    return _Match(dirent, text, index, left, done)


def misnamed(candidate: Candidate) -> str:
    """systemd's name for what stands as architecture in a file name, and is none to systemd; "" in all other cases."""
    stem = candidate.filename.removesuffix(_SUFFIX[candidate.kind])
    stem = (counters(stem) or (stem,))[0]
    return architectures.meant(stem.rpartition("_")[2]) if stem.count("_") > 1 else ""


def counters(text: str) -> tuple[str, int, int] | None:
    """A name without its suffix as (what stands before `+LEFT[-DONE]`, left, done); None if it has no counters."""
    match = _COUNTER.fullmatch(text)
    left, done = (_atou(match[2]), _atou(match[3] or "0")) if match else (None, None)
    return (match[1], left, done) if match and left is not None and done is not None else None


def _atou(text: str) -> int | None:
    """Digits as C's strtoul() with base 0 reads them into an unsigned int; None where it fails."""
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
