# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `origin` and `diff`: they look, and print what they find."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import TypeVar

from watcher.control import diff as compare
from watcher.control import origin as trace
from watcher.control import show, show_diff, show_origin
from watcher.model import Busy, Refused
from watcher.records.ledger import LedgerError
from watcher.records.schema import ExitStatus, Failed
from watcher.settings.config import Settings

T = TypeVar("T")


def origin(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """Raises CallError, OSError."""
    found = _looked(lambda: trace.origin(settings, options.service, options.paths))
    lines = [show.as_json(found, compact=True)] if options.json else show.fit(show_origin.origin(found))
    for line in lines:
        print(line)
    return ExitStatus.DONE


def diff(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """As diff(1), 1 says that something differs. Raises CallError, OSError."""
    found = _looked(lambda: compare.diff(settings, options.service, options.before, options.after))
    if options.json:
        print(show.as_json(found, compact=True))
    else:
        # Not folded: lines of files are as long as they are.
        for line in show_diff.diff(found, stat=options.stat, colour=show_diff.coloured()):
            print(line)
    return ExitStatus.FAILED if found.differs else ExitStatus.DONE


def _looked(look: Callable[[], T]) -> T:
    # A stack may have 498 layers, of which each has two descriptors, and some more on the way to a file.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        return look()
    except (Refused, Busy, LedgerError) as error:
        raise Failed(str(error))
