# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entries that a look did not find, and that were not removed: they stay where they were in the stack."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from watcher.model import Entry, Interest, Look, Picks, Remark


def nothing_removed(look: Look, recorded: Sequence[Entry], unmounted: Mapping[str, str]) -> Look:
    """With the entries that the look could not see, though they were not removed.

    Their directory cannot be read, strangers can write to it, or their file system is not mounted.

    Args:
        recorded: the entries that the accepted stack had.
        unmounted: slots of its layers that were on such file systems, with where these were mounted.
    """

    def hidden(entry: Entry) -> Picks | None:
        # What a unit declares is known without reading a directory.
        is_hidden = not entry.declared and (look.unknown or look.unsafe or entry.slot in unmounted)
        return Picks(entry, (), unknown=look.unsafe) if is_hidden else None

    picks = list(with_entries(look, recorded, hidden).picks)
    remarks, interests = list(look.remarks), list(look.interests)
    for number, pick in enumerate(picks):
        if not pick.candidates and pick.entry.slot in unmounted:
            picks[number] = replace(pick, unknown=True)
            words = "its file system is gone, what was accepted from it stays"
            where = unmounted[pick.entry.slot]
            remarks.append(Remark("warning", where, words))
            interests.append(Interest(os.path.dirname(where), pattern=re.escape(os.path.basename(where))))
    return replace(look, picks=tuple(picks), interests=tuple(interests), remarks=tuple(remarks))


def with_entries(look: Look, recorded: Sequence[Entry], missing: Callable[[Entry], Picks | None]) -> Look:
    """With more entries, each above those that it was above.

    Args:
        recorded: the entries that the accepted stack had.
        missing: what to have for one that the look has not; None: nothing.
    """
    picks = list(look.picks)
    for number, entry in enumerate(recorded):
        slots = [pick.entry.slot for pick in picks]
        pick = missing(entry) if entry.slot not in slots else None
        if pick is not None:
            below = (slots.index(one.slot) for one in recorded[:number] if one.slot in slots)
            picks.insert(max(below, default=-1) + 1, pick)
    return replace(look, picks=tuple(picks))
