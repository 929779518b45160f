# SPDX-License-Identifier: LGPL-2.1-or-later
"""The outcomes of a round, in words that an operator understands at three in the morning. Pure."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from watcher.managers.base import Reloaded
from watcher.model import Event, Incomplete, Layer, Look, Outcome, Stack, shown
from watcher.mounts.converge import Converged
from watcher.records.state import Undoing
from watcher.rounds.choose import Passed, describe
from watcher.rounds.decide import Reject
from watcher.rounds.facts import Facts, Judged, both

REBASED = "the host's /etc has changed, same stack"
HEALED = "its copy in the store was damaged and is whole again, same stack"


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds: of the swap, of the reload, from noticing the change to the end."""

    swap: int = 0
    reload: int = 0
    total: int = 0


def applied(
    service: str,
    before: Stack,
    stack: Stack,
    judged: Judged,
    times: Times,
    *,
    swapped: bool,
    why_anew: str = "",
) -> Event:
    """A stack is in place, and the service was told.

    Args:
        swapped: it was put there now. Else it was there already: the watcher was killed before it told the service.
        why_anew: the service had this stack. Why it was made anew: `REBASED`, `HEALED`.
    """
    what = describe(before, stack)
    if swapped and why_anew:
        sentence = f"{why_anew} applied anew in {duration(times.swap)}"
    elif why_anew:
        sentence = why_anew
    elif swapped:
        comma = "" if " -> " in what and "," not in what else ","
        sentence = f"{what}{comma} applied in {duration(times.swap)}"
    else:
        sentence = "its stack was in place already" if before.id == stack.id else f"{what}, in place already"
    if judged.told:
        sentence += f", {_done(judged.told)} in {duration(times.reload)}"
    else:
        sentence += f"; {judged.reason or 'it was not told to reload, it has no way to'}"
    return _of_stack(service, Outcome.APPLIED, sentence, before, stack, judged, times)


def went_back(event: Event, before: Stack, stack: Stack) -> Event:
    """An outcome with why: the stack before has a damaged copy. (It is among what the one that came does not have.)"""
    lost = ", ".join(layer.label for layer in _new_layers(stack, before))
    why = f"the copy of {lost} in the store is damaged"
    reason = f"{event.reason}; {why}" if event.reason else why
    return replace(event, message=f"{event.message}; {why}", reason=reason)


def failed(
    service: str,
    before: Stack,
    stack: Stack,
    judged: Judged,
    times: Times,
    *,
    why_anew: str = "",
) -> Event:
    """A stack was put in place, the service did not take it well, and it stays: `Rollback=no`, or the stack was good.

    Args:
        why_anew: see `applied()`.
    """
    what = f"{why_anew} applied anew" if why_anew else f"{describe(before, stack)} is in place"
    sentence = f"{what}, but {judged.reason}; it is not rolled back"
    return _of_stack(service, Outcome.FAILED, sentence, before, stack, judged, times)


def rolled_back(
    service: str,
    undoing: Undoing,
    good: Stack,
    judged: Judged,
    times: Times,
    *,
    running: bool,
    restart: bool,
    innocent: bool = False,
) -> Event:
    """The last good stack is back.

    Args:
        judged: how the service took that.
        restart: it runs where no stack can be put in place.
        innocent: the bad one is not to blame where that fails, too.
    """
    bad, why = undoing.stack, undoing.why
    was = ", ".join(new.label for new in _new_layers(good, bad)) or "the stack without it"
    back = labels(good)
    sentence = f"{was} taken out again: {why}; "
    if restart:
        sentence += f"restart it once to have {back}"
    elif not running and judged.good:
        sentence += f"it is not running, its next start gets {back}"
    elif judged.good:
        sentence += f"back on {back} in {duration(times.swap + times.reload)}"
        sentence += f", {judged.told} done" if judged.told == "start" else ""
    else:
        tried = f"so {was} is not to blame, and is tried again at the next start"
        then = tried if innocent else "it is not tried again"
        sentence += f"back on {back}, but that failed too: {judged.reason}; {then}"
    event = _of_stack(service, Outcome.ROLLED_BACK, sentence, bad, good, judged, times)
    # A `wait` for the image that was dropped waits for this.
    return replace(
        event,
        reason=why,
        output=both(undoing.output, judged.said).rstrip("\n"),
        verdict=undoing.verdict,
        **_about(good, bad),
    )


def accepted(service: str, before: Stack, facts: Facts) -> Event:
    """Its slots were set, and nothing else: it does not run, or not yet, or not with a main process."""
    when = gets_it(service, facts)
    if facts.running and facts.out_of_reach:
        when = "it has had no other since its start"
    elif facts.running:
        when = "it was started on it"
    elif facts.starting:
        when = "it is being started, and gets it"
    sentence = f"{describe(before, facts.accepted)}, accepted; {when}"
    return _of_stack(service, Outcome.APPLIED, sentence, before, facts.accepted, None, Times())


def gets_it(service: str, facts: Facts) -> str:
    """When a service that does not run gets its accepted stack."""
    if facts.template:
        return "a template, its next instance gets it"
    if facts.headless:
        return "systemd knows no main process of it, its next start gets it: restart it"
    return "it is not running, its next start gets it"


def unchanged(service: str, stack: Stack) -> Event:
    """What was dropped has the content that is in place already."""
    sentence = f"{labels(stack)} has the content that it had before: unchanged"
    return _of_stack(service, Outcome.UNCHANGED, sentence, stack, stack, None, Times())


def refused(service: str, passed: Passed, kept: Layer | None, stack: Stack) -> Event:
    """An image was passed over."""
    candidate, reason = passed.candidate, str(passed.reason)
    incomplete = isinstance(passed.reason, Incomplete)
    word = "incomplete" if incomplete else "refused"
    keeps = f"it keeps {kept.label}" if kept else "it goes without"
    return event(
        service,
        Outcome.INCOMPLETE if incomplete else Outcome.REFUSED,
        f"{shown(candidate.path)} {word}: {reason.removeprefix('incomplete: ')}; {keeps}",
        stack=stack.id,
        image=candidate.name,
        version=candidate.version,
        source=candidate.path,
        reason=reason,
    )


def check_failed(service: str, before: Stack, rejected: Reject) -> Event:
    """The service's own check refused the new `/etc`. The service never saw it."""
    stack, why = rejected.stack, rejected.why
    sentence = f"{describe(before, stack)}, refused: {why}; the service was not touched"
    judged = Judged(stack, rejected.verdict, reason=why, output=rejected.output)
    return _of_stack(service, Outcome.REFUSED, sentence, before, stack, judged, Times())


def needs_restart(service: str, reason: str) -> Event:
    """Its main process has no mount namespace that could be entered."""
    sentence = f"not touched, its main process {reason}: restart it once to have its stack"
    return event(service, Outcome.NEEDS_RESTART, sentence, reason=reason)


def nothing_whole(service: str, stack: Stack, lost: Collection[str]) -> Event:
    """It runs on damaged copies, and no other stack has a layer: it keeps what it shows.

    Args:
        lost: digests of these copies.
    """
    damaged = [layer for layer in stack.layers if layer.digest in lost]
    labels = ", ".join(layer.label for layer in damaged)
    why = f"the copy of {labels} in the store is damaged, and no whole file is there to take it from again"
    sentence = f"{why}, nor is another stack; it keeps what it has, its next start may not: drop it again"
    top = damaged[-1]
    about = {"image": top.name, "version": top.version, "digest": top.digest, "source": top.source}
    failed = event(service, Outcome.FAILED, sentence, stack=stack.id, reason=why, **about)
    return replace(failed, layers=stack.layers)


def rollback_requested(service: str, before: Stack, stack: Stack, by: str) -> Event:
    """An operator has asked for another stack."""
    where = f"{labels(stack)} ({stack.id or 'no stack'})"
    sentence = f"back from {labels(before)} to {where}, asked for by {shown(by)}"
    return replace(
        event(service, Outcome.REQUESTED, sentence, stack=stack.id, previous=before.id), layers=stack.layers
    )


def forget_requested(service: str, by: str) -> Event:
    """An operator has asked for what is newest."""
    return event(service, Outcome.REQUESTED, f"may have what is newest again, asked for by {shown(by)}")


def not_placed(service: str, reason: str, *, again: bool) -> Event:
    """The stack could not be put in place."""
    sentence = f"its stack could not be put in place{', it is tried again' if again else ''}: {reason}"
    return event(service, Outcome.FAILED, sentence, reason=reason)


# --- steps of a round, for LogLevel=debug ---


def accepting(stack: Stack, *, on_trial: bool) -> str:
    """A stack is the accepted one from now on."""
    return f"accepted {labels(stack)}{', on trial' if on_trial else ''}"


def looked(facts: Facts, look: Look) -> str:
    """What a look found."""
    candidates = sum(len(pick.candidates) for pick in look.picks)
    how = "as accepted"
    if facts.proved_bad:
        how = "rolling back"
    elif facts.pinned is not None:
        how = "put on it by hand"
    elif facts.damaged:
        how = "a copy is damaged"
    elif facts.offered:
        how = "new"
    elif facts.on_trial:
        how = "on trial"
    count = f"{candidates} candidate{'' if candidates == 1 else 's'}"
    return f"looked: {count}, desired {labels(facts.target)} ({how})"


def judged(found: Judged) -> str:
    """A verdict."""
    return "judged good" if found.good else f"judged bad: {found.reason}"


def converged(found: Converged) -> str:
    """What a swap did."""
    if not found.swaps:
        return "shows its stack already"
    where = "" if found.swaps == 1 else f" in {found.swaps} mount namespaces"
    return f"swapped{where} in {duration(found.usec)}"


def told(reloaded: Reloaded) -> str:
    """What asking for a reload came to."""
    if not reloaded.ok:
        return "reload failed"
    return (
        f"reload: {_done(reloaded.told) if reloaded.told else reloaded.reason or 'it has no way to be told'}"
    )


# --- parts ---


def labels(stack: Stack) -> str:
    """What a person calls a stack, topmost first: "web 1.4, base 2"."""
    return ", ".join(layer.label for layer in reversed(stack.layers)) or "its own /etc"


def files(stack: Stack) -> str:
    """The names of the files of a stack, topmost first."""
    return ", ".join(shown(os.path.basename(layer.source)) for layer in reversed(stack.layers))


def _done(told: str) -> str:
    return f"{told} {'sent' if told.startswith('SIG') else 'done'}"


def event(service: str, outcome: Outcome, sentence: str, **fields: str) -> Event:
    """An event of this moment; the sentence gets the service's name in front."""
    message = f"{shown(service)}: {sentence}"
    return Event(service, outcome, message, when=now(), **fields)  # type: ignore[arg-type]


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def duration(usec: int) -> str:
    """Microseconds for people: "870 us", "2 ms", "31 s"."""
    if usec < 1000:
        return f"{usec} us"
    return f"{usec / 1000:.0f} ms" if usec < 10_000_000 else f"{usec / 1_000_000:.0f} s"


def _of_stack(
    service: str,
    outcome: Outcome,
    sentence: str,
    before: Stack,
    stack: Stack,
    judged: Judged | None,
    times: Times,
) -> Event:
    return Event(
        service,
        outcome,
        f"{shown(service)}: {sentence}",
        when=now(),
        stack=stack.id,
        previous=before.id,
        reason=judged.reason if judged is not None else "",
        output=judged.said if judged is not None else "",
        verdict=judged.verdict if judged is not None else None,
        swap_usec=times.swap,
        total_usec=times.total,
        layers=stack.layers,
        **_about(before, stack),
    )


def _about(before: Stack, stack: Stack) -> dict[str, Any]:
    """The image that an outcome is about: the topmost that a stack has and the one before had not."""
    changed = _new_layers(before, stack) or list(stack.layers)
    if not changed:
        return {}
    top = changed[-1]
    return {"image": top.name, "version": top.version, "digest": top.digest, "source": top.source}


def _new_layers(before: Stack, after: Stack) -> list[Layer]:
    known = set(before.digests)
    return [layer for layer in after.layers if layer.digest not in known]
