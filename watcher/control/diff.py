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
from watcher.images.access import READ, SEARCH, User, may
from watcher.images.changes import Change, Comparison, changes
from watcher.images.changes import Side as Shown
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
        user: shows no contents of files that this user could not read; None: root asks.

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
    with subject(settings, service) as one, contextlib.ExitStack() as held:
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
        yield Diff(one.name, False, known, wanted, (), one.drifted), iter(_Differences(one, old, new, user))


class _Differences:
    """The differences, as they are found."""

    def __init__(self, one: Subject, old: Choice, new: Choice, user: User | None) -> None:
        self._layers, (self._before, self._after) = one.opened(
            old.stack, new.stack, copies=(*old.copies, *new.copies)
        )
        digests = (layer.digest for stack in (old.stack, new.stack) for layer in reversed(stack.layers))
        self._digests = [*dict.fromkeys(digests), ""]
        """As the layers are numbered."""
        self._comparison = Comparison()
        self._reader = Reader()
        self._left = TEXTS_MAX
        self._rights = Rights(user) if user is not None else None

    def __iter__(self) -> Iterator[Difference]:
        for change in changes(self._layers, self._before, self._after):
            found = self._difference(change)
            if found is not None:
                yield found

    def _difference(self, change: Change) -> Difference | None:
        path = change.path
        readable = self._rights.readable(change) if self._rights is not None else (True, True)
        same = self._comparison.same(change)
        one, other = (xattrs(side, path) for side in (change.before, change.after))
        differ = tuple(sorted(name for name in {**one, **other} if one.get(name) != other.get(name)))
        if same and not differ:
            return None
        before, after = (
            None if side is None else self._reader.read(side, path) if may else Contents(side.node)
            for side, may in zip((change.before, change.after), readable, strict=True)
        )
        found = Difference(
            "/".join((ETC, *path)),
            "changed" if before and after else "added" if after else "removed",
            self._side(before),
            self._side(after),
            differ,
        )
        if not all(readable):
            return replace(found, note=HIDDEN)
        return found if same else self._with_text(found, before, after)

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


class Rights:
    """Which files a user could read in each of two stacks, by these and by the directories that lead there.

    Changes come depth first, and each directory above a change is one, too.
    """

    def __init__(self, user: User) -> None:
        self._user = user
        self._searchable: list[tuple[bool, bool]] = []
        """Of each directory on the way to the last change, from the root on."""

    def readable(self, change: Change) -> tuple[bool, bool]:
        """Of each side, whether the user could see what is in it; True where there is no file, and no link."""
        del self._searchable[len(change.path) :]
        before, after = self._searchable[-1] if self._searchable else (True, True)
        sides = ((change.before, before), (change.after, after))
        self._searchable.append((self._may(sides[0], SEARCH, change), self._may(sides[1], SEARCH, change)))
        return self._may(sides[0], READ, change), self._may(sides[1], READ, change)

    def _may(self, side: tuple[Shown | None, bool], wanted: int, change: Change) -> bool:
        shown, reached = side
        kind = Type.DIRECTORY if wanted == SEARCH else Type.FILE
        if wanted == READ and shown is not None and shown.node.type is Type.LINK:
            return reached
        if shown is None or shown.node.type is not kind:
            return wanted == READ
        node = f"/proc/self/fd/{shown.directory}/{change.path[-1]}" if change.path else shown.directory
        return reached and may(self._user, wanted, node, shown.node.status)
