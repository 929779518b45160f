# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher history`: what was done, when and why."""

from __future__ import annotations

import argparse

from watcher.cli import show
from watcher.cli.answers import answer, fail, read
from watcher.model import Event
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    def without_daemon() -> list[Event]:
        from watcher.records.ledger import Reader

        reader = Reader(settings.state_directory)
        found = reader.history(options.service, options.lines)
        if not found and options.service and "." not in options.service:
            found = reader.history(f"{options.service}.service", options.lines)
        return found

    if options.lines < 1:
        return fail("--lines: at least 1", ExitStatus.USAGE)
    events, redacted = read(
        settings, lambda client: client.history(options.service, options.lines), without_daemon
    )
    answer(options, {"events": events, "redacted": redacted}, show.events(events, verbose=options.verbose))
    return ExitStatus.DONE
