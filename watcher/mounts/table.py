# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a mount table: what is on /etc, what is ours, and which stack it is. Pure.

The mount table of a service is the record of what it runs on: overlayfs repeats in mountinfo the paths that its layers
were given by, and ours are given by paths that carry their identity:

    lowerdir+=cover , lowerdir+=layers/NAME_VERSION@DIGEST , ... , lowerdir+=base@DEVICE

topmost first, with `NAME` and `VERSION` percent-encoded so that the first `_` divides them. The base is named by the
device that `/etc` was on when the overlay was made (and the directory on that, if it was mounted there by itself). It
cannot be mistaken for another that the host has mounted since: the overlay holds it, and so its number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote

from watcher.model import stack_id

# systemd >= 258 recognises its own overlay by this, and then a `systemctl reload` by hand finds what it expects.
SOURCE = "systemd-extensions"
_OF_A_UNIT = "/run/systemd/unit-extensions/"
COVER = "cover"
LAYERS = "layers"
BASE = "base"

# What stacks were put on before that said which base it was.
_NAMELESS_BASE = "root/etc"

# Overlayfs takes 500 layers, of which two are the cover and the base.
LAYERS_MAX = 500 - 2

# Overlayfs takes 255 bytes for the path of one layer.
_PATH_MAX = 255
_LABEL_MAX = _PATH_MAX - len(LAYERS) - len("/@") - 64

# Whoever may mount can give an overlay any paths: what is not as we write it goes no further.
_LAYER = re.compile(LAYERS + r"/[!-~]*@[0-9a-f]{64}")
_ESCAPE = re.compile(r"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One row of mountinfo (proc_pid_mountinfo(5))."""

    id: int
    parent: int
    device: str
    root: str
    point: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: str

    @property
    def extensions(self) -> bool:
        """Whether this is a stack of extensions for one service: ours, or one that systemd made at its start."""
        if self.fstype != "overlay":
            return False
        # Before 258 systemd gave its own no name: it is known by where the layers of a unit were mounted.
        return self.source == SOURCE or self.super_options.partition("lowerdir=")[2].startswith(_OF_A_UNIT)


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
        layers: bottom to top; None where the stack is systemd's, which does not say.
        doubled: two of ours lie on each other (killed between beneath and lift): the upper one must go.
        overlay: there is an overlay of ours or systemd's at all.
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
        chain: what is mounted on "/etc", lowest first, found by following parents: the position of a row says
            nothing after the host has merged its own confexts beneath.
        under: the mount that `/etc` lies on: the visible one at "/".
        top: the mount that is visible at `/etc`.
        stacks: the overlays of ours and systemd's that lie uppermost on `/etc`, lowest first.
        beneath: what is visible at `/etc` once `stacks` are lifted.

    Raises:
        ValueError: it has no root, or what is no row.
    """

    def __init__(self, text: str) -> None:
        # Rows are taken apart when they are asked for: most are about something else.
        self._lines: dict[str, list[tuple[str, str]]] = {}
        self._on: dict[int, list[Mount]] = {}
        root = self._sort(text)
        self.under = [root, *self._upwards(root, "/")][-1]
        self.chain = self._upwards(self.under, "/etc")
        self.top = self.chain[-1] if self.chain else self.under
        count = 0
        while count < len(self.chain) and self.chain[-1 - count].extensions:
            count += 1
        kept = len(self.chain) - count
        self.stacks = self.chain[kept:]
        self.beneath = self.chain[kept - 1] if kept else self.under

    def _sort(self, text: str) -> Mount:
        """Put the rows that have to do with `/etc` below their parents; the root."""
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
                return _row(line)
        raise ValueError("a mount table without a root")

    def _upwards(self, mount: Mount, point: str) -> list[Mount]:
        """What lies on a mount at a path, and on that again; lowest first."""
        found: list[Mount] = []
        passed = {mount.id}
        while True:
            above = (_row(line) for where, line in self._lines.get(str(mount.id), ()) if where == point)
            upper = next((row for row in above if row.id not in passed), None)
            if upper is None:
                return found
            found.append(upper)
            passed.add(upper.id)
            mount = upper

    @property
    def liftable(self) -> int:
        """How many of `stacks`, from the top, may be lifted off.

        One that systemd mounted has no cover: without it whoever still holds a directory of it would see what is
        mounted on it no more, but the files below. Such a one stays where it is, and ours go on top.
        """
        count = 0
        for mount in reversed(self.stacks):
            if layers_of(mount) is None and self.on(mount):
                break
            count += 1
        return count

    @property
    def surplus(self) -> int:
        """How many of `stacks`, from the top, hide one that could take their place at once.

        Somebody was killed between beneath and lift. What a namespace that follows another has mounted below `/etc`
        for itself is only on the upper one: then that is no surplus.
        """
        count = 0
        while count < min(self.liftable, len(self.stacks) - 1):
            upper, lower = self.stacks[-1 - count], self.stacks[-2 - count]
            if layers_of(lower) is None or not self.carries(lower, upper):
                break
            count += 1
        return count

    def carries(self, lower: Mount, upper: Mount, other: Table | None = None) -> bool:
        """Whether on `lower` is mounted what is on the stack `upper` (of another table), apart from parts of that."""
        there, stack = other or self, upper.device
        pairs = [(lower, upper)]
        # The kernel gives an ID anew, also between two reads of one table: it may go round in a circle.
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
        """The path, in the directory in which a stack is put together, by which overlayfs is told the base."""
        # Where the root lies on its file system says nothing: it may be renamed while the service runs.
        directory = "" if self.beneath is self.under else self.beneath.root
        identity = quote(self.beneath.device + directory, safe=":", errors="surrogateescape")
        return f"{BASE}@{identity}"[:_PATH_MAX]  # only ever compared: it may be cut anywhere

    @property
    def base_on_root(self) -> bool:
        """Whether that is also the `/etc` of `under`, and not something else that was mounted there."""
        return self.base == self._etc_of(self.under)

    def _etc_of(self, mount: Mount) -> tuple[str, str]:
        return mount.device, mount.root.rstrip("/") + "/etc" if mount is self.under else mount.root

    def on(self, mount: Mount) -> Sequence[Mount]:
        """What can be seen of the mounts that lie directly on `mount` somewhere below `/etc`, by path.

        One that was mounted later at a path above covers those below it.
        """
        if mount.id not in self._on:
            lines = self._lines.get(str(mount.id), ())
            rows = [_row(line) for point, line in lines if point.startswith("/etc/")]
            points = {row.point for row in rows}
            seen = [row for row in rows if not _covered(row.point, points)]
            self._on[mount.id] = sorted(seen, key=lambda row: row.point)
        return self._on[mount.id]

    def above(self, mount: Mount) -> Iterator[Mount]:
        """What can be seen of all that lies on `mount`, at any depth."""
        rows = list(self.on(mount))
        passed = {mount}  # as in `carries()`
        while rows:
            row = rows.pop()
            if row not in passed:
                passed.add(row)
                yield row
                rows += self.on(row)

    def points_on(self, mount: Mount) -> list[str]:
        """Paths below `/etc`, escaped as mountinfo has them, of all that lies on `mount` at any depth, seen or not."""
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
                    points.append(point)
                    parents.append(line.partition(" ")[0])
        return sorted(points)

    def same_etc(self, other: Table) -> bool:
        """Whether nothing has changed on `/etc` and below it."""
        return self._lines == other._lines

    def mounted(self) -> Mounted:
        """Which stack `/etc` shows."""
        base = self.base_path
        if not self.stacks:
            return Mounted(base=base, made_on=base)
        doubled = self.surplus > 0
        return Mounted(layers_of(self.top), doubled, True, base, base_of(self.top))


def _row(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    mount_id, parent, device, root, point, options, *_ = left.split(" ")
    fstype, source, super_options = right.split(" ", 2)
    return Mount(
        int(mount_id),
        int(parent),
        device,
        _unescape(root),
        _unescape(point),
        tuple(options.split(",")),
        fstype,
        _unescape(source),
        super_options,
    )


def _covered(point: str, points: set[str]) -> bool:
    while (point := point.rpartition("/")[0]) != "/etc":
        if point in points:
            return True
    return False


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


@functools.lru_cache(maxsize=128)
def layers_of(mount: Mount) -> tuple[MountedLayer, ...] | None:
    """The layers of an overlay of ours, bottom to top; None where it is not one of ours."""
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
    """The base of an overlay of ours, as `Table.base_path` has it; None where it does not say, or is another's."""
    paths = _paths_of(mount)
    return paths[-1] if paths and paths[-1] != _NAMELESS_BASE else None


@functools.lru_cache(maxsize=128)
def _paths_of(mount: Mount) -> tuple[str, ...]:
    """By what paths an overlay of ours was told its layers, topmost first; none where it is not one of ours."""
    # Split first, then undo the escapes: an escaped comma is part of a path.
    options = mount.super_options.split(",")
    paths = tuple(
        _unescape(option[len("lowerdir+=") :]) for option in options if option.startswith("lowerdir+=")
    )
    if len(paths) < 2 or paths[0] != COVER or not all(map(_LAYER.fullmatch, paths[1:-1])):
        return ()
    return paths if paths[-1] == _NAMELESS_BASE or paths[-1].startswith(BASE + "@") else ()


def layer_path(name: str, version: str, digest: str) -> str:
    """The path, relative to the directory in which a stack is put together, by which overlayfs is told a layer."""
    label = f"{_quote(name)}_{_quote(version)}"
    if len(label) > _LABEL_MAX:
        label = _cut(name, version)
    return f"{LAYERS}/{label}@{digest}"


def _cut(name: str, version: str) -> str:
    """As much of it as there is room for, in whole characters."""
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
