# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher exec`: this process becomes a program that is on its stack."""

from __future__ import annotations

import argparse
import shlex

from watcher.cli.answers import fail
from watcher.managers.registration import service_settings, valid_name
from watcher.model import shown
from watcher.records.schema import ExitStatus
from watcher.rounds.exec_service import CannotStart, ExecOptions, launch
from watcher.settings import signals
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    if not valid_name(options.name):
        refused = f"{shown(options.name)!r} cannot be the name of a service: use one like web.service"
        return fail(f"--name: {refused}", ExitStatus.USAGE)
    try:
        command = tuple(shlex.split(options.reload_command))
    except ValueError as error:
        return fail(f"--reload-command: {error}", ExitStatus.USAGE)
    try:
        signals.signal_number(options.reload_signal or "HUP")
    except ValueError as error:
        return fail(f"--reload-signal: {error}", ExitStatus.USAGE)
    _, wrong = service_settings(options.set, options.check, options.health_check)
    if wrong:
        return fail(f"{wrong[0].text}", ExitStatus.USAGE)
    asked = ExecOptions(
        name=options.name,
        program=tuple(options.program),
        confext_dirs=tuple(options.confext_dir),
        images=tuple(options.extension_image),
        directories=tuple(options.extension_directory),
        reload_signal=options.reload_signal,
        reload_command=command,
        check=tuple(options.check),
        health_check=tuple(options.health_check),
        settings=tuple(options.set),
    )
    try:
        launch(settings, asked)
    except CannotStart as error:
        return fail(str(error), ExitStatus.FAILED)
    raise AssertionError("launch() does not return")
