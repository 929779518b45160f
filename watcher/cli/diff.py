# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher diff`: what would change in a service's /etc, or did."""

from __future__ import annotations

import argparse

from watcher.cli import show, show_diff
from watcher.cli.answers import looked, meant
from watcher.control import trace_client
from watcher.records.schema import ExitStatus
from watcher.records.traces import Diff
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """As diff(1), 1 says that something differs. Raises CallError, OSError."""
    service, before, after = options.service, options.before, options.after

    def look() -> Diff:
        from watcher.control import diff

        return diff.diff(settings, service, before, after)

    try:
        found = looked(settings, lambda client: trace_client.diff(client, service, before, after), look)
    except FileNotFoundError as error:
        if error.filename in after:
            error.strerror = f"{error.strerror}{meant(error.filename)}"
        raise
    if options.json:
        print(show.as_json(found, compact=True))
    else:
        # Not folded: lines of files are as long as they are.
        for line in show_diff.diff(found, stat=options.stat, colour=show_diff.coloured()):
            print(line)
    return ExitStatus.FAILED if found.differs else ExitStatus.DONE
