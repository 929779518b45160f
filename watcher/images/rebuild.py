# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record that cannot be read is made anew, of the slots, the history and the older stacks. Pure.

The slots say which content a start of the service gets, and the name of their directory says in which order. What an
operator decided (a pin) is nowhere else. What proved bad is in the history.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from watcher.images import tries
from watcher.model import Entry, Event, Kind, Layer, Outcome, Stack, Verdict, stack_id
from watcher.records.schema import to_dict, utf8
from watcher.records.state import STACK, Accepted, Damaged, Quarantine, State, Trial

LOST = "a pin, what its check has passed, and what it was still to be told are lost; what had tries left is tried again"

# 7! orders are tried.
_PERMUTED_MAX = 7


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of a unit whose record cannot be read.

    Attributes:
        unit: its name.
        error: what is wrong with the record.
        identity: of the accepted stack, as the name of its directory has it.
        links: digest by slot; a start goes by these.
        when: the stack was made, microseconds since the epoch; 0: its directory is gone.
        first: it is the unit's first stack. So an empty one may only hold the record.
        kept: the older stacks, newest first.
    """

    unit: str
    error: Damaged
    identity: str
    links: Mapping[str, str]
    when: int
    first: bool
    kept: tuple[Accepted, ...]


def rebuilt(remains: Remains, history: Sequence[Event], kind: Callable[[str], Kind]) -> tuple[State, str]:
    """The record, and what its layers were taken from, for people.

    Args:
        history: outcomes of the service, newest first.
        kind: of the copy in the store with this digest.
    """
    accepted, source = _accepted(remains, history, kind)
    identity = accepted.stack.id
    on_trial = accepted.when and not _was_judged(identity, history)
    return State(
        accepted=accepted,
        trial=Trial(identity) if on_trial else None,
        quarantine=_quarantine(history),
    ), source


def _accepted(
    remains: Remains, history: Sequence[Event], kind: Callable[[str], Kind]
) -> tuple[Accepted, str]:
    told = [event for event in history if event.stack == remains.identity]
    if not remains.links:
        # An empty stack of which nothing was ever told was not accepted: it only holds the record.
        nothing = not remains.when or (remains.first and not told)
        return Accepted(when=0 if nothing else remains.when), "its slots"
    for event in told:
        if stack_id(layer.digest for layer in event.layers) == remains.identity:
            layers = _in_slots([_exact(layer, remains.kept) for layer in event.layers], remains.links)
            if layers is not None:
                return Accepted(Stack(layers), _entries(layers, remains.kept), event.when), "the history"
    for kept in remains.kept:
        layers = _in_slots(kept.stack.layers, remains.links)
        if kept.stack.id == remains.identity and layers is not None:
            entries = _entries(layers, remains.kept)
            return replace(kept, stack=Stack(layers), entries=entries), "an older stack"
    layers = tuple(_layer(slot, remains.links[slot], kind) for slot in _ordered(remains))
    return Accepted(Stack(layers), _entries(layers, remains.kept), remains.when), "its slots"


def _exact(layer: Layer, kept: Sequence[Accepted]) -> Layer:
    """A layer of the history, which has escapes in the place of bytes that are not UTF-8, as older stacks have it."""
    same = (one for accepted in kept for one in accepted.stack.layers if to_dict(one) == to_dict(layer))
    return next(same, layer)


def _in_slots(layers: Sequence[Layer], links: Mapping[str, str]) -> tuple[Layer, ...] | None:
    """Layers in the slots that the links have for their contents; None if the contents are not the same."""
    free = dict(links)
    found = []
    for layer in layers:
        slots = [slot for slot, digest in sorted(free.items()) if digest == layer.digest]
        if not slots:
            return None
        slot = next((slot for slot in slots if utf8(slot) == utf8(layer.slot)), slots[0])
        del free[slot]
        found.append(replace(layer, slot=slot))
    return None if free else tuple(found)


def _entries(layers: Sequence[Layer], kept: Sequence[Accepted]) -> tuple[Entry, ...]:
    """An entry for each layer: the next start of the unit has to find its slots listed."""
    by_slot = {entry.slot: entry for accepted in reversed(kept) for entry in accepted.entries}
    return tuple(by_slot.get(layer.slot) or entry_of(layer) for layer in layers)


def entry_of(layer: Layer) -> Entry:
    """The entry that a layer may have come from, where none is known any more."""
    directory = os.path.dirname(layer.source)
    return Entry(layer.slot, directory if directory.endswith(".v") else layer.source, layer.kind)


def _ordered(remains: Remains) -> Sequence[str]:
    slots = sorted(remains.links)
    if len(slots) <= _PERMUTED_MAX:
        for order in itertools.permutations(slots):
            if stack_id(remains.links[slot] for slot in order) == remains.identity:
                return order
    return slots


def _layer(slot: str, digest: str, kind: Callable[[str], Kind]) -> Layer:
    return Layer(slot, slot.removesuffix(".raw"), "", digest, kind(digest), "")


def _was_judged(identity: str, history: Sequence[Event]) -> bool:
    """Whether an outcome has judged the stack. One that was only accepted, for the next start, took no time."""
    return any(
        event.stack == identity
        and event.outcome in (Outcome.APPLIED, Outcome.FAILED, Outcome.ROLLED_BACK)
        and bool(event.swap_usec or event.total_usec)
        for event in history
    )


def _quarantine(history: Sequence[Event]) -> tuple[Quarantine, ...]:
    """Contents of which the newest outcome is bad, oldest first."""
    stacks = {event.stack: event.layers for event in reversed(history) if event.layers}
    decided: dict[str, Quarantine | None] = {}
    for event in history:
        for digest, source in _bad(event, stacks).items():
            tries_left = tries.counted(source)
            for_now = tries_left is not None and tries_left.left > 0
            decided.setdefault(digest, Quarantine(digest, event.reason, event.when, source, for_now))
        if event.outcome in (Outcome.APPLIED, Outcome.FAILED, Outcome.ROLLED_BACK):
            for digest in (*(layer.digest for layer in event.layers), STACK + event.stack):
                decided.setdefault(digest, None)
    return tuple(one for one in reversed(decided.values()) if one is not None)


def _bad(event: Event, stacks: Mapping[str, Sequence[Layer]]) -> dict[str, str]:
    """What proved bad in an outcome: the source by digest."""
    check_failed = event.verdict is Verdict.CHECK_FAILED or (
        event.outcome is Outcome.REFUSED and bool(event.layers)
    )
    bad: Sequence[Layer]
    good: Sequence[Layer]
    if event.outcome is Outcome.ROLLED_BACK:
        identity, bad, good = event.previous, stacks.get(event.previous, ()), event.layers
    elif check_failed:
        identity, bad, good = event.stack, event.layers, stacks.get(event.previous, ())
        if event.previous and event.previous not in stacks:
            bad = ()  # which of its layers are new is not known, but for the one that the outcome is about
    else:
        return {}
    known = {layer.digest for layer in good}
    found = {layer.digest: layer.source for layer in bad if layer.digest not in known}
    if event.digest and event.digest not in known:
        found[event.digest] = event.source
    return found or {STACK + identity: ""}
