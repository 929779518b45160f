# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher build`: an image from a directory, or from files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from watcher.cli import check, ending, show
from watcher.cli.answers import answer, fail
from watcher.images.build import SCOPES, Built, Order, build
from watcher.model import Busy, Refused, printable, shown
from watcher.records.schema import ExitStatus
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    scope = tuple(options.scope.replace(",", " ").split())
    if wrong := _misused(options, scope):
        return fail(wrong, ExitStatus.USAGE)
    # What was begun is removed, also when a pipeline is cancelled or a connection ends: it may have keys in it.
    ending.end_as_interrupted()
    order = Order(
        tuple(options.sources),
        options.output,
        options.name,
        options.version,
        scope,
        getattr(options, "for"),
        options.format or ("ddi" if options.sign else "squashfs"),
        options.sign,
        options.certificate,
    )
    try:
        made = build(order, settings.image_max)
    except (Refused, Busy) as error:
        return fail(str(error), ExitStatus.FAILED)
    result = _result(made)
    answer(options, {"images": [result]}, _lines(made, result))
    return ExitStatus.DONE


def _misused(options: argparse.Namespace, scope: tuple[str, ...]) -> str:
    """What is wrong with the options, "" if nothing is."""
    if bool(options.sign) is not bool(options.certificate):
        return "--sign and --certificate go together"
    if options.sign and options.format not in ("", "ddi"):
        return f"--sign: only a disk image has a signature in it, and not --format {options.format}"
    for word in scope:
        if word not in SCOPES:
            return f"--scope {shown(word)}: must be of {', '.join(SCOPES)}"
    return ""


def _result(made: Built) -> dict[str, object]:
    """As `check` has it, with what there is to note."""
    found: dict[str, object] = {"image": made.path, "admitted": False, "reason": made.unchecked}
    if made.examined is not None:
        found |= {"admitted": True} | check.described(made.examined)
    return found | {"notes": made.notes}


def _lines(made: Built, result: dict[str, object]) -> Iterator[str]:
    path = shown(made.path)
    if made.examined is None:
        yield f"{path}: made, and not checked: {printable(made.unchecked)}"
    else:
        yield from show.checked([result])
    yield from (f"{path}: note: {printable(note)}" for note in made.notes)
