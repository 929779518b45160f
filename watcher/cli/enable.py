# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher enable`: have a unit take part."""

from __future__ import annotations

import argparse

from watcher.cli.answers import answer
from watcher.records.schema import ExitStatus, to_dict
from watcher.settings.config import Settings
from watcher.setup import enable


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    found = enable.enable(options.service, options.entry, settings.state_directory)
    answer(options, to_dict(found), enable.lines(found))
    return ExitStatus.DONE
