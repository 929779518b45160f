# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `origin` and `diff` answer, as `--json` prints it. As schema.py: fields may be added, none is taken away.

Apart from that, because only these two need so many classes.

Layers are listed bottom to top. A number of a layer is its place in that list, null the host's own file.
Paths are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

from watcher.model import Trust
from watcher.records.schema import Drift


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """A layer of a stack.

    Attributes:
        kind: "image" or "directory".
        source: the path that it was dropped at.
        trust: what was proved of it when it was looked at last.
        since: when the service got it, microseconds since the epoch; None: not known.
    """

    name: str
    version: str
    digest: str
    kind: str
    slot: str
    source: str
    trust: Trust
    since: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one layer has at a path.

    Attributes:
        layer: its number, None for the host's `/etc`.
        type: "file", "directory", "link", "FIFO", "socket", "device" or "whiteout".
        role: "shown", "merged" (a directory that is joined with one above), "whiteout" or "covered".
        opaque: a directory that hides what is beneath.
        covered_by: number of the layer that covers it; at: what that one has at this path does so.
        mode, uid, gid, size: as stat(2) has them.
    """

    layer: int | None
    type: str
    role: str
    opaque: bool
    covered_by: int | None
    at: str
    mode: int
    uid: int
    gid: int
    size: int


@dataclass(frozen=True, slots=True)
class TracedPath:
    """One step of a path: a link on the way, or its end.

    Attributes:
        chain: topmost first; empty: there is nothing.
        target: of the link that is there, "" if none is.
        problem: why the service cannot use the path, or why it is not told; "" if it can.
        outside: the path leads out of `/etc`, to this one.
        mount: what is mounted there or above, so that the stack is not seen there at all; "" if nothing is.
        differs: what the service sees is something else, and what; "" if it is not, or does not run.
    """

    path: str
    chain: tuple[Piece, ...] = ()
    target: str = ""
    problem: str = ""
    outside: str = ""
    mount: str = ""
    differs: str = ""


@dataclass(frozen=True, slots=True)
class TracedFile:
    """What is not as in the host's `/etc`.

    Attributes:
        change: "new", "changed" (content, mode, owner or type) or "removed".
        type: what is seen, as in `Piece`; of what is removed, what the host has.
        layer: number of the layer that shows or removes it.
        covers: numbers of the other layers that have something there, topmost first. The host's `/etc` has, too, unless
            it is new.
        mount: as in `TracedPath`.
        note: of a directory, why what is in it is not told, though there is something; "" if all is.
    """

    path: str
    change: str
    type: str
    layer: int | None
    covers: tuple[int, ...] = ()
    mount: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the `/etc` of a service comes from.

    Attributes:
        state: "running": what it sees now; else what its next start gets.
        stack: identity.
        paths: of the paths that were asked for: None: of none.
        files: of all, None if paths were asked for.
    """

    service: str
    state: str
    stack: str
    layers: tuple[TracedLayer, ...]
    paths: tuple[TracedPath, ...] | None = None
    files: tuple[TracedFile, ...] | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """A stack that is compared.

    Attributes:
        what: "shown" (what the service sees), "accepted" (what its next start gets), "desired" (what it would get
            now), "kept" (one of its history), "none" (the host's `/etc` alone) or "dropped" (with other images).
    """

    what: str
    stack: str
    layers: tuple[TracedLayer, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """What one of two stacks has at a path.

    Attributes:
        type: as in `Piece`.
        layer: digest of the layer that it comes from, "" for the host's `/etc`.
        size: bytes of a file; target: of a link; sha256: of a file, "" if that is more than is read.
    """

    type: str
    layer: str
    mode: int
    uid: int
    gid: int
    size: int
    target: str
    device: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A path at which two stacks differ.

    Attributes:
        change: "added", "removed" or "changed".
        xattrs: names of the extended attributes that differ.
        diff: the hunks of a unified diff; bytes that are not UTF-8 are escaped; None: no text, or too much.
        added, removed: lines.
        note: what was not compared, and why; "" if all was.
    """

    path: str
    change: str
    before: Side | None
    after: Side | None
    xattrs: tuple[str, ...] = ()
    diff: str | None = None
    added: int = 0
    removed: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs between two stacks of a service, each on the base that the service has.

    Attributes:
        drifted: of the accepted stack, whatever is compared.
    """

    service: str
    differs: bool
    before: Compared
    after: Compared
    files: tuple[Difference, ...]
    drifted: tuple[Drift, ...] = ()
