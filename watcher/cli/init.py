# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher init`: have a unit take part, with a first version of what it has now, and its recipe."""

from __future__ import annotations

import argparse
import sys
import time

from watcher.cli import ending, show, show_init
from watcher.cli.answers import answer
from watcher.cli.asking import agreed
from watcher.control import client
from watcher.control.client import NotRunning, TimedOut
from watcher.records.schema import ExitStatus, ServiceNotFound, Waited, to_dict
from watcher.settings.config import Settings
from watcher.setup import enable, init
from watcher.setup.init import Plan, Wish

_WAIT_SEC = 60.0


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    wish = Wish(options.service, tuple(options.sources), options.name, options.recipe, options.user)
    enable.require_systemd()
    plan = init.plan(wish, settings)
    if not options.dry_run:
        enable.require_root("have a unit take part")
    planned = show_init.planned(plan)
    if not options.json:
        for line in show.fit(planned):
            print(line)
        sys.stdout.flush()  # what is wrong is said on standard error, after this
    if options.dry_run:
        answer(options, {"planned": planned}, ["Nothing was done."])
        return ExitStatus.DONE
    if not plan.nothing and not agreed(options):
        print("Nothing was done.")
        return ExitStatus.FAILED
    ending.end_as_interrupted()  # what was begun is undone
    found = init.carry_out(plan, settings)
    asks = bool(plan.image) and found.watched
    if asks and not options.json:
        print("Asking the daemon what becomes of that ...", flush=True)
    accepted = _accepted(plan, settings) if asks else None
    result = {
        **to_dict(found),
        "image": plan.image,
        "drop_in": plan.drop_in,
        "accepted": show_init.is_good(accepted),
    }
    answer(options, result, show_init.told(plan, found, accepted))
    return ExitStatus.DONE if show_init.is_good(accepted) is not False else ExitStatus.FAILED


def _accepted(plan: Plan, settings: Settings) -> Waited | None:
    """What the daemon makes of the first version: its check may refuse what the host has. None: no answer yet."""
    deadline = time.monotonic() + _WAIT_SEC
    answers: list[Waited] = []
    while time.monotonic() < deadline:
        left = deadline - time.monotonic()
        try:
            for each in client.wait(
                settings.runtime_directory, plan.unit.name, plan.image, left, lambda _: None
            ):
                answers.append(each)
            break
        except ServiceNotFound:
            time.sleep(0.1)  # it has not seen the new directory yet
        except (TimedOut, NotRunning):
            break
    return answers[-1] if answers and answers[-1].answer.status != ExitStatus.TIMED_OUT else None
