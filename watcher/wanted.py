# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have: what is on disk, what may be used of it, and what it was given before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from watcher import scan
from watcher.admission import Admission, Host
from watcher.model import Candidate, Copy, Declared, Entry, KeptOut, Look, Stack, Sysext
from watcher.plan import Choice, Passed, choose
from watcher.store import Store

STACK = "stack:"
"""A stack as a whole in the quarantine, for a change that brought no new content (a removal): with its identity."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a service should have, and what it was given before.

    Attributes:
        look: what is on disk.
        stack: what it should have.
        passed: what was passed over on the way.
        current: the accepted stack: its slots.
        good: the newest accepted stack with nothing in it that is in quarantine; mostly the current one.
        recorded: the slots already say all this: stack, names and entries.
        why: where the current one is not: the reason that its content is in quarantine.
        pinned: `stack` is what somebody put it on by hand.
        waiting: for a pinned service, the stack that it would have otherwise.
    """

    look: Look
    stack: Stack
    passed: tuple[Passed, ...]
    current: Stack
    good: Stack
    recorded: bool
    why: str = ""
    pinned: bool = False
    waiting: Stack | None = None

    @property
    def busy(self) -> bool:
        return Choice(self.stack, self.passed).busy

    @property
    def sysexts(self) -> tuple[Entry, ...]:
        """What the unit declares and is none of ours: systemd is to have it as it is."""
        slots = {one.slot for one in self.passed if isinstance(one.reason, Sysext)}
        return tuple(
            pick.entry for pick in self.look.picks if pick.entry.declared and pick.entry.slot in slots
        )

    @property
    def rolling_back(self) -> bool:
        """Whether the current stack has to go because it proved bad, rather than because something new is there."""
        return self.current.id != self.good.id


def find(
    store: Store,
    admission: Admission,
    name: str,
    declared: Declared,
    made_for: Host,
    kept_out: Mapping[str, str],
    pin: str | None,
) -> Wanted:
    """What a service should have. Blocks, for as long as copying takes; hold `store.using()`.

    Args:
        kept_out: digests (or `STACK` and an identity) that it must not get, with the reason.
        pin: identity of the stack that it was put on by hand.
    """

    def admit(candidate: Candidate) -> Copy:
        copy = admission.admit(candidate, made_for)
        if copy.digest in kept_out:
            raise KeptOut(f"kept out: {kept_out[copy.digest]}")
        return copy

    record = store.record(name)
    current = record.stack if record is not None else Stack()
    # The others are read only where the current one may not do.
    stacks = (current, *store.stacks(name)) if kept_out or pin is not None else (current,)
    good = next((stack for stack in stacks if not _bad(stack, kept_out)), Stack())
    look = scan.look(declared)
    choice = choose(look, admit, good)
    stack = choice.stack
    if STACK + stack.id in kept_out:
        stack = good
    pinned = next((one for one in stacks if one.id == pin), None) if pin is not None else None
    wanted = stack if pinned is None else pinned
    entries = (pick.entry for pick in look.picks)
    return Wanted(
        look,
        wanted,
        choice.passed,
        current,
        current if pinned is not None else good,
        recorded=wanted == current and (record.entries if record else ()) == tuple(entries),
        why=_bad(current, kept_out),
        pinned=pinned is not None,
        waiting=stack if pinned is not None and stack.id != pinned.id else None,
    )


def _bad(stack: Stack, reasons: Mapping[str, str]) -> str:
    """Why a stack is not to be used, "" if it may be."""
    for key in (STACK + stack.id, *stack.digests):
        if key in reasons:
            return reasons[key]
    return ""
