# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is decided about one service and has to outlive a kill: one record, `.state.json` beside its slots.

The record says what no mount table and no directory can say. It is replaced by one rename(2), with the slots when a
stack is accepted (`images/stacks.py`), so that a reader gets the whole record, or the whole one before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from watcher.model import Entry, Stack, Verdict, printable, shown
from watcher.records import schema

VERSION = 1
"""A change of the record that an older program would misunderstand raises it."""

STACK = "stack:"
"""With an identity behind it: a whole stack in the quarantine, for a change that brought no new content (a removal)."""

INNOCENT = "none: the service failed without it, too"
"""As `Quarantine.judge`: so it is kept out for now alone."""

BEFORE_START = "\nbefore a start"
"""At the end of `Quarantine.judge`: the check ran while the service did not. It is run again once the service does."""

_SAID_MAX = 300


class Damaged(Exception):
    """A record cannot be read: `str()` is one line for the administrator.

    Attributes:
        suffix: of the name under which it is set aside: "damaged", or "newer" for a later version's.
    """

    def __init__(self, text: str, suffix: str = "damaged") -> None:
        super().__init__(text)
        self.suffix = suffix


@dataclass(frozen=True, slots=True)
class Accepted:
    """A stack as it was accepted.

    Attributes:
        stack: its layers, bottom to top.
        entries: all entries the unit had then, also those without a layer.
        when: microseconds since the epoch, 0 if nothing was ever accepted.
        mounted: see `unmounted.noted()`.
    """

    stack: Stack = field(default_factory=Stack)
    entries: tuple[Entry, ...] = ()
    when: int = 0
    mounted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """A stack on trial: accepted, and not judged yet; or judged a moment ago.

    Attributes:
        stack: its identity.
        was_down: the service had failed before the stack was accepted. So the failure does not speak against the stack.
        verdict: None until it is judged. GOOD: if the service goes down within a moment, the stack is to blame.
            Any other: it stays all the same (`Rollback=no`), and with `Rollout=rolling` no other service follows.
        judged: when, microseconds since the epoch.
        restarts: how often its manager had started the service again by then (`Service.went_down_since`).
        other: the start of the service when it was accepted, which was not on it and got no other stack: it may end as
            it will.
    """

    stack: str
    was_down: bool = False
    verdict: Verdict | None = None
    judged: int = 0
    restarts: int = 0
    other: str = ""


@dataclass(frozen=True, slots=True)
class Undoing:
    """A bad stack that is being taken out again, until the outcome of that is recorded.

    Attributes:
        why: one line.
        output: what the command printed that failed.
        took_down: the service ran until it was told of this stack, so it does better without.
    """

    stack: Stack
    verdict: Verdict
    why: str
    output: str = ""
    took_down: bool = False


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Content that the service must not get.

    Attributes:
        digest: of the content, or `STACK` and the identity of a whole stack.
        reason: one line.
        when: microseconds since the epoch.
        source: path of the file that it came from.
        for_now: it has tries left. An operator's next start of the service, or the next of the watcher, lets it in.
        judge: the check that it failed, see `rounds/retry.py`; "" if it was no check; or INNOCENT.
        since: when that began, microseconds since the epoch.
    """

    digest: str
    reason: str
    when: int
    source: str = ""
    for_now: bool = False
    judge: str = ""
    since: int = 0


@dataclass(frozen=True, slots=True)
class Drifted:
    """A file of the host that an image covers, and that is another than when the stack was accepted.

    Attributes:
        path: below `/etc`.
        image: the layer that covers it, for people.
        change: "changed", "came" or "went".
        now: what the host has there, in one word, see `rounds/drift.py`.
    """

    path: str
    image: str
    change: str
    now: str = ""


@dataclass(frozen=True, slots=True)
class Covers:
    """What the host has below the files of the accepted stack.

    Attributes:
        when: `Accepted.when` of that stack.
        files: what it had then, by path below `/etc`, each in one word.
        drifted: what has changed since, and was said.
    """

    when: int
    files: Mapping[str, str] = field(default_factory=dict)
    drifted: tuple[Drifted, ...] = ()


@dataclass(frozen=True, kw_only=True)
class State:
    """The record of one service.

    Attributes:
        accepted: what its next start gets: its slots.
        trial: what is on trial, None if nothing is.
        checked: by which start of the service, and which stack, `Check=` was passed last; that is not accepted yet.
        owed: the start of the service (`Service.invocation`) that has still to be told of the accepted stack.
        replaced: identity of the stack before, until an outcome says what became of the accepted one; None: one has.
        undoing: the bad stack that is being taken out again.
        quarantine: what it must not get, oldest first.
        held_for: the start of the service during which what is kept out `for_now` stays out.
        fell: it went down with what is kept out. So its next start is its manager's or ours, not an operator's.
        pin: identity of the stack that an operator has put it on by hand ("" is the empty one); None: none.
        untried: stacks that a service took well when it was reloaded, and that no start of it has seen since: identity,
            and the last start (`Service.invocation`) that was before, or was reloaded. The newest last.
        left: identities of the stacks that an operator has left by hand: the next rollback goes further back.
        counted: how many tries were made of each counted file of a stack that was not accepted yet, by the first 16
            digits of its digest.
        sysexts: paths that the unit declares, and that are system extensions.
        covers: of the host's files, those that its images cover; None: not looked at yet (an older program's record).
    """

    accepted: Accepted = field(default_factory=Accepted)
    trial: Trial | None = None
    checked: str = ""
    owed: str = ""
    replaced: str | None = None
    undoing: Undoing | None = None
    quarantine: tuple[Quarantine, ...] = ()
    held_for: str = ""
    fell: bool = False
    pin: str | None = None
    untried: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    sysexts: tuple[str, ...] = ()
    covers: Covers | None = None

    @property
    def drifted(self) -> tuple[Drifted, ...]:
        """Files of the host that have changed below the accepted stack."""
        return self.covers.drifted if self.covers and self.covers.when == self.accepted.when else ()

    def why_bad(self, stack: Stack) -> str:
        """Why a stack must not be used, "" if it may be."""
        reasons = self.kept_out
        if not reasons:
            return ""
        return next((reasons[key] for key in (STACK + stack.id, *stack.digests) if key in reasons), "")

    @cached_property
    def kept_out(self) -> dict[str, str]:
        """What the service must not get, with the reasons: by digest, or by `STACK` and the identity of a stack."""
        return {one.digest: one.reason for one in self.quarantine}


def encoded(state: State) -> bytes:
    """The record of a service: JSON, in ASCII (a name that is not UTF-8 has surrogates, which JSON can escape)."""
    return json.dumps({"version": VERSION, **schema.to_dict(state, text=str)}).encode("ascii")


def decoded(content: bytes, path: str) -> State:
    """The state of a record, each value of its type.

    Args:
        path: for the message.

    Raises:
        Damaged: this is no such record, or one of a later version.
    """
    try:
        record = json.loads(content.decode("ascii"))
        if not isinstance(record, dict):
            raise TypeError("not an object")
        version = record.get("version")
        if type(version) is not int or version < VERSION:
            raise ValueError("it has no version that is known")
        if version > VERSION:
            known = f"version {version}, this program knows {VERSION}"
            raise Damaged(f"{shown(path)}: written by a newer confext-watcher ({known})", "newer")
        return schema.from_dict(State, record)
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(
            f"{shown(path)}: the record cannot be read: {printable(str(error)[:_SAID_MAX])}"
        ) from error
