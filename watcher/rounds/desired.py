# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have: what is on disk, what may be used of it, and what it was given before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from watcher.images import unmounted
from watcher.images.admission import Admission, Host
from watcher.images.stacks import Accepted
from watcher.images.store import Store
from watcher.model import (
    Busy,
    Candidate,
    Copy,
    Declared,
    Entry,
    Interest,
    KeptOut,
    Look,
    Picks,
    Refused,
    Remark,
    Stack,
    Sysext,
    Unsafe,
    shown,
)
from watcher.mounts.table import LAYERS_MAX
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.resolve.trust import ROOT_ALONE, Trust
from watcher.rounds.choose import Choice, Passed, choose
from watcher.rounds.state import Trial

STACK = "stack:"
"""With an identity behind it: a whole stack in the quarantine, for a change that brought no new content (a removal)."""


@dataclass(frozen=True, slots=True)
class Desired:
    """What a service should have, and what it was given before.

    Attributes:
        look: what is on disk.
        stack: what it should have.
        passed: what was passed over on the way.
        current: the accepted stack: its slots.
        recorded: the slots say already what would be accepted: stack, names, entries, and where those are mounted.
        trial: what is on trial.
        bad: the stack that proved bad, and is being taken out again. Then `stack` is the newest accepted one with
            nothing in it that is in quarantine, whatever else is on disk.
        why: the reason that its content is in quarantine.
        pinned: an operator put it on `stack` by hand (`rollback`).
        waiting: for a pinned service, the stack that it would have otherwise.
        at_hand: digests of what the look found and did not refuse, whether it is desired now or has to wait.
        signatures: of the files that were passed over, by path (`outcomes.signatures`).
        whole: the newest accepted stack that can be used: `current`, unless a copy of that is damaged.
        fallen: `stack` is `whole` for want of a better: a copy is damaged, and the dropped file cannot replace it.
    """

    look: Look
    stack: Stack
    passed: tuple[Passed, ...]
    current: Stack
    recorded: bool
    trial: Trial | None = None
    bad: Stack | None = None
    why: str = ""
    pinned: bool = False
    waiting: Stack | None = None
    at_hand: frozenset[str] = frozenset()
    signatures: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: Stack = field(default_factory=Stack)
    fallen: bool = False

    @property
    def busy(self) -> bool:
        return Choice(self.stack, self.passed).busy

    @property
    def sysexts(self) -> tuple[Entry, ...]:
        """What the unit declares and is a system extension: systemd gets it as it is."""
        slots = {one.slot for one in self.passed if isinstance(one.reason, Sysext)}
        return tuple(
            pick.entry for pick in self.look.picks if pick.entry.declared and pick.entry.slot in slots
        )

    @property
    def rolling_back(self) -> bool:
        """Whether `stack` is one from before that has to come back, because a later one proved bad."""
        return self.bad is not None

    @property
    def new(self) -> bool:
        """Whether `stack` was not accepted yet, and has still to prove itself."""
        known = self.rolling_back or self.pinned or self.fallen
        return self.stack.id != self.current.id and not known

    @property
    def on_trial(self) -> bool:
        """Whether `stack` was accepted, and not judged yet."""
        return self.trial is not None and self.trial.stack == self.stack.id and not self.trial.bad

    def staying(self) -> Desired:
        """The same service on the stack that it has, for the time being."""
        damaged = self.whole.id != self.current.id
        return replace(self, stack=self.whole, recorded=not damaged, fallen=damaged)


@dataclass(frozen=True, slots=True)
class Given:
    """What decides, beside the files and the accepted stacks, what a service should have.

    Attributes:
        slots: what its stacks are kept under.
        made_for: what its images must be made for; None: that is not known now, and it keeps what it has.
        kept_out: digests (or `STACK` and an identity) that it must not get, with the reason.
        elsewhere: digests that it must not get unless it has them already, with the reason.
        pin: identity of the stack that it was put on by hand.
        trial: what is on trial.
        policy: `ImagePolicy=`, systemd.image-policy(7). Nothing is verified yet: unless it is "*", nothing new gets in.
        trust: whom it lets drop things. Names are looked up, which may take as long as LDAP does.
    """

    slots: str
    declared: Declared
    made_for: Host | None
    kept_out: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    pin: str | None = None
    trial: Trial | None = None
    policy: str = ""
    trust: Trust = ROOT_ALONE


def find(store: Store, admission: Admission, given: Given) -> Desired:
    """What a service should have. Blocks, for as long as copying takes; hold `store.using()`."""
    with StrictModes(given.trust) as modes:
        return _find(store, admission, given, modes)


def _find(store: Store, admission: Admission, given: Given, modes: StrictModes) -> Desired:
    slots, kept_out, pin = given.slots, given.kept_out, given.pin
    record = store.record(slots) or Accepted(Stack(), (), 0)
    current = record.stack
    elsewhere = {key: why for key, why in given.elsewhere.items() if key not in current.digests}
    admitting = _Admitting(admission, given, elsewhere | dict(kept_out), modes)
    # The others are needed only if the current one may be bad, or an operator chose another.
    stacks = (current, *store.stacks(slots)) if kept_out or pin is not None else (current,)
    good = next((stack for stack in stacks if not why_bad(stack, kept_out)), Stack())
    look = _look(given.declared, modes, known=given.made_for is not None)
    look = _nothing_removed(look, record.entries, unmounted.unmounted(good, record.mounted))
    choice = choose(look, admitting.admit, good, lambda candidate: _is_lost(store, slots, candidate))
    choice = _with_sysexts(choice, look, admitting.read)
    stack = choice.stack
    if len(stack.layers) > LAYERS_MAX:
        look = replace(look, remarks=(*look.remarks, _too_many(stack)))
        stack = good
    if STACK + stack.id in kept_out:
        stack = good
    pinned = next((one for one in stacks if one.id == pin), None) if pin is not None else None
    proved_bad = None if pinned is not None else _proved_bad(stacks, kept_out, given.trial)
    target = pinned or (stack if proved_bad is None else good)
    whole = newest_whole(store, slots, kept_out, current)
    fallen = not store.is_whole(target)
    if fallen:
        look = replace(look, remarks=(*look.remarks, _damaged(store, target, whole)))
        target = whole
    said = target, tuple(pick.entry for pick in look.picks), unmounted.noted(target, record.mounted)
    return Desired(
        look,
        target,
        choice.passed,
        current,
        recorded=said == (current, record.entries, record.mounted),
        trial=given.trial,
        bad=proved_bad,
        why=why_bad(proved_bad, kept_out) if proved_bad is not None else "",
        pinned=pinned is not None,
        waiting=stack if pinned is not None and stack.id != pinned.id else None,
        at_hand=frozenset(admitting.at_hand),
        whole=whole,
        fallen=fallen,
    )


class _Admitting:
    """Admits what one look finds for a service.

    Args:
        reasons: digests that are kept out, with the reason.

    Attributes:
        at_hand: digests of what was not refused.
    """

    def __init__(
        self, admission: Admission, given: Given, reasons: Mapping[str, str], modes: StrictModes
    ) -> None:
        self._admission = admission
        self._made_for = given.made_for
        self._modes = modes
        self._reasons = reasons
        self._policy = given.policy
        self.at_hand: set[str] = set()

    def admit(self, candidate: Candidate) -> Copy:
        """Raises as `Admission.admit()`, and KeptOut."""
        copy = self._read(candidate, self._modes)
        if copy.digest in self._reasons:
            raise KeptOut(f"kept out: {self._reasons[copy.digest]}")
        if self._policy not in ("", "*"):
            raise Refused(f"nothing is verified yet, as ImagePolicy={shown(self._policy)} asks for")
        return copy

    def read(self, candidate: Candidate) -> Copy:
        """`Admission.admit()`, whoever can write to it."""
        return self._read(candidate, None)

    def _read(self, candidate: Candidate, modes: StrictModes | None) -> Copy:
        assert self._made_for is not None  # choose() asks for no candidate of a look that is unknown
        return self._admission.admit(candidate, self._made_for, self.at_hand, modes)


def _look(declared: Declared, modes: StrictModes, *, known: bool) -> Look:
    """What is on disk.

    Args:
        known: whether it is known what an image must be made for.
    """
    look = scan.look(declared, modes=modes)
    remarks = (*modes.remarks, *look.remarks)
    if known:
        return replace(look, remarks=remarks)
    words = "what fits it is known when it runs, until then it keeps what it has"
    return replace(look, unknown=True, remarks=(*remarks, Remark("debug", "RootImage=", words)))


def _with_sysexts(choice: Choice, look: Look, read: Callable[[Candidate], Copy]) -> Choice:
    """A sysext that the unit declares counts as one even if others may write to it: systemd mounts it, not we."""
    declared = {pick.entry.slot for pick in look.picks if pick.entry.declared}
    passed = []
    for one in choice.passed:
        if one.slot in declared and isinstance(one.reason, Unsafe) and not one.reason.hidden:
            try:
                read(one.candidate)
            except Sysext as sysext:
                one = replace(one, reason=sysext)
            except (Refused, Busy):
                pass  # it stays unsafe; its outcome says so
        passed.append(one)
    return replace(choice, passed=tuple(passed))


def newest_whole(
    store: Store, slots: str, kept_out: Mapping[str, str] | None = None, current: Stack | None = None
) -> Stack:
    """The newest accepted stack of which no copy is damaged, and that did not prove bad; the empty one if none is left.

    Blocks, see integrity.py.

    Args:
        current: the accepted stack, where it is known.
    """

    def usable(stack: Stack) -> bool:
        return not why_bad(stack, kept_out or {}) and store.is_whole(stack)

    current = store.accepted(slots) if current is None else current
    if current is not None and usable(current):
        return current
    return next(filter(usable, store.stacks(slots)), Stack())


def _is_lost(store: Store, slots: str, candidate: Candidate) -> bool:
    """Whether an accepted layer came from the candidate's path, and its copy is damaged."""
    return any(
        layer.source == candidate.path and not store.verify(layer.digest)
        for stack in store.stacks(slots)
        for layer in stack.layers
    )


def _damaged(store: Store, stack: Stack, instead: Stack) -> Remark:
    lost = next(layer for layer in stack.layers if not store.verify(layer.digest))
    then = ", ".join(layer.label for layer in instead.layers) or "the host's /etc alone"
    what = (
        f"the copy of {lost.label} in the store is damaged, and no whole file is there to take it from again"
    )
    return Remark("warning", lost.source, f"{what}: {then} is used instead; drop it again")


def _nothing_removed(look: Look, recorded: Sequence[Entry], unmounted: Mapping[str, str]) -> Look:
    """With the entries that the look could not see, though they were not removed.

    Their directory cannot be read, strangers can write to it, or their file system is not mounted.

    Args:
        recorded: the entries that the accepted stack had.
        unmounted: slots of its layers that were on such file systems, with where these were mounted.
    """
    picks = list(look.picks)
    for number, entry in enumerate(recorded):
        slots = [pick.entry.slot for pick in picks]
        # What a unit declares is known without reading a directory.
        hidden = not entry.declared and (look.unknown or look.unsafe or entry.slot in unmounted)
        if hidden and entry.slot not in slots:
            below = (slots.index(one.slot) for one in recorded[:number] if one.slot in slots)
            picks.insert(max(below, default=-1) + 1, Picks(entry, (), unknown=look.unsafe))
    remarks, interests = list(look.remarks), list(look.interests)
    for number, pick in enumerate(picks):
        if not pick.candidates and pick.entry.slot in unmounted:
            picks[number] = replace(pick, unknown=True)
            words = "its file system is gone, what was accepted from it stays"
            where = unmounted[pick.entry.slot]
            remarks.append(Remark("warning", where, words))
            interests.append(Interest(os.path.dirname(where), pattern=re.escape(os.path.basename(where))))
    return replace(look, picks=tuple(picks), interests=tuple(interests), remarks=tuple(remarks))


def _too_many(stack: Stack) -> Remark:
    first = stack.layers[LAYERS_MAX].source
    what = f"one too many: {len(stack.layers)} layers, and {LAYERS_MAX} are allowed; all stays as it is"
    return Remark("warning", first, what)


def _proved_bad(stacks: Sequence[Stack], kept_out: Mapping[str, str], trial: Trial | None) -> Stack | None:
    """The accepted stack if it proved bad; else one that did and is still on trial: its outcome is not recorded."""
    current, *others = stacks
    if why_bad(current, kept_out):
        return current
    tried = (stack for stack in others if trial is not None and stack.id == trial.stack != current.id)
    return next((stack for stack in tried if why_bad(stack, kept_out)), None)


def why_bad(stack: Stack, reasons: Mapping[str, str]) -> str:
    """Why a stack is not to be used, "" if it may be."""
    for key in (STACK + stack.id, *stack.digests):
        if key in reasons:
            return reasons[key]
    return ""
