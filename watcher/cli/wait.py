# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher wait`: until an image is applied, or refused."""

from __future__ import annotations

import argparse
import os

from watcher.cli.answers import answer
from watcher.control.client import TimedOut, wait
from watcher.model import printable
from watcher.records.schema import ExitStatus, Failed, to_dict
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    image = options.image
    if "/" in image:  # by the way that its directory's links lead; where its own leads may change
        directory, name = os.path.split(os.path.abspath(image))
        image = os.path.join(os.path.realpath(directory), name)
    last, timed_out, redacted = None, None, [False]
    try:
        for last in wait(
            settings.runtime_directory, options.service, image, options.timeout, redacted.append
        ):
            # Strangers are told no more than the status of an answer, so each in progress is the same to them.
            if not options.json and (last.answer.status != 4 or last.answer.kind not in ("", "looking")):
                print(printable(last.answer.text or last.event.message), flush=True)
    except TimedOut:
        if last is None:
            raise
        timed_out = TimedOut(f"timed out: {last.answer.text or last.event.message}")
    if last is None:
        raise Failed("the daemon ended before there was an answer")
    helps = f"What helps: {last.answer.command}" if last.answer.command else ""
    result = {**to_dict(last.event), "answer": last.answer, "redacted": redacted[-1]}
    answer(options, result, [helps] if helps else [])
    if timed_out is not None:
        raise timed_out
    return ExitStatus(last.answer.status)
