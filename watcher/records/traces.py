# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `origin` and `diff` answer, as `--json` prints it. As schema.py: fields may be added, none is taken away.

Layers are listed bottom to top. A number of a layer is its place in that list, null the host's own file.
Paths are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

from watcher.model import Trust

DESCRIPTION = """\
# A layer of a stack, as Layer. since: when the service got it, null where that is not known.
type TracedLayer (
  name: string,
  version: string,
  digest: string,
  kind: string,
  slot: string,
  source: string,
  trust: Trust,
  since: ?int
)

# What one layer has at a path.
# layer: its place in `layers`, null for the host's /etc.
# type: "file", "directory", "link", "FIFO", "socket", "device" or "whiteout".
# role: "shown", "merged" (a directory that is joined with one above), "whiteout" or "covered".
# opaque: a directory that hides what is beneath.
# coveredBy: place of the layer that covers it; at: what that one has at this path does so.
type Piece (
  layer: ?int,
  type: string,
  role: string,
  opaque: bool,
  coveredBy: ?int,
  at: string,
  mode: int,
  uid: int,
  gid: int,
  size: int
)

# One step of a path: a link on the way, or its end.
# chain: topmost first; empty: there is nothing.
# problem: why the service cannot use the path. outside: the path leads out of /etc, to this one.
# mount: what hides the stack there. differs: what the service sees instead. Each "" where it is not so.
type TracedPath (
  path: string,
  chain: []Piece,
  target: string,
  problem: string,
  outside: string,
  mount: string,
  differs: string
)

# What is not as in the host's /etc. change: "new", "changed" or "removed".
# layer: place of the one that shows or removes it; covers: of the others that have something there.
type TracedFile (
  path: string,
  change: string,
  type: string,
  layer: ?int,
  covers: []int,
  mount: string
)

# Where the /etc of a service comes from. state: "running": what it sees now; else what its next start gets.
# layers: bottom to top. paths: of those that were asked for; files: of all, if none were asked for.
type Origin (
  service: string,
  state: string,
  stack: string,
  layers: []TracedLayer,
  paths: ?[]TracedPath,
  files: ?[]TracedFile
)

# A stack that is compared. what: "shown" (what the service sees), "accepted" (what its next start gets), "desired"
# (what it would get now), "kept" (one of its history), "none" (the host's /etc alone) or "dropped".
type Compared (
  what: string,
  stack: string,
  layers: []TracedLayer
)

# What one of two stacks has at a path. layer: digest, "" for the host's /etc. sha256: of a file, "" if it is not told.
type Side (
  type: string,
  layer: string,
  mode: int,
  uid: int,
  gid: int,
  size: int,
  target: string,
  device: int,
  sha256: string
)

# A path at which two stacks differ. change: "added", "removed" or "changed".
# xattrs: names of those that differ. diff: hunks of a unified diff. note: what is not told or compared, and why.
type Difference (
  path: string,
  change: string,
  before: ?Side,
  after: ?Side,
  xattrs: []string,
  diff: ?string,
  added: int,
  removed: int,
  note: string
)

# A file of the host that a file of an image covers, and that has changed since the stack was accepted.
# image: what covers it. change: "changed", "came" or "went".
type Drift (
  path: string,
  image: string,
  change: string
)

type Diff (
  service: string,
  differs: bool,
  before: Compared,
  after: Compared,
  files: []Difference,
  drifted: []Drift
)

# Which images the files of a service's /etc come from: those at these paths, or all that the host does not have so.
# For root, the watcher's own user and the members of the group confext-watcher.
# With `more` in several replies, if it is much: the next ones have no layers, and the files that come next.
# truncated: there were more than this one reply can hold.
method Trace(service: string, paths: ?[]string) -> (origin: Origin, truncated: bool, redacted: bool)

# What differs between two stacks of a service; as Trace. No contents are told of a file that the user could not read.
# before: a stack, or the beginning of one, a number of stacks back, "shown" or "none"; after: likewise. Without, what
# the service shows, and what it should have now.
method Compare(service: string, before: ?string, after: ?string) -> (diff: Diff, truncated: bool, redacted: bool)
"""


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
        problem: why the service cannot use the path, "" if it can.
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
    """

    path: str
    change: str
    type: str
    layer: int | None
    covers: tuple[int, ...] = ()
    mount: str = ""


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
class Drift:
    """A file of the host that a file of an image covers, and that has changed since the stack was accepted.

    Attributes:
        image: the layer that covers it, for people.
        change: "changed", "came" or "went".
    """

    path: str
    image: str
    change: str


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
