# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher origin`: which image the files of a service's /etc come from."""

from __future__ import annotations

import argparse

from watcher.cli import show, show_origin
from watcher.cli.answers import looked
from watcher.control import origin
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """Raises CallError, OSError."""
    service, paths = options.service, options.paths
    found = looked(
        settings,
        lambda client: client.origin(service, paths),
        lambda: origin.origin(settings, service, paths),
    )
    lines = [show.as_json(found, compact=True)] if options.json else show.fit(show_origin.origin(found))
    for line in lines:
        print(line)
    return ExitStatus.DONE
