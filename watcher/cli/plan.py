# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher plan`: what a look now would change."""

from __future__ import annotations

import argparse

from watcher.cli import show
from watcher.cli.answers import answer, fail
from watcher.control.client import Client
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    if options.debug and options.service is None:
        return fail("plan --debug: of which SERVICE? It takes exactly one", ExitStatus.USAGE)
    with Client(settings.runtime_directory, timeout=600) as client:
        changes = client.plan(options.service, debug=options.debug)
        redacted = client.redacted
    hint = show.NO_REPORT if options.debug else show.REDACTED
    answer(options, {"changes": changes, "redacted": redacted}, show.changes(changes), hint)
    without = options.debug and any(change.report is None for change in changes)
    return ExitStatus.FAILED if without else ExitStatus.DONE
