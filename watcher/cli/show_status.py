# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher status`, as the command line prints it for people.

One line for each service, and below what is wrong and what to do about it; or one service in depth.

A command that a person may copy has a line of its own, and is never folded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from watcher.cli import terminal
from watcher.cli.show import proved, when
from watcher.cli.terminal import ago, styled
from watcher.model import Event, Layer, Outcome, Protection, printable, shown
from watcher.records.schema import CandidateStatus, Drift, EntryStatus, ServiceStatus, to_dict

_GOOD = frozenset({"applied", "unchanged"})
_BAD = frozenset({"refused", "failed", "rolled-back", "needs-restart", "incomplete"})
_STEPS = {
    "check": "its check runs",
    "reload": "it is told to reload, and watched",
    "watch": "it is watched",
    "start": "it is started",
}
_HEAD = ("SERVICE", "RUNS ON", "STACK", "SINCE", "OUTCOME")
_SHORT = 8
"""Digits of a stack's identity where there is no room for all: `rollback --to` and `diff` take these, too."""
_DRIFTED_MAX = 3
_USED = {
    "applied": "used",
    "unchanged": "used",
    "accepted": "next start",
    "failed": "used",
    "needs-restart": "next start",
    "on-trial": "on trial",
}


# --- at a glance ---


def glance(services: Sequence[ServiceStatus]) -> Iterator[str]:
    """A line for each service, and below what is wrong with which."""
    if not services:
        yield "no service takes part"
        return
    yield from table(services)
    wrong = [line for service in services for line in _wrong(service)]
    if wrong:
        yield ""
        yield from wrong


def table(services: Sequence[ServiceStatus]) -> Iterator[str]:
    """The widest form that fits the terminal; a line that does not fit is folded by no form but the narrowest."""
    width = terminal.columns()
    for form in range(5):
        rows = [_HEAD, *(_row(service, form) for service in services)]
        rows = [_narrowed(row, form) for row in rows]
        sizes = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
        if sum(sizes) + 2 * (len(sizes) - 1) <= width:
            break
    for number, row in enumerate(rows):
        padded = [cell + " " * (size - _cells(cell)) for cell, size in zip(row, sizes, strict=True)]
        if number == 0:
            yield styled("  ".join(padded).rstrip(), "bold")
        else:
            last = row[-1]
            style = "green" if last in _GOOD else "red" if last in _BAD else "bold"
            yield "  ".join([*padded[:-1], styled(last, style)]).rstrip()


def _row(service: ServiceStatus, form: int) -> tuple[str, ...]:
    """The cells of a service. Forms: 0 all, 1 a short stack, 2 names without `.service`, 3 and 4 fewer columns."""
    name = shown(service.service)
    labels = [layer.label for layer in reversed(service.layers)]
    if form >= 2 and len(labels) > 1:
        labels = [f"{labels[0]} +{len(labels) - 1}"]
    since = ago(service.since).rjust(11) if terminal.is_terminal() else when(service.since)
    return (
        name.removesuffix(".service") if form >= 2 else name,
        ", ".join(labels) or ("its own /etc" if service.pid else service.state),
        (shown(service.stack) or "-")[: _SHORT if form else None],
        since if service.since or not terminal.is_terminal() else "-",
        outcome(service),
    )


def _narrowed(row: tuple[str, ...], form: int) -> tuple[str, ...]:
    if form < 3:
        return row
    return (*row[:2], row[4]) if form == 4 else (*row[:2], row[3], row[4])


def outcome(service: ServiceStatus) -> str:
    """One word for how it is with a service."""
    if service.on_trial:
        return "on trial"
    if service.state == "needs-restart":
        return service.state
    if service.pinned is not None:
        return "pinned"
    return service.last.outcome.value if service.last is not None else "-"


def _cells(text: str) -> int:
    """Columns that a text takes in a terminal, where some signs take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


# --- what is wrong, and what to do about it ---


def _wrong(service: ServiceStatus) -> Iterator[str]:
    """Each thing as a line that begins with the service, and below it the command that helps."""
    name = f"{shown(service.service)}:"
    for text, command in problems(service):
        first, *more = terminal.folded(f"{name} {text}", terminal.columns() - 2)
        yield styled(name, "bold") + first.removeprefix(name)
        yield from (f"  {line}" for line in more)
        if command:
            yield f"    {styled(printable(command), 'bold')}"


def problems(
    service: ServiceStatus, *, elapsed: bool = True, files: bool = True
) -> Iterator[tuple[str, str]]:
    """What is out of the ordinary, and the command that helps, "" where none does.

    Args:
        elapsed: say for how long a step lasts, which is another answer each second.
        files: also what of the files that lie there.
    """
    name = shown(service.service)
    forget = f"confext-watcher rollback --forget {name}"
    follow = f"confext-watcher status --follow {name}"
    if service.state == "needs-restart":
        text = "not in a mount namespace that was made for it; restart it once to have its stack"
        yield text, f"systemctl restart {name}" if service.manager == "systemd" else ""
    if service.step:
        what = _STEPS.get(service.step, printable(service.step))
        trial = "on trial: " if service.on_trial else ""
        lasting = f", for {terminal.lasting(service.step_since)} now" if elapsed else ""
        yield f"{trial}{what}{lasting}", follow
    elif service.on_trial:
        yield "on trial: it is not known yet how it takes its stack", follow
    if service.pinned is not None:
        stays = "put on this stack by hand, and stays on it whatever is dropped"
        yield f"{stays}; to have what is newest:", forget
    for candidate in service.newer if files else ():
        yield _about(candidate), candidate.command
    there = {candidate.digest for entry in service.entries for candidate in entry.candidates}
    there |= {one.digest for one in service.newer}
    for content in service.quarantined:
        if content.digest not in there:
            what = shown(os.path.basename(content.source)) or content.digest[:12]
            reason = f": {printable(content.reason)}" if content.reason else ""
            yield f"{what} is kept out{reason}; to let it in:", forget
    last = service.last
    untold = {Outcome.FAILED, Outcome.REFUSED, Outcome.INCOMPLETE}
    told = bool(service.newer or service.quarantined or service.entries)
    if last is not None and last.outcome in ({Outcome.FAILED} if told else untold):
        yield _sentence(last), f"confext-watcher history {name}"
    if service.drifted:
        yield drifted(service.drifted), f"confext-watcher diff {name} --from none"
    for remark in service.not_allowed:
        yield f"{shown(remark.path)}: {printable(remark.text)}", ""


def drifted(drifts: Sequence[Drift]) -> str:
    """Files of the host that have changed below an image, and what to do about it."""
    files = ", ".join(f"{shown(one.path)} {one.change} ({shown(one.image)})" for one in drifts[:_DRIFTED_MAX])
    more = f" and {len(drifts) - _DRIFTED_MAX} more" if len(drifts) > _DRIFTED_MAX else ""
    return (
        f"the host's own file is another than when the image over it was accepted: {files}{more}; to compare:"
    )


def _about(candidate: CandidateStatus) -> str:
    """What a file that is not used is, why, until when, and what the command beside it does."""
    file = shown(os.path.basename(candidate.path))
    kind = printable(candidate.kind).replace("-", " ")
    if candidate.kind.startswith("kept-out"):
        kind = "is kept out"
    elif candidate.kind in ("refused", "incomplete"):
        kind = f"is {candidate.kind}"
    reason = f": {printable(candidate.reason)}" if candidate.reason else ""
    ends = f"; until {printable(candidate.until)}" if candidate.until else ""
    lets = "; to let it in now:" if candidate.command else ""
    again = "; upload it again" if candidate.kind == "incomplete" else ""
    return f"{file} {kind}{reason}{ends}{lets}{again}"


def _sentence(event: Event) -> str:
    return printable(event.message).removeprefix(f"{shown(event.service)}: ")


# --- one service in depth ---


def in_depth(
    service: ServiceStatus, history: Sequence[Event] = (), *, settings: bool = True
) -> Iterator[str]:
    """All that is known of one service.

    Args:
        history: its last outcomes, newest first.
        settings: with its settings. Strangers are told none.
    """
    yield styled(shown(service.service), "bold")
    yield from _fact("State", _state(service))
    yield from _fact("Outcome", outcome(service))
    for number, layer in enumerate(reversed(service.layers)):
        yield from _fact("Runs on" if number == 0 else "", _layer(layer))
        for line in proved(to_dict(layer.trust)):
            if line != Protection.UNPROTECTED.value:
                yield from _fact("", f"  {printable(line)}")
    if service.stack:
        yield from _fact("Stack", f"{shown(service.stack)} since {when(service.since)}")
    if service.accepted != service.stack:
        yield from _fact("Next start", shown(service.accepted) or "its own /etc")
    for entry in service.entries:
        yield ""
        yield from _entry(entry)
    for remark in service.remarks:
        if remark in service.not_allowed:  # said below
            continue
        yield from terminal.wrapped(f"{shown(remark.path)}: {printable(remark.text)}", 2)
    if settings:
        yield ""
        yield from _settings(service)
    if history:
        yield ""
        yield styled("Last outcomes", "bold")
        for event in history:
            yield from terminal.wrapped(
                f"{event.result}: {_sentence(event)}", 14, f"{ago(event.when).rjust(12)}  "
            )
    wrong = list(problems(service, files=not service.entries))
    if wrong:
        yield ""
        yield styled("To do" if any(command for _, command in wrong) else "To know", "bold")
    for text, command in wrong:
        yield from terminal.wrapped(text, 2)
        if command:
            yield f"    {styled(printable(command), 'bold')}"


def _fact(name: str, text: str) -> Iterator[str]:
    yield from terminal.wrapped(text, 12, f"{f'{name}:' if name else '':>11} ")


def _state(service: ServiceStatus) -> str:
    process = f", PID {service.pid}" if service.pid else ""
    return f"{shown(service.state)}{process} ({shown(service.manager)})"


def _layer(layer: Layer) -> str:
    protection = layer.trust.protection
    return f"{layer.label} ({layer.digest[:12]}, {protection.value})"


def _entry(entry: EntryStatus) -> Iterator[str]:
    declared = " (declared by the unit)" if entry.declared else ""
    yield from terminal.wrapped(f"{shown(entry.path)}{declared}", 0)
    if not entry.candidates:
        yield "  nothing lies there"
    for candidate in entry.candidates:
        yield from _candidate(candidate)


def _candidate(candidate: CandidateStatus) -> Iterator[str]:
    kind = _USED.get(candidate.kind, candidate.kind.replace("-", " "))
    style = "green" if kind == "used" else "red" if candidate.kind in ("refused", "kept-out") else ""
    yield f"  {shown(os.path.basename(candidate.path))}  {styled(printable(kind), style)}{_tries(candidate)}"
    words = [printable(candidate.reason)] if candidate.reason else []
    words += [f"until {printable(candidate.until)}"] if candidate.until else []
    words += ["what helps:"] if candidate.command else []
    if words:
        yield from terminal.wrapped("; ".join(words), 6)
    if candidate.command:
        yield f"      {styled(printable(candidate.command), 'bold')}"


def _tries(candidate: CandidateStatus) -> str:
    if candidate.tries_left is None:
        return ""
    done = f", {candidate.tries_done} done" if candidate.tries_done else ""
    return f", tries left: {candidate.tries_left}{done}"


def _settings(service: ServiceStatus) -> Iterator[str]:
    if not service.settings:
        yield "All its settings are the defaults."
        return
    yield styled("Settings, all others are the defaults", "bold")
    for one in service.settings:
        yield f"  {one.key}={printable(one.value)}  ({shown(one.source)})"
