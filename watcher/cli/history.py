# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher history`: what was done, when and why."""

from __future__ import annotations

import argparse
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from watcher.cli import show
from watcher.cli.answers import answer, fail, read
from watcher.model import Event, Outcome, shown
from watcher.records.schema import ALL_OUTCOMES, ExitStatus, ServiceNotFound, Which, to_dict
from watcher.settings.config import Settings
from watcher.settings.values import INFINITY, time_span
from watcher.text import nearest

if TYPE_CHECKING:
    from watcher.records.ledger import Reader


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    def without_daemon() -> list[Event]:
        from watcher.records.ledger import Reader

        reader = Reader(settings.state_directory)
        service = None if options.service is None else _known(settings, reader, options.service)
        return reader.history(service, options.lines, which)

    if options.lines < 1:
        return fail("--lines: at least 1", ExitStatus.USAGE)
    try:
        which = Which(_outcomes(options.outcome), _since(options.since), options.image)
    except ValueError as error:
        return fail(str(error), ExitStatus.USAGE)
    events, redacted = read(
        settings, lambda client: client.history(options.service, options.lines, which), without_daemon
    )
    results = {"events": [_with_time(event) for event in events], "redacted": redacted}
    chosen = which != ALL_OUTCOMES
    answer(options, results, show.events(events, verbose=options.verbose, chosen=chosen))
    return ExitStatus.DONE


def _known(settings: Settings, reader: Reader, asked: str) -> str:
    """The service that is meant, which is there or was once. Raises ServiceNotFound, LedgerError."""
    from watcher.control import status

    names = [*reader.newest()]
    with contextlib.suppress(PermissionError):  # the ledger is all that this user may read
        names += (one.service for one in status.without_daemon(settings))
    for name in (asked, f"{asked}.service"):
        if name in names:
            return name
    raise ServiceNotFound.among(asked, names)


def _outcomes(words: list[str]) -> tuple[str, ...]:
    """Values of `Outcome`, each of which is given by itself or in a list with commas. Raises ValueError."""
    known = [outcome.value for outcome in Outcome]
    outcomes = tuple(word for words in words for word in words.split(",") if word)
    for word in outcomes:
        if word not in known:
            meant = nearest(word, known) or ", ".join(known)
            raise ValueError(f"--outcome: {shown(word)} is none; did you mean {meant}?")
    return outcomes


def _since(text: str) -> int:
    """A time in microseconds since the epoch; 0 for "". Raises ValueError: none of the ways to write one."""
    if not text:
        return 0
    today = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    days = {"today": today, "yesterday": today - timedelta(days=1)}
    try:
        # Of a time of day without a zone, that of this host.
        moment = days.get(text) or datetime.fromisoformat(text)
        return max(round(moment.timestamp() * 1_000_000), 0)
    except (ValueError, OverflowError):
        pass
    try:
        usec = time_span(text.removesuffix("ago").strip())
    except ValueError:
        wanted = 'a time span such as 2h, a date such as 2026-11-30 or "2026-11-30 12:00", today or yesterday'
        raise ValueError(f"--since: not {wanted}: {shown(text)}") from None
    return 0 if usec == INFINITY else max(round(time.time() * 1_000_000) - usec, 0)


def _with_time(event: Event) -> dict[str, object]:
    """As JSON, with the time also as people and logs write it (RFC 3339)."""
    try:
        moment = datetime.fromtimestamp(event.when / 1_000_000, UTC).isoformat(timespec="microseconds")
    except (ValueError, OverflowError, OSError):
        moment = ""  # beyond what the calendar has
    values: dict[str, object] = to_dict(event)
    return {**values, "time": moment.replace("+00:00", "Z")}
