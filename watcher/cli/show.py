# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers as the command line prints them: lines and a table for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from watcher.cli import terminal
from watcher.model import Event, Layer, Outcome, Stack, printable, shown
from watcher.records.schema import PlannedChange, Quarantined, to_dict

REDACTED = "you see outcomes only: to see reasons, paths and outputs join the group confext-watcher"
NO_REPORT = (
    "you get no report, it has reasons, paths and outputs: to see these join the group confext-watcher"
)


def _trusts(service: str, layers: Sequence[Layer]) -> Iterator[str]:
    """What was proved of the layers, topmost first."""
    for layer in reversed(layers):
        for line in proved(to_dict(layer.trust)):
            yield f"{shown(service)}: {layer.label}: {printable(line)}"


def changes(changes: Sequence[PlannedChange]) -> Iterator[str]:
    from watcher.rounds.choose import describe

    if not changes:
        yield "no service takes part"
    for change in changes:
        said = describe(Stack(change.layers), Stack(change.wanted_layers)) if change.changes else "no change"
        yield f"{shown(change.service)}: {said}"
        has = {layer.digest for layer in change.layers}
        yield from _trusts(change.service, [one for one in change.wanted_layers if one.digest not in has])
        for remark in change.remarks:
            yield f"  {shown(remark.path)}: {printable(remark.text)}"
        if change.check is not None:
            passed = (
                "its check passed" if not change.check else f"it would be refused: {printable(change.check)}"
            )
            yield f"  {passed}"
        if change.report is not None:
            yield change.report


def events(events: Sequence[Event], *, verbose: bool = False, chosen: bool = False) -> Iterator[str]:
    """The newest last, which is nearest to the next prompt.

    Args:
        verbose: with what was printed and logged also where all went well; and with exact times on a terminal, too.
        chosen: they are not all.
    """
    if not events:
        yield "nothing of that kind has happened" if chosen else "nothing has happened yet"
    for event in reversed(events):
        stack = shown(event.stack) or "-"
        exact = verbose or not terminal.is_terminal()
        since = when(event.when) if exact else f"{terminal.ago(event.when):<10}"
        yield f"{since}  {event.result:<13}  {stack:<16}  {printable(event.message)}"
        well = event.outcome is Outcome.APPLIED
        for line in event.output.splitlines() if verbose or not well else ():
            yield f"    {shown(line)}"


def forgotten(service: str, contents: Iterable[Quarantined]) -> Iterator[str]:
    yield f"{shown(service)}: free to have what is newest"
    for content in contents:
        what = shown(content.source or content.digest)
        yield f"  {what} is let in again; it was kept out because: {printable(content.reason)}"


def checked(results: Iterable[Mapping[str, object]]) -> Iterator[str]:
    for result in results:
        image = shown(str(result["image"]))
        if result["admitted"]:
            label = shown(f"{result['name']} {result['version']}".rstrip())
            content = f"{result['format']}, {result['size']} bytes, sha256 {result['digest']}"
            yield f"{image}: good: {label}, {content}"
            trust = result["trust"]
            assert isinstance(trust, dict)
            yield from (f"{image}: {line}" for line in proved(trust))
            effects = result["effects"]
            assert isinstance(effects, tuple)
            yield from (f"{image}: warning: {printable(effect)}" for effect in effects)
        else:
            yield f"{image}: would be refused: {printable(str(result['reason']))}"


def proved(trust: Mapping[str, str]) -> Iterator[str]:
    """What is proved of an image or tree."""
    if not trust["how"]:
        yield trust["protection"]
        return
    by = f" by {trust['signer']} (certificate sha256 {trust['fingerprint']})" if trust["signer"] else ""
    yield f"{trust['protection']}{by}: {trust['how']}, root hash {trust['rootHash']}"
    if trust["remark"]:
        yield f"warning: {trust['remark']}"


class Command(str):
    """A line that is a command to be copied: folded, its first part would be run alone."""

    __slots__ = ()


def fit(lines: Iterable[str]) -> Iterator[str]:
    """Each line folded to the width of the terminal, between words; elsewhere a line stays one line."""
    for line in lines:
        # What has several lines is laid out already, or a report.
        if (
            isinstance(line, Command)
            or "\n" in line
            or not terminal.is_terminal()
            or len(line) <= terminal.columns()
        ):
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        yield from terminal.folded(line.lstrip(), terminal.columns(), indent, f"{indent}    ")


def when(usec: int | None) -> str:
    """Microseconds since the epoch as local time."""
    try:
        return datetime.fromtimestamp(usec / 1_000_000).strftime("%Y-%m-%d %H:%M:%S") if usec else "-"
    except (ValueError, OverflowError, OSError):
        return str(usec)  # beyond what the calendar has


def as_json(value: object, *, compact: bool = False) -> str:
    """One JSON object.

    Args:
        compact: on one line, which takes a tenth of the time: for thousands of files.
    """
    text = json.dumps(to_dict(value), ensure_ascii=False, indent=None if compact else 2)
    # JSON leaves alone what a terminal may obey, such as U+009B, and owners choose the names of files.
    return re.sub(r"[^\n -~]", lambda found: _escaped(found[0]), text)


def _escaped(char: str) -> str:
    return char if char.isprintable() else json.dumps(char)[1:-1]
