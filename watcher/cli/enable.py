# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher enable`: have a unit take part."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from watcher.cli.answers import answer
from watcher.model import shown
from watcher.records.schema import ExitStatus, to_dict
from watcher.settings.config import Settings
from watcher.setup import enable
from watcher.setup.enable import Enabled


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    found = enable.enable(options.service, options.entry, settings.state_directory)
    answer(options, to_dict(found), _lines(found))
    return ExitStatus.DONE


def _lines(found: Enabled) -> Iterator[str]:
    yield f"{shown(found.service)} takes part: drop images into {shown(found.directory)}/"
    if found.needs_restart:
        yield f"It was started before that. Restart it once: systemctl restart {shown(found.service)}"
    if not found.watched:
        yield "Nobody watches: systemctl enable --now confext-watcher"
