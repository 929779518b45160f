# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher origin`: which image the files of a service's /etc come from."""

from __future__ import annotations

import argparse

from watcher.cli import show, show_origin
from watcher.cli.answers import looked
from watcher.control import trace_client
from watcher.records.schema import ExitStatus
from watcher.records.traces import Origin
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """Raises CallError, OSError."""
    service, paths = options.service, options.paths

    def look() -> Origin:
        from watcher.control import origin

        return origin.origin(settings, service, paths)

    found = looked(settings, lambda client: trace_client.origin(client, service, paths), look)
    lines = [show.as_json(found, compact=True)] if options.json else show.fit(show_origin.origin(found))
    for line in lines:
        print(line)
    return ExitStatus.DONE
