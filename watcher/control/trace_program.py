# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that looks for a client of the control socket (trace_process.py): `origin` and `diff` in pieces.

It has limits: what it looks at is as large as its makers like, and where it takes too much, it alone is to end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from watcher.control.diff import differences
from watcher.control.origin import origins
from watcher.control.trace_pieces import ERROR, LAST, MORE
from watcher.images.access import User
from watcher.model import Busy, Refused, problem
from watcher.records import journal
from watcher.records.ledger import LedgerError
from watcher.records.schema import ErrorReply, Failed, to_dict
from watcher.records.traces import Diff, Origin
from watcher.settings.config import Settings

ALONE_MAX = 2 * 1024 * 1024
"""Bytes of files in the reply to a client that takes one alone."""
ANSWER_MAX = 32 * 1024 * 1024
"""Bytes of all pieces but the last. They are in memory until the client has taken them."""
PIECE_MAX = 256 * 1024
"""Bytes of files in one piece, which has one at least: two texts of 1 MiB are 13 MiB at most as JSON of hunks."""
MEMORY_MAX = 256 * 1024 * 1024
"""Bytes of data (RLIMIT_DATA): a look takes 40 MiB as a rule. Two of this size do not fill the unit's MemoryHigh=."""
CPU_SEC = 60
OPEN_MAX = 16 * 1024
"""Descriptors: a stack may have 498 layers, of which each has two, and some more on the way to a file."""
ASK_ROOT = ": have root ask, who looks without the daemon"

Say = Callable[[bytes, str], None]


def main() -> None:
    """Read the order from standard input, and write the pieces to standard output."""
    gc.freeze()  # as in cli/main.py: a tenth of what a look takes
    # Whatever else may print there must not come between.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    journal.configure()
    _limit()
    order = json.load(sys.stdin)

    def say(kind: bytes, text: str) -> None:
        out.write(kind + text.encode() + b"\n")
        out.flush()
        if kind == MORE and out.tell() > ANSWER_MAX:
            raise Failed(f"it is more than {ANSWER_MAX >> 20} MiB{ASK_ROOT}")

    try:
        answer(Settings(**order["settings"]), order["asked"], say)
    except ErrorReply as error:
        say(ERROR, _json({"error": error.name, "parameters": error.parameters()}))
    except MemoryError:
        say(ERROR, _failed(f"it takes more than {MEMORY_MAX >> 20} MiB{ASK_ROOT}"))
    except (Refused, Busy, LedgerError) as error:
        say(ERROR, _failed(str(error)))
    except OSError as error:
        say(ERROR, _failed(problem(error)))


def _failed(reason: str) -> str:
    error = Failed(reason)
    return _json({"error": error.name, "parameters": error.parameters()})


def _json(value: Any) -> str:
    return json.dumps(to_dict(value), separators=(",", ":"))


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_NOFILE, OPEN_MAX),
        (resource.RLIMIT_DATA, MEMORY_MAX),
        (resource.RLIMIT_CPU, CPU_SEC),
    ):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(what, (most, most))


def answer(settings: Settings, asked: dict[str, Any], say: Say) -> None:
    """Say all pieces of an answer.

    Args:
        asked: `trace_process.Asked`, as JSON has it.

    Raises: as `origins()` and `differences()`.
    """
    service, paths = asked["service"], asked["paths"]
    with contextlib.ExitStack() as held:
        user = asked["user"] and User(asked["user"][0], frozenset(asked["user"][1]))
        known: Origin | Diff
        if asked["method"] == "Trace":
            known, found = held.enter_context(origins(settings, service, paths, user))
            name, key = "origin", "paths" if paths else "files"
            rest: Origin | Diff = replace(known, layers=())
        else:
            after = () if asked["after"] is None else (asked["after"],)
            known, found = held.enter_context(differences(settings, service, asked["before"], after, user))
            name, key = "diff", "files"
            before, then = (replace(side, layers=()) for side in (known.before, known.after))
            rest = replace(known, before=before, after=then)
        for items, is_last in _pieces(found, PIECE_MAX if asked["more"] else ALONE_MAX):
            fields = to_dict(known)
            del fields[key]
            if name == "diff":
                fields["differs"] = bool(items)
            ends = is_last or not asked["more"]
            truncated = _json(ends and not is_last)
            body = f'{_json(fields)[:-1]},"{key}":[{",".join(items)}]}}'
            say(LAST if ends else MORE, f'{{"{name}":{body},"truncated":{truncated},"redacted":false}}')
            if ends:
                return
            known = rest


def _pieces(items: Iterable[object], size: int) -> Iterator[tuple[list[str], bool]]:
    """The items as JSON, as many together as there is room for, and whether these are the last."""
    piece: list[str] = []
    room = size
    for item in items:
        text = _json(item)
        room -= len(text)
        if piece and room < 0:
            yield piece, False
            piece, room = [], size - len(text)
        piece.append(text)
    yield piece, True
