# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers as the command line prints them: lines and a table for people, JSON for programs."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from watcher.model import Event, Layer, Outcome, Protection, Stack, printable, shown
from watcher.records.schema import PlannedChange, Quarantined, ServiceStatus, to_dict

REDACTED = "you see outcomes only: to see reasons, paths and outputs join the group confext-watcher"
NO_REPORT = (
    "you get no report, it has reasons, paths and outputs: to see these join the group confext-watcher"
)


def services(services: Sequence[ServiceStatus], *, settings: bool = False) -> Iterator[str]:
    """A table, and below it what is out of the ordinary.

    Args:
        settings: also those of each, and where they are written.
    """
    if not services:
        yield "no service takes part"
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SERVICE", "PID", "STACK", "SINCE", "LAST OUTCOME"):
        table.add_column(column, overflow="fold")
    for service in services:
        table.add_row(*map(Text, _row(service)))
    # Only a terminal has a width that lines must fit; elsewhere a line stays one line.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=10_000)
    with console.capture() as printed:
        console.print(table)
    yield printed.get().removesuffix("\n")
    for service in services:
        for note in _notes(service):
            yield f"{shown(service.service)}: {note}"
        if settings:
            yield from _trusts(service.service, service.layers)
            yield from _settings(service)


def _trusts(service: str, layers: Sequence[Layer]) -> Iterator[str]:
    """What was proved of the layers, topmost first."""
    for layer in reversed(layers):
        for line in _proved(to_dict(layer.trust)):
            yield f"{shown(service)}: {layer.label}: {printable(line)}"


def _settings(service: ServiceStatus) -> Iterator[str]:
    if not service.settings:
        yield f"{shown(service.service)}: all its settings are the defaults"
        return
    yield f"{shown(service.service)}: settings, all others are the defaults:"
    for one in service.settings:
        yield f"  {one.key}={printable(one.value)}  ({shown(one.source)})"


def _row(service: ServiceStatus) -> tuple[str, ...]:
    layers = [_layer(layer) for layer in reversed(service.layers)]
    return (
        shown(service.service),
        str(service.pid or "-"),
        "\n".join(layers) or ("its own /etc" if service.pid else service.state),
        when(service.since),
        f"on trial, {when(service.since)}: it was not judged yet"
        if service.on_trial
        else _outcome(service.last),
    )


def _layer(layer: Layer) -> str:
    protection = layer.trust.protection
    proved = "" if protection is Protection.UNPROTECTED else f", {protection.value}"
    return f"{layer.label} ({layer.digest[:12]}{proved})"


def _outcome(last: Event | None) -> str:
    return f"{last.result}, {when(last.when)}: {printable(last.message)}" if last else "-"


def _notes(service: ServiceStatus) -> Iterator[str]:
    if service.state == "needs-restart":
        yield "is not in a mount namespace that was made for it; restart it once to have its stack"
    if service.pinned is not None:
        yield "stays on this stack, by hand, until `confext-watcher rollback --forget`"
    for remark in service.not_allowed:
        yield f"{shown(remark.path)}: {printable(remark.text)}"
    for content in service.quarantined:
        reason = f": {printable(content.reason)}" if content.reason else ""
        yield f"kept out: {shown(content.source or content.digest)}{reason}"


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
        verbose: with what was printed and logged also where all went well.
        chosen: they are not all.
    """
    if not events:
        yield "nothing of that kind has happened" if chosen else "nothing has happened yet"
    for event in reversed(events):
        stack = shown(event.stack) or "-"
        yield f"{when(event.when)}  {event.result:<13}  {stack:<16}  {printable(event.message)}"
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
            yield from (f"{image}: {line}" for line in _proved(trust))
            effects = result["effects"]
            assert isinstance(effects, tuple)
            yield from (f"{image}: warning: {printable(effect)}" for effect in effects)
        else:
            yield f"{image}: would be refused: {printable(str(result['reason']))}"


def _proved(trust: Mapping[str, str]) -> Iterator[str]:
    """What is proved of an image or tree."""
    if not trust["how"]:
        yield trust["protection"]
        return
    by = f" by {trust['signer']} (certificate sha256 {trust['fingerprint']})" if trust["signer"] else ""
    yield f"{trust['protection']}{by}: {trust['how']}, root hash {trust['rootHash']}"
    if trust["remark"]:
        yield f"warning: {trust['remark']}"


def fit(lines: Iterable[str]) -> Iterator[str]:
    """Each line folded to the width of the terminal, between words; elsewhere a line stays one line."""
    if not sys.stdout.isatty():
        yield from lines
        return
    width = shutil.get_terminal_size().columns
    for line in lines:
        # What has several lines is a table, which fits already, or a report.
        if len(line) <= width or "\n" in line:
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line.lstrip(),
            width,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


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
