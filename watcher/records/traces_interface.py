# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of the interface (interface.py) that describes `Trace` and `Compare`; traces.py has its data classes."""

from __future__ import annotations

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
# problem: why the service cannot use the path, or why it is not told. outside: the path leads out of /etc, to this one.
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
# note: of a directory, why what is in it is not told, though there is something.
type TracedFile (
  path: string,
  change: string,
  type: string,
  layer: ?int,
  covers: []int,
  mount: string,
  note: string
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

# What differs between two stacks of a service; as Trace. No contents are told of a file that the user could not read,
# and no names in a directory that he could not list.
# before: a stack, or the beginning of one, a number of stacks back, "shown" or "none"; after: likewise. Without, what
# the service shows, and what it should have now.
method Compare(service: string, before: ?string, after: ?string) -> (diff: Diff, truncated: bool, redacted: bool)
"""
