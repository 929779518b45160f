# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

from watcher import daemon
from watcher.cli.answers import fail
from watcher.managers.systemd.dbus import BusLost
from watcher.model import Later, Unsupported, problem
from watcher.records.alone import AlreadyRunning
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    stopped: Exception | None = None
    try:
        daemon.main(settings)
    except* (AlreadyRunning, Unsupported, BusLost, Later, OSError) as group:
        stopped = _first(group)
    if stopped is None:
        return ExitStatus.DONE
    too_old = isinstance(stopped, Unsupported)
    return fail(problem(stopped), ExitStatus.UNSUPPORTED if too_old else ExitStatus.FAILED)


def _first(error: BaseException) -> Exception:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
