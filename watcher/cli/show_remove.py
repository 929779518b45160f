# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `remove` is going to do, and what it has done, as people see it."""

from __future__ import annotations

from collections.abc import Sequence

from watcher.cli.show import Command
from watcher.model import Outcome, printable, shown
from watcher.setup.remove import Plan, Removed

_NOT_TAKEN = (Outcome.REFUSED, Outcome.FAILED, Outcome.ROLLED_BACK)


def planned(plan: Plan) -> Sequence[str]:
    """What is to be done, for people, before it is."""
    unit = shown(plan.unit)
    if plan.nothing:
        meant = f"; did you mean {shown(plan.meant)}?" if plan.meant else ""
        return [f"{unit} takes no part: there is nothing to remove{meant}", *_staying(plan)]
    said = [
        f"{unit} is to have the host's own /etc again. Nothing is deleted that was dropped, nothing is restarted."
    ]
    if plan.entries:
        said.append(f"  move   {_what(plan)} to {shown(plan.place)}/")
    if plan.there is not None:
        how = "move  " if plan.there.changed else "remove"
        why = ", which was changed by hand" if plan.there.changed else ""
        said.append(f"  {how} {shown(plan.drop_in)}{why}")
    said.append("  run    systemctl daemon-reload")
    return [*said, *_staying(plan)]


def _what(plan: Plan) -> str:
    if not plan.stays:
        names = [name for name in plan.entries if name]
        return f"{shown(plan.top)}/" + (f", with {', '.join(map(shown, names))}" if names else "")
    return " ".join(f"{shown(plan.top)}/{shown(name)}" for name in plan.entries)


def _staying(plan: Plan) -> Sequence[str]:
    said = []
    if plan.stays:
        names = ", ".join(map(shown, plan.stays))
        said.append(
            f"Not made by init, and stays on its /etc: {names} in {shown(plan.top)}/ (--all has it go, too)"
        )
    for path in plan.still:
        said.append(f"It goes on taking part by what {shown(path)} says")
    return said


def done(removed: Removed) -> Sequence[str]:
    """What was done, for people, and what is left to do."""
    unit = shown(removed.service)
    said = [printable(removed.last.message)] if removed.last else []
    if removed.kept:
        said.append(f"What was there lies in {shown(removed.kept)}/ now; delete it when nobody needs it")
    if not removed.ends:
        return [*said, f"{unit} goes on taking part"]
    if removed.runs == "stack":
        if removed.last is not None and removed.last.outcome in _NOT_TAKEN:
            said.append(
                f"{unit} keeps its stack. Mend the host's own /etc first: what is wrong with it is wrong after"
            )
            said[-1] += " a restart, too. Then:"
        else:
            why = "" if removed.watched else ": the daemon does not run"
            said.append(f"{unit} keeps its stack until it is restarted{why}. To have the host's own /etc:")
        said.append(Command(f"  systemctl restart {unit}"))
    else:
        said.append(f"{unit} {'has' if removed.runs else 'does not run, and starts on'} the host's own /etc")
    return said
