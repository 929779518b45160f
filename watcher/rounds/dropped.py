# SPDX-License-Identifier: LGPL-2.1-or-later
"""What lies at a path that somebody asks for, by what a look at a service has found.

People name a dropped file by its path, as they copied it, or by its name alone. Counters in it do not count: attempts
change them. A way to the directory by other links leads to the same file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice

from watcher.images import tries
from watcher.model import Candidate, Declared, Look, Picks, shown
from watcher.records.schema import utf8
from watcher.resolve import vpick
from watcher.resolve.sources import ENTRY_NAME
from watcher.rounds.answer import Dropped, Kind
from watcher.rounds.desired import Desired
from watcher.text import nearest

_NAMES_MAX = 10_000
# How remarks begin on names that do not count (`scan.py`, `sources.py`).
_PASSED = {
    re.compile("(passed over|ignored): .*(leads nowhere|leads in a circle|a dangling link)"): Kind.DANGLING,
    re.compile("(passed over|ignored): "): Kind.MISNAMED,
    re.compile("overridden by "): Kind.ELSEWHERE,
}


def dropped(asked: str, desired: Desired, declared: Declared) -> Dropped:
    """What lies there for the service now. Blocks, on the directories that the look has read, and on no other.

    Args:
        asked: a path, or a file name, as `schema.utf8()` makes it.
        desired: a look with `Given.thorough`.
        declared: what the service declares.
    """
    asked = tries.plain(asked)
    for pick, candidate in _candidates(desired):
        if _is(asked, candidate.path):
            return of_candidate(pick, candidate, desired)
    return Dropped(asked, problem=_problem(asked, desired, declared))


def _candidates(desired: Desired) -> Iterator[tuple[Picks, Candidate]]:
    """Topmost first."""
    for pick in reversed(desired.look.picks):
        for candidate in pick.candidates:
            yield pick, candidate


def _is(asked: str, path: str) -> bool:
    name = utf8(tries.plain(path))
    if "/" not in asked:
        return asked == os.path.basename(name)
    if os.path.basename(asked) != os.path.basename(name):
        return False
    return asked == name or os.path.dirname(asked) == utf8(os.path.realpath(os.path.dirname(path)))


def of_candidate(pick: Picks, candidate: Candidate, desired: Desired) -> Dropped:
    """A candidate of a look with `Given.thorough`."""
    if desired.look.unknown:
        return Dropped(candidate.path, problem=(Kind.STUCK, _why_unknown(desired)))
    passed = {one.candidate.path: one.reason for one in desired.passed if one.slot == pick.entry.slot}
    slot = pick.entry.slot
    return Dropped(
        candidate.path,
        desired.digests.get(candidate.path, ""),
        pick.unsafe or passed.get(candidate.path),
        next((layer for layer in desired.wanted.layers if layer.slot == slot), None),
    )


def _problem(asked: str, desired: Desired, declared: Declared) -> tuple[Kind, str]:
    """Why there is no candidate by that name."""
    if desired.look.unknown:
        return Kind.STUCK, _why_unknown(desired)
    for remark in desired.look.remarks:
        for pattern, kind in _PASSED.items() if _is(asked, remark.path) else ():
            if pattern.match(remark.text):
                return kind, remark.text
    directory, name = os.path.split(asked)
    for pick in desired.look.picks:
        unseen = _unseen(pick)
        if unseen and directory in ("", *_ways(_directory(pick))):
            return Kind.STUCK, unseen
    places = list(dict.fromkeys((*map(_directory, desired.look.picks), *declared.confext_dirs)))
    if directory:
        places = [place for place in places if directory in _ways(place)]
    if not places:
        return Kind.ELSEWHERE, "the service does not look into that directory"
    there = list(map(_names, places))
    for names in there:
        if name in names:
            return Kind.MISNAMED, "a hidden, backup or temporary name, which does not count"
        # The whole name: letter by letter, strangers could spell out what lies in a private directory.
        upload = re.compile(rf"[.#]*{re.escape(name)}([.~#][^.]*)?")
        for other in names if name else ():
            if upload.fullmatch(other) and not re.fullmatch(vpick.NO_LEFTOVER, other):
                return Kind.UPLOADING, f"not there yet; {shown(other)} is, which looks like its upload"
    words = f"nothing is called so in {', '.join(map(shown, places))}"
    counted = (one for names in there for one in names if re.fullmatch(ENTRY_NAME, one))
    like = nearest(name, counted)
    return Kind.NOT_THERE, f"{words}; did you mean {shown(like)}?" if like else words


def _ways(directory: str) -> tuple[str, str]:
    """A directory as it is called, and as its links lead there."""
    return utf8(directory), utf8(os.path.realpath(directory))


def drop_directories(declared: Declared, look: Look) -> tuple[str, ...]:
    """Where images are dropped for a service."""
    return tuple(dict.fromkeys((*declared.confext_dirs, *map(_directory, look.picks))))


def _directory(pick: Picks) -> str:
    spec = vpick.parse_path(pick.entry.path, pick.entry.kind)
    return os.path.dirname(pick.entry.path) if spec is None else spec.directory


def _unseen(pick: Picks) -> str:
    """Why nothing can be seen of an entry, "" if it can."""
    if pick.unsafe is not None and all(one.path == pick.entry.path for one in pick.candidates):
        return str(pick.unsafe)
    if pick.unknown and not pick.candidates:
        return f"{shown(_directory(pick))} cannot be read, what was accepted from it stays"
    return ""


def _why_unknown(desired: Desired) -> str:
    said = (one for one in desired.look.remarks if "stays as it is" in one.text or one.path == "RootImage=")
    return next((f"{shown(one.path)}: {one.text}" for one in said), "its directories cannot be read")


def _names(directory: str) -> frozenset[str]:
    try:
        with os.scandir(directory) as entries:
            return frozenset(utf8(entry.name) for entry in islice(entries, _NAMES_MAX))
    except OSError:
        return frozenset()
