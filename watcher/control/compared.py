# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which two stacks `confext-watcher diff` compares: what `--from` and `--to` name, or what would change now."""

from __future__ import annotations

from dataclasses import dataclass

from watcher.control.client import Client, NotRunning
from watcher.control.subject import Subject
from watcher.model import Copy, Stack, shown
from watcher.records.ledger import Reader
from watcher.records.schema import Failed, ServiceNotFound
from watcher.settings.config import Settings

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
