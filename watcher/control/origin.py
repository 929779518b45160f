# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher origin`: which image the files of a service's `/etc` come from. No daemon is needed.

A mount below `/etc` (`TemporaryFileSystem=`, `InaccessiblePaths=`) hides what the stack has there, and is told, too.
What is asked for by path is looked up in the service as well, and what does not agree is told: the kernel may show an
old file of the host's where a process holds it open.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from watcher.control.subject import ETC, Mounts, Subject, same, seen, subject
from watcher.images.access import CLOSED, User, told
from watcher.images.changes import Change, Comparison, changes
from watcher.images.layers import Found, Item, Node, Type
from watcher.records.schema import Failed
from watcher.records.traces import Origin, Piece, TracedFile, TracedPath
from watcher.settings.config import Settings

Number = Callable[[int], int | None]
"""From a number as images/layers.py has it, topmost first, to one as records/traces.py has it."""


def origin(settings: Settings, service: str, paths: Sequence[str] = ()) -> Origin:
    """Where the files come from; as `origins()`."""
    with origins(settings, service, paths) as (known, found):
        if paths:
            return replace(known, paths=tuple(found))
        return replace(known, files=tuple(found))


@contextlib.contextmanager
def origins(
    settings: Settings, service: str, paths: Sequence[str] = (), user: User | None = None
) -> Iterator[tuple[Origin, Iterator[Any]]]:
    """What the stack is, and then each `TracedPath` at these paths, or each `TracedFile` that is not as in the host's
    `/etc`, as it is found in the block.

    Args:
        paths: absolute, or below `/etc`.
        user: is told no names that he could not list, or look up; None: root asks.

    Raises, in the block too:
        Whatever `subject()` does.
        Refused: a path, or a directory, is nested too deeply.
        Busy: what is not ours changed meanwhile.
    """
    with subject(settings, service, user) as one:
        known = Origin(one.name, one.state, one.stack.id, one.layers(one.stack))
        if paths:
            yield replace(known, paths=()), (step for path in paths for step in _path(one, path))
        else:
            yield replace(known, files=()), _files(one)


def _number(stack_length: int) -> Number:
    return lambda layer: stack_length - 1 - layer if layer < stack_length else None


def _files(one: Subject) -> Iterator[TracedFile]:
    layers, (order,) = one.opened(one.stack)
    number = _number(len(one.stack.layers))
    mounts = Mounts(one.parts.table)
    comparison = Comparison()

    def look(change: Change) -> TracedFile | None:
        return None if comparison.same(change) else _file(change, number, mounts)

    def closed(change: Change, _: TracedFile | None) -> TracedFile:
        return replace(_file(change, number, mounts), note=CLOSED)

    return told(changes(layers, order[-1:], order), one.user, look, closed)


def _file(change: Change, number: Number, mounts: Mounts) -> TracedFile:
    path = "/".join((ETC, *change.path))
    before, after = change.before, change.after
    by: Node | None
    if after is not None:
        by, what, kind = after.node, "new" if before is None else "changed", after.node.type
    else:
        assert before is not None
        # The topmost whiteout, or where the directory is opaque that has it not, nothing.
        by = next((node for node in change.nodes if node.type is Type.WHITEOUT), None)
        what, kind = "removed", before.node.type
    covers: tuple[int, ...] = ()
    if len(change.nodes) > 1:
        others = (number(node.layer) for node in change.nodes if node is not by)
        covers = tuple(layer for layer in others if layer is not None)
    layer = None if by is None else number(by.layer)
    return TracedFile(path, what, kind.value, layer, covers, mounts.over(path))


def _path(one: Subject, path: str) -> Iterator[TracedPath]:
    absolute = path if path.startswith("/") else f"{ETC}/{path}"
    if "\0" in path:
        raise Failed("a path cannot have a NUL in it")
    layers, _ = one.opened(one.stack)
    mounts = Mounts(one.parts.table)
    number = _number(len(one.stack.layers))
    for found in layers.find(absolute):
        where = "/".join((ETC, *found.path))
        untold = found.outside or (found.problem and not found.chain)
        mount = "" if untold else mounts.over(where)
        differs = "" if mount or found.outside or found.problem else _differs(one, found)
        chain = tuple(_piece(item, number) for item in found.chain)
        yield TracedPath(where, chain, found.target, found.problem, found.outside, mount, differs)
        if mount:
            return


def _piece(item: Item, number: Number) -> Piece:
    node, covered = item.node, item.by is not None
    return Piece(
        number(node.layer),
        node.type.value,
        item.role.value,
        node.opaque,
        number(item.by) if item.by is not None else None,
        "/".join((ETC, *item.at)) if covered else "",
        stat.S_IMODE(node.status.st_mode),
        node.status.st_uid,
        node.status.st_gid,
        node.status.st_size if node.type is Type.FILE else 0,
    )


def _differs(one: Subject, found: Found) -> str:
    """What a running service sees instead; "" if it sees what was found."""
    if one.parts.etc < 0:
        return ""
    try:
        status = seen(one.parts, found.path)
    except OSError as error:
        return f"it cannot be looked at there: {error.strerror}"
    shown = found.shown
    if same(status, shown):
        return ""
    return "there is nothing" if status is None else f"there is {_described(status)}"


def _described(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return f"a file of {status.st_size} bytes, mode {stat.S_IMODE(status.st_mode):04o}"
    what = (
        "a directory"
        if stat.S_ISDIR(status.st_mode)
        else "a link"
        if stat.S_ISLNK(status.st_mode)
        else "no file"
    )
    return f"{what}, mode {stat.S_IMODE(status.st_mode):04o}"
