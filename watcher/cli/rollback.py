# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher rollback`: back to the stack before, and no longer."""

from __future__ import annotations

import argparse

from watcher.cli import show
from watcher.cli.answers import answer
from watcher.control.client import Client
from watcher.model import Outcome, printable, shown
from watcher.records.schema import ExitStatus, to_dict
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    with Client(settings.runtime_directory, timeout=600) as client:
        if options.forget:
            contents = client.forget(options.service)
            answer(options, {"forgotten": contents}, show.forgotten(options.service, contents))
            return ExitStatus.DONE
        for event in client.rollback(options.service, options.to):
            if event.outcome is Outcome.REQUESTED and not options.json:
                print(printable(event.message), flush=True)
    stays = f"It stays there until `confext-watcher rollback --forget {shown(options.service)}`."
    answer(options, to_dict(event), (printable(event.message), stays))
    failed = event.outcome in (Outcome.FAILED, Outcome.NEEDS_RESTART)
    return ExitStatus.FAILED if failed else ExitStatus.DONE
