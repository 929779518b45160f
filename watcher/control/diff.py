# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher diff`: what differs between two stacks of a service, file by file. No daemon is needed.

Both stacks lie on the base that the service has. What they have from the same layers is not looked at.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace

from watcher.control import compared, text_diff
from watcher.control.compared import Choice
from watcher.control.subject import ETC, Subject, subject
from watcher.control.trace_client import ROOT_ONLY, named_images
from watcher.images.access import CLOSED, User, may_read, told
from watcher.images.changes import Change, Comparison, changes
from watcher.images.contents import Contents, Reader, xattrs
from watcher.images.layers import Type
from watcher.records.schema import Failed
from watcher.records.traces import Compared, Diff, Difference, Side
from watcher.settings.config import Settings

HIDDEN = "contents are not shown to a user who could not read the file there"
TEXTS_MAX = 64 << 20
"""Bytes of the hunks of all files together."""


def diff(settings: Settings, service: str, before: str | None = None, after: Sequence[str] = ()) -> Diff:
    """What differs; as `differences()`."""
    with differences(settings, service, before, after) as (compared_, found):
        files = tuple(found)
        return replace(compared_, differs=bool(files), files=files)


@contextlib.contextmanager
def differences(
    settings: Settings,
    service: str,
    before: str | None = None,
    after: Sequence[str] = (),
    user: User | None = None,
) -> Iterator[tuple[Diff, Iterator[Difference]]]:
    """What is compared, and what differs, as it is found in the block.

    Args:
        before: a stack as `compared.named()` takes it; None: what the service shows, or where `after` is an image, the
            newest accepted stack.
        after: a stack, or images; nothing: what the service should have now.
        user: is told no contents of files that he could not read, and no names that he could not list; None: root asks.

    Raises, in the block too:
        Whatever `subject()` does.
        Refused: a directory is nested too deeply, or there is too much.
        Busy: what is not ours changed meanwhile.
    """
    images = named_images(after)
    if images and user is not None:
        raise Failed(ROOT_ONLY)
    if images:  # before there is a thread that enters mount namespaces
        from watcher.control import compared_drop
    with subject(settings, service, user) as one, contextlib.ExitStack() as held:
        if images:
            new = held.enter_context(compared_drop.dropped(settings, one, after))
        elif after:
            new = compared.named(settings, one, after[0])
        else:
            new = compared.wanted(settings, one)
        if before is not None:
            old = compared.named(settings, one, before)
        elif images and one.kept:
            old = Choice("accepted", one.kept[0].stack)
        else:
            old = compared.named(settings, one, "shown")
        known, wanted = (Compared(side.what, side.stack.id, one.layers(side.stack)) for side in (old, new))
        yield Diff(one.name, False, known, wanted, (), one.drifted), iter(_Differences(one, old, new))


class _Differences:
    """The differences, as they are found."""

    def __init__(self, one: Subject, old: Choice, new: Choice) -> None:
        self._layers, (self._before, self._after) = one.opened(
            old.stack, new.stack, copies=(*old.copies, *new.copies)
        )
        digests = (layer.digest for stack in (old.stack, new.stack) for layer in reversed(stack.layers))
        self._digests = [*dict.fromkeys(digests), ""]
        """As the layers are numbered."""
        self._comparison = Comparison()
        self._reader = Reader()
        self._left = TEXTS_MAX
        self._user = one.user

    def __iter__(self) -> Iterator[Difference]:
        found = changes(self._layers, self._before, self._after)
        return told(found, self._user, self._difference, self._closed)

    def _closed(self, change: Change, said: Difference | None) -> Difference:
        sides = (side and Contents(side.node) for side in (change.before, change.after))
        return replace(said or self._told(change, *sides), note=CLOSED)

    def _difference(self, change: Change) -> Difference | None:
        path, sides = change.path, (change.before, change.after)
        readable = [self._user is None or may_read(self._user, side, path) for side in sides]
        same = self._comparison.same(change)
        one, other = (xattrs(side, path) for side in sides)
        differ = tuple(sorted(name for name in {**one, **other} if one.get(name) != other.get(name)))
        if same and not differ:
            return None
        before, after = (
            None if side is None else self._reader.read(side, path) if may else Contents(side.node)
            for side, may in zip(sides, readable, strict=True)
        )
        found = replace(self._told(change, before, after), xattrs=differ)
        if not all(readable):
            return replace(found, note=HIDDEN)
        return found if same else self._with_text(found, before, after)

    def _told(self, change: Change, before: Contents | None, after: Contents | None) -> Difference:
        what = "changed" if before and after else "added" if after else "removed"
        return Difference("/".join((ETC, *change.path)), what, self._side(before), self._side(after))

    def _side(self, contents: Contents | None) -> Side | None:
        if contents is None:
            return None
        node, status = contents.node, contents.node.status
        return Side(
            node.type.value,
            self._digests[node.layer],
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_size if node.type is Type.FILE else 0,
            contents.target,
            status.st_rdev,
            contents.sha256,
        )

    def _with_text(self, found: Difference, before: Contents | None, after: Contents | None) -> Difference:
        files = [one for one in (before, after) if one is not None and one.node.type is Type.FILE]
        if not files:
            return found
        if not all(one.sha256 for one in files):
            return replace(found, note="more than is read: not compared")
        if any(one.text is None for one in files):
            return found
        hunks = text_diff.unified(*(one.text if one else None for one in (before, after)))
        if hunks is None:
            return replace(found, note=f"too different: diff(1) was ended after {text_diff.SECONDS:.0f} s")
        self._left -= len(hunks)
        if self._left < 0:
            return replace(found, note=f"more than {TEXTS_MAX >> 20} MiB of text: not shown")
        lines = hunks.split(b"\n")
        counts = (sum(line.startswith(sign) for line in lines) for sign in (b"+", b"-"))
        added, removed = counts
        return replace(found, diff=os.fsdecode(hunks), added=added, removed=removed)
