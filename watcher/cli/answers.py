# SPDX-License-Identifier: LGPL-2.1-or-later
"""How each command answers: lines for people or one JSON object, and how it fails."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from watcher.cli import show, terminal
from watcher.control.client import Client, NotRunning
from watcher.model import Busy, Refused, printable, shown
from watcher.records.schema import ExitStatus, Failed
from watcher.settings.config import Settings
from watcher.text import nearest

T = TypeVar("T")


def answer(
    options: argparse.Namespace, results: dict[str, object], lines: Iterable[str], hint: str = show.REDACTED
) -> None:
    if options.json:
        print(show.as_json(results))
        return
    for line in show.fit(lines):
        print(line)
    if results.get("redacted"):
        print(f"confext-watcher: {hint}", file=sys.stderr)


def read(settings: Settings, ask: Callable[[Client], T], without_daemon: Callable[[], T]) -> tuple[T, bool]:
    """The daemon's answer, and whether it is redacted.

    The daemon may read what this user may not, and knows who may be told what. So it is asked first.

    Args:
        without_daemon: imports what it needs itself, as in `looked()`.
    """
    try:
        with Client(settings.runtime_directory, timeout=30) as client:
            return ask(client), client.redacted
    except NotRunning as absent:
        from watcher.records.ledger import LedgerError

        try:
            return without_daemon(), False
        except LedgerError as error:
            raise Failed(f"{error}; {absent}")


def fail(text: str, status: ExitStatus) -> ExitStatus:
    line = f"confext-watcher: {printable(text)}"
    folds = sys.stderr.isatty()
    lines = terminal.folded(line, shutil.get_terminal_size().columns, more="    ") if folds else [line]
    print("\n".join(lines), file=sys.stderr)
    return status


def meant(path: str) -> str:
    """What to say beside that a file is not there: "; did you mean web_1.4.raw?", or "" if none is called like it."""
    directory, name = os.path.split(path)
    try:
        names = os.listdir(directory or ".")
    except OSError:
        return ""
    like = nearest(name, names) if name and name not in names else ""
    return f"; did you mean {shown(like)}?" if like else ""


def looked(settings: Settings, ask: Callable[[Client], T], look: Callable[[], T]) -> T:
    """What a look at kernel, store and disk finds: root's own, which needs no daemon; for others, the daemon's.

    Args:
        look: imports what it needs itself: who asks the daemon does not wait for it to load.

    Raises CallError, OSError.
    """
    if os.geteuid() != 0:
        try:
            with Client(settings.runtime_directory, timeout=600) as client:
                return ask(client)
        except NotRunning as error:
            raise NotRunning(
                f"{error}; without it only root may look, at the store and into the service: use sudo"
            )
    from watcher.records.ledger import LedgerError

    # A stack may have 498 layers, of which each has two descriptors, and some more on the way to a file.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        return look()
    except (Refused, Busy, LedgerError) as error:
        raise Failed(str(error))
