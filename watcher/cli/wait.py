# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher wait`: until an image is applied, or refused."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext

from watcher.cli.answers import answer
from watcher.cli.follow import Spinner, spinning
from watcher.cli.show import fit as fold
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
    spinner = Spinner()
    spinner.say("looks")
    quiet = nullcontext(_print) if options.json else spinning(lambda: str(spinner))
    try:
        with quiet as say:
            for last in wait(
                settings.runtime_directory, options.service, image, options.timeout, redacted.append
            ):
                spinner.say(printable(last.answer.kind.replace("-", " ")) or "waits")
                # Strangers are told no more than the status of an answer, so each in progress is the same to them.
                told = last.answer.status != 4 or last.answer.kind not in ("", "looking")
                if told and not options.json:
                    say([*fold([printable(last.answer.text or last.event.message)])])
    except TimedOut:
        if last is None:
            raise
        timed_out = TimedOut(f"timed out: {last.answer.text or last.event.message}")
    if last is None:
        raise Failed("the daemon ended before there was an answer")
    result = {**to_dict(last.event), "answer": last.answer, "redacted": redacted[-1]}
    answer(options, result, [])
    if last.answer.command and not options.json:
        print(f"What helps: {printable(last.answer.command)}")  # not folded, it is to be copied
    if timed_out is not None:
        raise timed_out
    return ExitStatus(last.answer.status)


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)
