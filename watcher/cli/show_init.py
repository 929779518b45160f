# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `init` is going to do, and what it has done, as people see it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from watcher.cli.show import Command
from watcher.model import printable, shown
from watcher.records.schema import Waited
from watcher.settings.unit_names import is_template
from watcher.setup import first_version
from watcher.setup.enable import Enabled
from watcher.setup.init import Plan


def planned(plan: Plan) -> Sequence[str]:
    """What is to be done, for people, before it is."""
    said = [_head(plan)]
    if plan.makes:
        whose = f" for {shown(plan.user)}" if plan.user else ""
        said.append(f"  make   {shown(plan.directory)}/{whose}")
    if plan.image:
        taken = plan.taken
        count = "1 file" if len(taken.files) == 1 else f"{len(taken.files)} files"
        what = f"{count} of {' '.join(map(shown, plan.sources))}, {_bytes(taken.size)}"
        said.append(f"  make   {shown(plan.image)}: {what}")
    if plan.content:
        said.append(f"  {'renew ' if plan.there else 'write '} {shown(plan.drop_in)}:")
        said += [f"           {line}" for line in plan.content.splitlines() if not line.startswith("#")]
        said.append("  run    systemctl daemon-reload")
    said += _remarks(plan)
    return said


def _head(plan: Plan) -> str:
    unit = shown(plan.unit.name)
    by = (
        f"by the recipe {shown(plan.recipe.path)}"
        if plan.recipe
        else "without a recipe: nobody has written one for it"
    )
    return (
        f"{unit} is set up already"
        if plan.nothing
        else f"{unit} is to take part, {by}. Nothing is restarted."
    )


def _remarks(plan: Plan) -> list[str]:
    """What a person has to know of it."""
    said = []
    if plan.versions:
        said.append(
            f"It has versions, and gets no first one: {_some(plan.versions)} in {shown(plan.directory)}/"
        )
    if plan.others:
        said.append(f"Also in {shown(plan.top)}/, and stacked with it as before: {_some(plan.others)}")
    if plan.foreign:
        whose = "was changed by hand" if plan.there and plan.there.entry else "is not by this command"
        compare = f"; compare it with {shown(plan.recipe.path)}" if plan.recipe else ""
        said.append(f"{shown(plan.drop_in)} {whose}, and stays as it is{compare}")
    if plan.image:
        said += _remarks_on_files(plan)
    elif plan.sources:
        said.append(f"No first version, for nothing is there: {_some(plan.sources)}")
    for program in _missing_programs(plan):
        said.append(
            f"{shown(program)} is in a command of the recipe, and not here: install it, or no image gets in"
        )
    if plan.content and not (plan.checked or (plan.recipe and plan.recipe.checks)):
        said.append(
            f"Nothing tries a new configuration before the service has it: add Check= to {plan.drop_in}"
        )
    if plan.recipe and plan.content:
        said += [f"Note: {shown(note)}" for note in plan.recipe.notes]
    return said


def _remarks_on_files(plan: Plan) -> list[str]:
    taken, said = plan.taken, []
    if taken.missing:
        said.append(f"Not there, and so not in it: {_some(taken.missing)}")
    if taken.excluded:
        said.append(
            f"Stays the host's alone, by the recipe or as what an editor left: {_some(taken.excluded)}"
        )
    if taken.unusable:
        said.append(f"Left out: {_some([f'{path} ({what})' for path, what in taken.unusable])}")
    if taken.private:
        secret = _some([f"{path} ({mode:04o})" for path, mode in taken.private])
        said.append(
            f"Not everybody may read {secret}: so only root may read the image. Keep it as safe as these"
        )
    if taken.listed:
        said.append(
            f"The image is an erofs, which can hold the access control lists of {_some(taken.listed)}"
        )
    packages = first_version.of_packages(taken.files)
    also = f", also for what upgrades of {_some(sorted(packages))} change" if packages else ""
    said.append(
        f"Changes to these files on the host no longer count for the service then: only new images do{also}."
        " A file that comes new beside them on the host does count"
    )
    return said


def _missing_programs(plan: Plan) -> list[str]:
    """Programs of the recipe's commands that are not on this host."""
    if plan.recipe is None or not plan.content:
        return []
    commands = [one.value for one in plan.recipe.settings if one.key in ("Check", "HealthCheck")]
    programs = dict.fromkeys(command.split()[0].lstrip("-@+!:") for command in commands)
    return [program for program in programs if program.startswith("/") and not os.path.exists(program)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 6 else ""
    return ", ".join(map(shown, names[: 5 if more else 6])) + more


def _bytes(size: int) -> str:
    return f"{size} bytes" if size < 10_000 else f"{size / 1024:.0f} KiB"


def is_good(waited: Waited | None) -> bool | None:
    """Whether the service gets the first version with its next start; None: that is not known yet."""
    if waited is None or waited.answer.kind == "needs-start":
        return None
    return waited.answer.status == 0 or waited.answer.kind == "needs-restart"


def told(plan: Plan, found: Enabled, waited: Waited | None) -> Iterator[str]:
    """What was done, and what comes next."""
    unit = shown(found.service)
    if is_good(waited) is False and waited is not None:
        yield printable(waited.answer.text or waited.event.message)
        yield f"{unit} keeps the host's own /etc. Mend that, and drop a version of it; or undo:"
        yield Command(f"  confext-watcher remove {unit}")
        return
    yield f"{unit} takes part."
    if not found.watched:
        yield "Nobody watches yet:"
        yield Command("  systemctl enable --now confext-watcher")
    elif plan.image and waited is None:
        yield "The daemon has not said yet what becomes of its first version. Ask again, and before a restart:"
        yield Command(f"  confext-watcher wait {unit} {shown(os.path.basename(plan.image))}")
    if found.needs_restart:
        yield "It needs one restart, when it suits, to have an /etc of its own:"
        yield Command(f"  systemctl restart {unit}")
    if is_template(found.service):
        every = shown(found.service.replace("@.", "@*."))
        yield "Instances that run need one restart, when it suits, to have an /etc of their own:"
        yield Command(f"  systemctl restart '{every}'")
    image = f"{plan.name}_1.raw"
    source = (plan.sources or (plan.recipe.sources if plan.recipe else ()) or (f"/etc/{plan.name}",))[0]
    yield f"The next version, of a changed copy of {shown(source)}:"
    yield Command(f"  confext-watcher build {shown(source[1:])}=COPY -o {shown(image)}")
    yield Command(f"  cp {shown(image)} {shown(plan.directory)}/")
    yield Command(f"  confext-watcher wait --timeout 60 {unit} {shown(image)}")
    yield "Undo:"
    yield Command(f"  confext-watcher remove {unit}")
