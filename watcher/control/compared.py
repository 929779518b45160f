# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which two stacks `confext-watcher diff` compares: what `--from` and `--to` name, or what would change now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from watcher.control.client import Client, NotRunning
from watcher.control.subject import Subject
from watcher.images.image_check import examine
from watcher.images.made_for import host
from watcher.model import Busy, Copy, Kind, Layer, Refused, Stack, shown
from watcher.records.ledger import Reader
from watcher.records.schema import Failed, ServiceNotFound
from watcher.resolve.sources import slot_name
from watcher.rounds.choose import distinct
from watcher.settings.config import Settings
from watcher.watch.lease import Lease

_NUMBER_MAX = 3
"""Digits of a number; what has more is the beginning of an identity."""
_LOOKED_BACK = 10_000


@dataclass(frozen=True, slots=True)
class Choice:
    """A stack to be compared; `what` as in `traces.Compared`."""

    what: str
    stack: Stack
    copies: tuple[Copy, ...] = ()


def named(settings: Settings, one: Subject, name: str) -> Choice:
    """The stack that an argument names. Raises Failed: none, or more than one."""
    if name == "none":
        return Choice("none", Stack())
    if name == "shown":
        return Choice("shown" if one.state == "running" else "accepted", one.stack)
    stacks = [accepted.stack for accepted in one.kept]
    if name.isdigit() and len(name) <= _NUMBER_MAX:
        if int(name) < len(stacks):
            return Choice("kept", stacks[int(name)])
        raise Failed(
            f"{shown(one.name)} has no stack {name}: {len(stacks)} kept, counted back from the newest, 0"
        )
    found = {stack.id: stack for stack in stacks if name and stack.id.startswith(name)}
    for event in Reader(settings.state_directory).history(one.name, _LOOKED_BACK):
        stack = Stack(event.layers)
        if name and stack.id.startswith(name):
            found.setdefault(stack.id, stack)
    if len(found) == 1:
        return Choice("kept", next(iter(found.values())))
    many = "more than one stack begins so" if found else "its history lists those it had"
    raise Failed(
        f"{shown(one.name)} has no stack '{shown(name)}': {many}. An image is named by a path with a /,"
        " or by a name that ends in .raw"
    )


def wanted(settings: Settings, one: Subject) -> Choice:
    """What the service should have now: the daemon knows it. Without it nothing new comes but what was accepted."""
    try:
        with Client(settings.runtime_directory, timeout=600) as client:
            (change,) = client.plan(one.name)
            return Choice("desired", Stack(change.wanted_layers))
    except (NotRunning, ServiceNotFound):
        return Choice("accepted", one.kept[0].stack if one.kept else Stack())


@contextlib.contextmanager
def dropped(settings: Settings, one: Subject, images: Sequence[str]) -> Iterator[Choice]:
    """The newest accepted stack with these images or trees in it, for the block.

    The newest accepted one, because that is what a drop would be added to.

    Raises:
        Failed: one would not be admitted, or is being written to.
    """
    stack = one.kept[0].stack if one.kept else Stack()
    declared = {entry.slot for entry in (one.kept[0].entries if one.kept else ()) if entry.declared}
    copies = []
    with contextlib.ExitStack() as held:
        for path in images:
            try:
                if not os.path.isdir(path):
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    held.callback(os.close, fd)
                    # It is mounted by its path, and nobody may write to it meanwhile.
                    held.enter_context(Lease(fd))
                candidate, copy, trust, _ = examine(path, host(), settings.image_max)
            except (Refused, Busy) as error:
                raise Failed(f"{shown(path)}: would be refused: {error}")
            layer = Layer(
                "", candidate.name, candidate.version, copy.digest, candidate.kind, candidate.path, trust
            )
            stack = placed(stack, layer, declared)
            copies.append(copy)
        yield Choice("dropped", stack, tuple(copies))


def placed(stack: Stack, layer: Layer, declared: set[str] | frozenset[str] = frozenset()) -> Stack:
    """A stack with a new layer: in place of the one of its name, else where a drop of this name would come. Pure.

    Images lie beneath trees, declared ones beneath dropped ones, and these by name (`resolve/sources.py`).

    Args:
        declared: slots of entries that the unit declares.
    """

    def order(one: Layer) -> tuple[bool, bool, str]:
        return one.kind is Kind.DIRECTORY, one.slot not in declared, one.slot

    new = replace(layer, slot=slot_name(layer.name, layer.kind))
    layers = list(stack.layers)
    for count, old in enumerate(layers):
        if (old.name, old.kind) == (new.name, new.kind):
            layers[count] = replace(new, slot=old.slot)
            break
    else:
        at = next((count for count, old in enumerate(layers) if order(old) > order(new)), len(layers))
        layers.insert(at, new)
    return Stack(distinct(layers))
