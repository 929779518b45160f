# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher plan`: what a look now would change."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from watcher.cli import show, show_diff
from watcher.cli.answers import answer, fail, looked
from watcher.control import trace_client
from watcher.control.client import Client
from watcher.records.schema import ExitStatus, PlannedChange, to_dict
from watcher.records.traces import Diff
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    if options.debug and options.service is None:
        return fail("plan --debug: of which SERVICE? It takes exactly one", ExitStatus.USAGE)
    with Client(settings.runtime_directory, timeout=600) as client:
        changes = client.plan(options.service, debug=options.debug, check=options.check)
        redacted = client.redacted
    differ = {one.service: _diff(settings, one) for one in changes if one.changes} if options.stat else {}
    results: dict[str, object] = {"changes": changes, "redacted": redacted}
    if options.stat:
        results["changes"] = [{**to_dict(one), "diff": differ.get(one.service)} for one in changes]
    hint = show.NO_REPORT if options.debug else show.REDACTED
    answer(options, results, _lines(changes, differ), hint)
    unreported = options.debug and any(one.report is None for one in changes)
    return ExitStatus.FAILED if unreported or any(one.check for one in changes) else ExitStatus.DONE


def _diff(settings: Settings, change: PlannedChange) -> Diff:
    """File by file, from what the service has to what it should have. Raises CallError, OSError."""

    def look() -> Diff:
        from watcher.control import diff

        return diff.diff(settings, change.service)

    return looked(settings, lambda client: trace_client.diff(client, change.service), look)


def _lines(changes: Sequence[PlannedChange], differ: dict[str, Diff]) -> Iterator[str]:
    if not changes:
        yield from show.changes(changes)
    for change in changes:
        yield from show.changes([change])
        if change.service in differ:
            found = show_diff.diff(differ[change.service], stat=True, colour=show_diff.coloured())
            yield from (f"  {line}" for line in found)
