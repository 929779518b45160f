# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher diff`, as the command line prints it for people.

What stands in the files is escaped as everything else is: it could command a terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from watcher.cli.show_origin import HOST, label
from watcher.model import printable, shown
from watcher.records.traces import Compared, Diff, Difference, Side

_WHAT = {
    "shown": "what it sees now",
    "accepted": "what its next start gets",
    "desired": "what it should have now",
    "kept": "an earlier stack",
    "none": HOST,
    "dropped": "with what is to be dropped",
}
_BOLD, _RED, _GREEN, _CYAN, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[36m", "\x1b[m"
_COLOURS = {"-": _RED, "+": _GREEN, "@": _CYAN}
_BAR = 20
"""Signs at most: with names of 50 characters that makes 80."""


def coloured() -> bool:
    """Whether colours are for the standard output (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def diff(found: Diff, *, stat: bool, colour: bool) -> Iterator[str]:
    bold, plain = (_BOLD, _PLAIN) if colour else ("", "")
    yield f"{bold}{shown(found.service)}: {_stack(found.before)} -> {_stack(found.after)}{plain}"
    if not found.differs:
        yield "no difference"
    elif stat:
        yield from _statistics(found, colour)
    else:
        labels = {layer.digest: label(layer) for side in (found.before, found.after) for layer in side.layers}
        for file in found.files:
            yield from _file(file, labels | {"": HOST}, colour)
    for one in found.drifted:
        covered = f"since {shown(one.image)}, which covers it, was accepted"
        yield f"{bold}{shown(one.path)}{plain}: the host's own file {one.change} {covered}"


def _stack(side: Compared) -> str:
    layers = ", ".join(label(layer) for layer in reversed(side.layers)) or HOST
    what = _WHAT[side.what]
    return layers if what == HOST else f"{layers} ({what})"


def _file(file: Difference, labels: dict[str, str], colour: bool) -> Iterator[str]:
    bold, plain = (_BOLD, _PLAIN) if colour else ("", "")
    before, after = file.before, file.after
    path = shown(file.path)
    said = "; ".join(_sayings(file))
    if said:
        yield f"{bold}{path}{plain}: {said}"
    if not file.diff:
        return
    for sign, side in (("---", before), ("+++", after)):
        has = side is not None and side.type == "file"
        yield f"{bold}{sign} {path if has else '/dev/null'}{f' ({labels[side.layer]})' if side and has else ''}{plain}"
    for line in file.diff.removesuffix("\n").split("\n"):
        start = _COLOURS.get(line[:1], "") if colour else ""
        yield f"{start}{printable(line, keep=chr(9))}{_PLAIN if start else ''}"


def _sayings(file: Difference) -> Iterator[str]:
    """What a unified diff does not say."""
    before, after = file.before, file.after
    if before is None or after is None:
        side = after or before
        assert side is not None
        yield f"{file.change}, {_described(side, file)}"
    elif before.type != after.type:
        yield f"{_described(before, file)} -> {_described(after, file)}"
    else:
        yield from _attributes(before, after)
        if before.type == "file" and file.diff is None and before.sha256 != after.sha256:
            yield f"{_content(before)} -> {_content(after)}"
    if file.xattrs:
        yield f"extended attributes {', '.join(map(shown, file.xattrs))}"
    if file.note:
        yield file.note


def _attributes(before: Side, after: Side) -> Iterator[str]:
    if before.mode != after.mode:
        yield f"mode {before.mode:04o} -> {after.mode:04o}"
    if (before.uid, before.gid) != (after.uid, after.gid):
        yield f"owner {before.uid}:{before.gid} -> {after.uid}:{after.gid}"
    if before.target != after.target and all((before.target, after.target)):  # one may be not for this user
        yield f"link to {shown(before.target)} -> {shown(after.target)}"
    if before.device != after.device:
        yield f"device {_device(before)} -> {_device(after)}"


def _described(side: Side, file: Difference) -> str:
    if side.type == "link":
        return f"a link to {shown(side.target)}" if side.target else "a link"
    owned = f"{side.mode:04o} of {side.uid}:{side.gid}"
    if side.type == "file":
        return f"file {owned}" + (f", {_content(side)}" if file.diff is None else "")
    return f"{side.type} {owned}{f' {_device(side)}' if side.type == 'device' else ''}"


def _content(side: Side) -> str:
    return f"{side.size} bytes{f', sha256 {side.sha256}' if side.sha256 else ''}"


def _device(side: Side) -> str:
    return f"{os.major(side.device)}:{os.minor(side.device)}"


def _statistics(found: Diff, colour: bool) -> Iterator[str]:
    """As `diff --stat` of git has it."""
    names = [shown(file.path) for file in found.files]
    width = min(max(map(len, names)), 50)
    most = max([1, *(file.added + file.removed for file in found.files)])
    green, red, plain = (_GREEN, _RED, _PLAIN) if colour else ("", "", "")
    for name, file in zip(names, found.files, strict=True):
        if file.diff:
            added, removed = (
                sign * (round(count * min(1.0, _BAR / most)) or min(count, 1))
                for sign, count in (("+", file.added), ("-", file.removed))
            )
            what = f"{file.added + file.removed:>4} {green}{added}{plain}{red}{removed}{plain}"
        else:
            what = "; ".join(_brief(file))
        yield f" {name:<{width}} | {what}"
    count = len(found.files)
    more, fewer = sum(file.added for file in found.files), sum(file.removed for file in found.files)
    paths, lines = "path differs" if count == 1 else "paths differ", "line" if more == 1 else "lines"
    yield f" {count} {paths}, {more} {lines} added, {fewer} removed"


def _brief(file: Difference) -> Iterator[str]:
    side = file.after or file.before
    assert side is not None
    if file.change != "changed":
        yield f"{file.change}, {side.type}"
    else:
        yield from _sayings(file)
