# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher wait`: until an image is applied, or refused."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

from watcher.cli.answers import answer, meant
from watcher.cli.follow import Spinner, spinning, write
from watcher.cli.show import fit as fold
from watcher.control.client import NotRunning, TimedOut, wait
from watcher.model import printable, shown
from watcher.records.schema import ExitStatus, Failed, to_dict
from watcher.settings.config import Settings

_LOOKED_BACK = 100
"""Outcomes among which the last one about the image is."""


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    image = options.image
    if "/" in image:  # by the way that its directory's links lead; where its own leads may change
        directory, name = os.path.split(os.path.abspath(image))
        image = os.path.join(os.path.realpath(directory), name)
    last, timed_out, redacted = None, None, [False]
    spinner = Spinner()
    spinner.say("looks")
    printing = nullcontext(write) if options.json else spinning(lambda: str(spinner))
    try:
        with printing as say:
            for last in wait(
                settings.runtime_directory, options.service, image, options.timeout, redacted.append
            ):
                spinner.say(printable(last.answer.kind.replace("-", " ")) or "waits")
                # Strangers are told no more than the status of an answer, so each in progress is the same to them.
                told = last.answer.status != ExitStatus.TIMED_OUT or last.answer.kind not in ("", "looking")
                if told and not options.json:
                    say([*fold([printable(last.answer.text or last.event.message)])])
    except TimedOut:
        if last is None:
            raise
        said = last.answer.text or last.event.message
        if last.answer.kind and not options.json:  # that stands on the line before
            said = f"still {last.answer.kind.replace('-', ' ')}"
        timed_out = TimedOut(f"timed out: {said}")
    except NotRunning as error:
        raise NotRunning(f"{error}{_without_daemon(settings, options.service, image)}")
    if last is None:
        raise Failed("the daemon ended before there was an answer")
    result = {**to_dict(last.event), "answer": last.answer, "redacted": redacted[-1]}
    answer(options, result, [])
    if last.answer.command and not options.json:
        print(f"What helps: {printable(last.answer.command)}")  # not folded, it is to be copied
    if timed_out is not None:
        raise timed_out
    return ExitStatus(last.answer.status)


def _without_daemon(settings: Settings, service: str, image: str) -> str:
    """What can be said of an image without the daemon: that it is not there, or what was said of it last."""
    if "/" in image and not os.path.lexists(image):
        return f"; nothing lies at {shown(image)}{meant(image)}"
    from watcher.records.ledger import LedgerError, Reader

    names = {service, f"{service}.service"}
    try:
        events = [
            one for name in names for one in Reader(settings.state_directory).history(name, _LOOKED_BACK)
        ]
    except LedgerError:  # it is not for everybody
        return ""
    name = os.path.basename(image)
    about = [one for one in events if os.path.basename(one.source) == name]
    return f"; before that: {printable(about[0].message)}" if about else ""
