# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a mount table says of /etc: what is mounted there, what of it is ours, and which stack that is. Pure.

The mount table of a service is the record of what it runs on. Overlayfs repeats in mountinfo the paths that it was
given for its layers, and we give it paths that carry their identity, topmost first:

    lowerdir+=cover , lowerdir+=layers/NAME_VERSION@DIGEST , ... , lowerdir+=base@DEVICE

`NAME` and `VERSION` are percent-encoded, so that the first `_` divides them. The base is named by the device that
`/etc` was on when the overlay was made, followed by the directory on that device if something was mounted on `/etc`.
The overlay holds its base, so the kernel does not give that device number to another file system.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar
from urllib.parse import quote, unquote

from watcher.model import stack_id
from watcher.mounts.mountinfo import Mount, parse, unescape

T = TypeVar("T")

# systemd >= 258 recognises its own overlay by this source. `systemctl reload` by hand fails with any other.
SOURCE = "systemd-extensions"
# Older ones give their overlay no source. It is known by the place where systemd mounts the layers of a unit.
_OF_A_UNIT = "/run/systemd/unit-extensions/"
COVER = "cover"
LAYERS = "layers"
BASE = "base"

# The base of the stacks of earlier versions of this program, which do not say what it was.
_NAMELESS_BASE = "root/etc"

# Overlayfs takes 500 layers, of which two are the cover and the base.
LAYERS_MAX = 500 - 2

# Overlayfs takes 255 bytes for the path of one layer.
_PATH_MAX = 255
_LABEL_MAX = _PATH_MAX - len(LAYERS) - len("/@") - 64

# A service that may mount can give an overlay any paths: only what looks as we write it is read.
_LAYER = re.compile(LAYERS + r"/[!-~]*@[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class MountedLayer:
    """A layer as the mount table names it; a long name may have been cut."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True)
class Mounted:
    """What a namespace shows on /etc.

    Attributes:
        layers: bottom to top; None for a stack of systemd's, which does not say.
        doubled: two of ours lie on each other (we were killed between beneath and lift): the upper one must go.
        overlay: there is an overlay of ours or of systemd's.
        base: what lies beneath the stack now: `Table.base_path`.
        made_on: what lay there when the stack was made; None where that is not known.
        mount: where `made_on` is None, `syscalls.unique_mount_id()` of `/etc`; the mount table does not have it.
    """

    layers: tuple[MountedLayer, ...] | None = ()
    doubled: bool = False
    overlay: bool = False
    base: str = ""
    made_on: str | None = ""
    mount: int = 0

    @property
    def stack(self) -> str | None:
        """The stack's identity as `model.Stack.id` has it; None where it is not known."""
        return None if self.layers is None else stack_id(layer.digest for layer in self.layers)


class Table:
    """A mount table, as far as `/etc` is concerned.

    Args:
        text: content of a mountinfo file.

    Attributes:
        chain: what is mounted on "/etc", lowest first, found by following parents. The order of the rows says nothing
            once the host has merged its own confexts beneath.
        under: the mount that `/etc` lies on: the visible one at "/".
        top: the mount that is visible at `/etc`.
        stacks: the overlays of ours and of systemd's that lie uppermost on `/etc`, lowest first.
        beneath: what is visible at `/etc` once `stacks` are lifted.

    Raises:
        ValueError: there is no root, or a line is no row.
    """

    def __init__(self, text: str) -> None:
        # By parent: mount point and row, which is parsed when it is asked for. Most rows are about something else.
        self._lines: dict[str, list[tuple[str, str]]] = {}
        self._on: dict[int, list[Mount]] = {}
        root = self._sort(text)
        self.under = [root, *self._upwards(root, "/")][-1]
        self.chain = self._upwards(self.under, "/etc")
        self.top = self.chain[-1] if self.chain else self.under
        kept = len(self.chain) - _count_while(_is_stack, reversed(self.chain))
        self.stacks = self.chain[kept:]
        self.beneath = self.chain[kept - 1] if kept else self.under

    def _sort(self, text: str) -> Mount:
        """Put the rows that have to do with `/etc` below their parents. Returns the root."""
        ids = set()
        roots = []
        for line in text.split("\n"):
            if not line:
                continue
            mount_id, parent, _, _, point, _ = line.split(" ", 5)
            ids.add(mount_id)
            if point == "/":
                roots.append((mount_id, parent, line))
            if point == "/" or point == "/etc" or point.startswith("/etc/"):
                self._lines.setdefault(parent, []).append((point, line))
        for mount_id, parent, line in roots:
            if parent not in ids or parent == mount_id:
                return parse(line)
        raise ValueError("a mount table without a root")

    def _upwards(self, mount: Mount, point: str) -> list[Mount]:
        """What lies on a mount at a path, and on that again; lowest first."""
        found: list[Mount] = []
        passed = {mount.id}
        while True:
            above = (parse(line) for where, line in self._lines.get(str(mount.id), ()) if where == point)
            upper = next((row for row in above if row.id not in passed), None)
            if upper is None:
                return found
            found.append(upper)
            passed.add(upper.id)
            mount = upper

    @property
    def liftable(self) -> int:
        """How many of `stacks`, from the top, may be lifted off.

        An overlay that systemd mounted has no cover: once it is lifted, a process that still holds a directory of it
        sees the files below the mounts on it. With mounts on it, it stays where it is, and ours go on top.
        """
        return _count_while(
            lambda mount: layers_of(mount) is not None or not self.on(mount), self.stacks[::-1]
        )

    @property
    def surplus(self) -> int:
        """How many of `stacks`, from the top, hide one that could take their place at once.

        We were killed between beneath and lift. A nested namespace may have mounts of its own below `/etc`, on the
        upper stack alone: then that one is no surplus.
        """
        pairs = zip(self.uppermost(self.liftable), self.stacks[-2::-1], strict=False)
        return _count_while(
            lambda pair: layers_of(pair[1]) is not None and self.carries(pair[1], pair[0]), pairs
        )

    def uppermost(self, count: int) -> Sequence[Mount]:
        """So many of `stacks`, uppermost first."""
        return self.stacks[::-1][:count]

    def carries(self, lower: Mount, upper: Mount, other: Table | None = None) -> bool:
        """Whether all that is mounted on the stack `upper` is mounted on `lower` too.

        Bind mounts of the stack itself need only be mounts at the same place.

        Args:
            other: the table that `upper` is of, if it is another.
        """
        there, stack = other or self, upper.device
        pairs = [(lower, upper)]
        # The kernel reuses an ID, even while the table is being read: parents may lead round in a circle.
        passed = set()
        while pairs:
            mine, theirs = pairs.pop()
            if (mine, theirs) in passed:
                continue
            passed.add((mine, theirs))
            twins = {row.point: row for row in self.on(mine)}
            for row in there.on(theirs):
                twin = twins.get(row.point)
                if twin is None:
                    return False
                if (row.device, row.root) != (twin.device, twin.root) and row.device != stack:
                    return False
                pairs.append((twin, row))
        return True

    @property
    def base(self) -> tuple[str, str]:
        """The directory that is `/etc` without `stacks`: device, and path on that."""
        return self._etc_of(self.beneath)

    @property
    def base_path(self) -> str:
        """The path by which overlayfs is told the base, relative to the scratch directory of a swap."""
        # The path of the root on its file system says nothing: it may be renamed while the service runs.
        directory = "" if self.beneath is self.under else self.beneath.root
        identity = quote(self.beneath.device + directory, safe=":", errors="surrogateescape")
        return f"{BASE}@{identity}"[:_PATH_MAX]  # only ever compared: it may be cut anywhere

    @property
    def base_on_root(self) -> bool:
        """Whether `base` is the `/etc` of `under` itself, and not something else that was mounted there."""
        return self.base == self._etc_of(self.under)

    def _etc_of(self, mount: Mount) -> tuple[str, str]:
        return mount.device, mount.root.rstrip("/") + "/etc" if mount is self.under else mount.root

    def on(self, mount: Mount) -> Sequence[Mount]:
        """The visible mounts that lie directly on `mount` somewhere below `/etc`, sorted by path.

        A mount at a path above hides those below it.
        """
        if mount.id not in self._on:
            lines = self._lines.get(str(mount.id), ())
            rows = [parse(line) for point, line in lines if point.startswith("/etc/")]
            points = {row.point for row in rows}
            visible = [row for row in rows if not _is_hidden(row.point, points)]
            self._on[mount.id] = sorted(visible, key=lambda row: row.point)
        return self._on[mount.id]

    def above(self, mount: Mount) -> Iterator[Mount]:
        """The visible mounts that lie on `mount` below `/etc`, at any depth."""
        rows = list(self.on(mount))
        passed = {mount}  # as in `carries()`
        while rows:
            row = rows.pop()
            if row not in passed:
                passed.add(row)
                yield row
                rows += self.on(row)

    def points_on(self, mount: Mount) -> list[str]:
        """The mount points of all that lies on `mount` below `/etc`, at any depth, hidden or not; sorted."""
        points = []
        parents = [str(mount.id)]
        passed = set()  # as in `carries()`
        while parents:
            parent = parents.pop()
            if parent in passed:
                continue
            passed.add(parent)
            for point, line in self._lines.get(parent, ()):
                if point.startswith("/etc/"):
                    points.append(unescape(point))
                    parents.append(line.partition(" ")[0])
        return sorted(points)

    def same_etc(self, other: Table) -> bool:
        """Whether the same is mounted on `/etc` and below it."""
        return self._lines == other._lines

    def mounted(self) -> Mounted:
        """Which stack `/etc` shows."""
        base = self.base_path
        if not self.stacks:
            return Mounted(base=base, made_on=base)
        return Mounted(layers_of(self.top), self.surplus > 0, True, base, base_of(self.top))


def _is_stack(mount: Mount) -> bool:
    """Whether this is a stack of extensions for one service: ours, or one that systemd mounted at its start."""
    layers = mount.super_options.partition("lowerdir=")[2]
    return mount.fstype == "overlay" and (mount.source == SOURCE or layers.startswith(_OF_A_UNIT))


def _count_while(condition: Callable[[T], bool], items: Iterable[T]) -> int:
    return sum(1 for _ in takewhile(condition, items))


def _is_hidden(point: str, points: set[str]) -> bool:
    while (point := point.rpartition("/")[0]) != "/etc":
        if point in points:
            return True
    return False


@functools.lru_cache(maxsize=128)
def layers_of(mount: Mount) -> tuple[MountedLayer, ...] | None:
    """The layers of an overlay of ours, bottom to top; None if it is not one of ours."""
    paths = _paths_of(mount)
    if not paths:
        return None
    layers = []
    for path in reversed(paths[1:-1]):
        label, _, digest = path.removeprefix(LAYERS + "/").rpartition("@")
        name, _, version = label.partition("_")
        layers.append(MountedLayer(_unquote(name), _unquote(version), digest))
    return tuple(layers)


def base_of(mount: Mount) -> str | None:
    """The base of an overlay of ours, as in `Table.base_path`; None if it does not say, or is not one of ours."""
    paths = _paths_of(mount)
    return paths[-1] if paths and paths[-1] != _NAMELESS_BASE else None


@functools.lru_cache(maxsize=128)
def _paths_of(mount: Mount) -> tuple[str, ...]:
    """The paths that an overlay of ours was given for its layers, topmost first; none if it is not one of ours."""
    # Split first: an escaped comma is part of a path.
    options = mount.super_options.split(",")
    paths = tuple(
        unescape(option[len("lowerdir+=") :]) for option in options if option.startswith("lowerdir+=")
    )
    if len(paths) < 2 or paths[0] != COVER or not all(map(_LAYER.fullmatch, paths[1:-1])):
        return ()
    return paths if paths[-1] == _NAMELESS_BASE or paths[-1].startswith(BASE + "@") else ()


def layer_path(name: str, version: str, digest: str) -> str:
    """The path by which overlayfs is told a layer, relative to the scratch directory of a swap."""
    label = f"{_quote(name)}_{_quote(version)}"
    if len(label) > _LABEL_MAX:
        label = _cut(name, version)
    return f"{LAYERS}/{label}@{digest}"


def _cut(name: str, version: str) -> str:
    """As much of the label as there is room for, in whole characters."""
    label = ""
    for piece in (*map(_quote, name), "_", *map(_quote, version)):
        if len(label) + len(piece) > _LABEL_MAX:
            break
        label += piece
    return label


def _quote(text: str) -> str:
    return quote(text, safe="+^", errors="surrogateescape").replace("_", "%5F")


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape")
