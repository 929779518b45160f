# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher remove`: undoes `init`; the service has the host's own /etc again."""

from __future__ import annotations

import argparse

from watcher.cli import show, show_remove
from watcher.cli.answers import answer
from watcher.cli.asking import agreed
from watcher.records.schema import ExitStatus, to_dict
from watcher.settings.config import Settings
from watcher.setup import enable, remove


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    enable.require_systemd()
    plan = remove.plan(options.service, settings, everything=options.all)
    if not options.dry_run:
        enable.require_root("have a unit take no part any more")
    planned = show_remove.planned(plan)
    if not options.json:
        for line in show.fit(planned):
            print(line)
    if options.dry_run or plan.nothing:
        said = [] if plan.nothing else ["Nothing was done."]
        answer(options, {"planned": planned}, said)
        return ExitStatus.DONE
    if not agreed(options):
        print("Nothing was done.")
        return ExitStatus.FAILED
    if not options.json and plan.ends:
        print("Waiting until it has the host's own /etc ...", flush=True)
    removed = remove.carry_out(plan, settings)
    answer(options, to_dict(removed), show_remove.done(removed))
    return (
        ExitStatus.FAILED if removed.ends and removed.watched and removed.runs == "stack" else ExitStatus.DONE
    )
