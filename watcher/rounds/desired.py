# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service could have: what is on disk, what may be used of it, and what it was given before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from watcher.images import unmounted
from watcher.images.admission import Admission
from watcher.images.complete import Rule
from watcher.images.made_for import Host
from watcher.images.startable import require_startable
from watcher.images.store import Store
from watcher.managers.base import starts_by_systemd
from watcher.model import (
    Busy,
    Candidate,
    Copy,
    Declared,
    Entry,
    KeptOut,
    Layer,
    Look,
    Picks,
    Refused,
    Remark,
    Settling,
    Stack,
    Sysext,
    Unsafe,
)
from watcher.mounts.table import LAYERS_MAX
from watcher.records.state import STACK, Accepted, State
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.resolve.trust import ROOT_ALONE, Trust
from watcher.rounds.choose import Choice, Passed, choose
from watcher.rounds.image_policies import let_in_anyway, not_allowed
from watcher.rounds.kept_entries import nothing_removed, with_entries
from watcher.rounds.patience import Limits, Removals, marked
from watcher.rounds.whole_drop import WholeDrop
from watcher.settings.image_policy import Demand


@dataclass(frozen=True, slots=True)
class Desired:
    """What a service could have.

    Attributes:
        look: what is on disk.
        passed: what was passed over on the way.
        wanted, fallback, pinned, damaged, mounted: see `Facts`.
        again: see `Facts`.
        lost: digests of the accepted stack of which the copy is damaged.
        at_hand: digests of what the look found and did not refuse, whether it is wanted now or has to wait.
        digests: of each candidate that was read in this look, by path, whatever became of it.
        look_again: seconds after which to look again, where no event tells; None: there is no need.
        signatures: of the files that were passed over, by path (`outcomes.signatures`).
        is_common: all find the same who are given the same, and of whom nothing is kept out (`looks.common_key`).
    """

    look: Look
    passed: tuple[Passed, ...]
    wanted: Stack
    fallback: Stack
    pinned: Stack | None = None
    damaged: tuple[str, ...] = ()
    mounted: Mapping[str, str] = field(default_factory=dict)
    again: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    at_hand: frozenset[str] = frozenset()
    digests: Mapping[str, str] = field(default_factory=dict)
    look_again: float | None = None
    signatures: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_common: bool = False

    @property
    def busy(self) -> bool:
        """Whether the answer may change soon: something is being written, or could not be read just now."""
        return self.look.failed or Choice(self.wanted, self.passed).busy

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(pick.entry for pick in self.look.picks)

    def recorded(self, accepted: Accepted) -> Desired:
        """With the places that were recorded: a file system may have been unmounted since the look."""
        sources = {layer.source for layer in accepted.stack.layers}
        others = {source: place for source, place in self.mounted.items() if source not in sources}
        return replace(self, mounted={**others, **accepted.mounted})

    @property
    def sysexts(self) -> tuple[Entry, ...]:
        """What the unit declares and is a system extension: systemd gets it as it is."""
        slots = {one.slot for one in self.passed if isinstance(one.reason, Sysext)}
        return tuple(entry for entry in self.entries if entry.declared and entry.slot in slots)


@dataclass(frozen=True, slots=True)
class Given:
    """What a look depends on, beside the files.

    Attributes:
        slots: what its stacks are kept under.
        made_for: what its images must be made for; None: that is not known now, and it keeps what it has.
        state: what was decided before.
        elsewhere: digests that it must not get unless it has them already, with the reason.
        policies: which images may get in.
        trust: whom it lets drop things. Names are looked up, which may take as long as LDAP does.
        limits: how long it waits.
        removals: since when what it has is gone.
        thorough: also what is accepted is read, where a newer one is there, or an operator chose another.
    """

    slots: str
    declared: Declared
    made_for: Host | None
    state: State = field(default_factory=State)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    policies: tuple[Demand, ...] = ()
    trust: Trust = ROOT_ALONE
    limits: Limits = Limits()  # noqa: RUF009 -- frozen
    removals: Removals = field(default_factory=Removals)
    thorough: bool = False


def find(store: Store, admission: Admission, given: Given) -> Desired:
    """What a service could have. Blocks, for as long as copying takes; hold `store.using()`."""
    with StrictModes(given.trust) as modes:
        return _find(store, admission, given, modes)


def _find(store: Store, admission: Admission, given: Given, modes: StrictModes) -> Desired:
    state, record = given.state, given.state.accepted
    elsewhere = {key: why for key, why in given.elsewhere.items() if key not in record.stack.digests}
    stacks = _stacks(store, given)
    good = next((stack for stack in stacks if not state.why_bad(stack)), Stack())
    look = _look(given.declared, modes, known=given.made_for is not None)
    look = nothing_removed(look, record.entries, unmounted.unmounted(good, record.mounted))
    staying = _Staying(given, good, look)
    look = staying.with_entries(look, record.entries)
    whole_drop = WholeDrop(look, good, store.copies, given.policies)
    rule = _rule(store, given, good, look)
    admitting = _Admitting(admission, given, elsewhere | state.kept_out, modes, rule, whole_drop)
    lost = functools.partial(_is_lost, store, given.slots)
    choice = choose(look, admitting.admit, good, lost, staying.stays)
    if given.thorough and not look.unknown:
        admitting.read_accepted(look, record.stack)
    if damaged_copies := store.whole.damaged:
        admitting.mend(look, store.stacks(given.slots), damaged_copies)
    look = replace(look, remarks=(*look.remarks, *staying.remarks))
    choice = _with_sysexts(choice, look, admitting.read)
    look = replace(look, remarks=(*look.remarks, *_effects(admission, choice.stack, good)))
    remarks = (
        *let_in_anyway(choice.stack, good),
        *not_allowed(given.policies, _as_now(record.stack, choice.stack)),
    )
    look = replace(look, remarks=(*look.remarks, *remarks))
    wanted = choice.stack
    if len(wanted.layers) > LAYERS_MAX:
        look = replace(look, remarks=(*look.remarks, _too_many(wanted)))
        wanted = good
    if STACK + wanted.id in state.kept_out:
        wanted = good
    pinned = next((one for one in stacks if one.id == state.pin), None) if state.pin is not None else None
    fallback = newest_whole(store, given.slots, state)
    chosen = pinned or (good if state.why_bad(record.stack) else wanted)
    damaged = {one.id for one in (chosen, wanted, record.stack) if not store.is_whole(one)}
    if chosen.id in damaged and fallback.layers:  # else what comes of that is an outcome
        look = replace(look, remarks=(*look.remarks, _damaged(store, chosen, fallback)))
    either = Stack((*chosen.layers, *fallback.layers))
    return Desired(
        look,
        choice.passed,
        wanted,
        fallback,
        pinned,
        damaged=tuple(sorted(damaged)),
        lost=tuple(one for one in record.stack.digests if damaged and not store.verify(one)),
        mounted=unmounted.noted(either, record.mounted),
        at_hand=frozenset(admitting.at_hand),
        digests=admitting.digests,
        look_again=_look_again(choice, staying),
        is_common=fallback == record.stack and not (choice.passed or damaged or staying.gone),
    )


def _stacks(store: Store, given: Given) -> tuple[Stack, ...]:
    """The accepted stack, and before it if it may be bad, or an operator chose another."""
    others = given.state.quarantine or given.state.pin is not None
    return (given.state.accepted.stack, *(store.stacks(given.slots) if others else ()))


class _Admitting:
    """Admits what one look finds for a service.

    Args:
        reasons: digests that are kept out, with the reason.
        rule: when a tree is complete.
        whole_drop: when an image is.

    Attributes:
        at_hand: digests of what was not refused.
        digests: of each candidate that was read, by path.
    """

    def __init__(
        self,
        admission: Admission,
        given: Given,
        reasons: Mapping[str, str],
        modes: StrictModes,
        rule: Rule,
        whole_drop: WholeDrop,
    ) -> None:
        self._admission = admission
        self._rule = rule
        self._made_for = given.made_for
        self._modes = modes
        self._reasons = reasons
        self._policies = given.policies
        self._whole_drop = whole_drop
        self._has = given.state.accepted.stack.digests
        self._by_systemd = starts_by_systemd(given.slots)
        self.at_hand: set[str] = set()
        self.digests: dict[str, str] = {}

    def admit(self, candidate: Candidate) -> Copy:
        """Raises as `Admission.admit()`, and KeptOut."""
        copy = self.read(candidate, self._modes)
        self.digests[candidate.path] = copy.digest
        if copy.digest in self._reasons:
            raise KeptOut(f"kept out: {self._reasons[copy.digest]}", copy.digest)
        copy = replace(copy, trust=self._admission.trust(copy))
        if copy.digest not in self._has:  # what it has, stays
            self._whole_drop.require(candidate, copy)
        if self._by_systemd:
            require_startable(copy, self._policies)
        return copy

    def read_accepted(self, look: Look, accepted: Stack) -> None:
        """Read what came from the files of accepted layers, where the choice did not depend on it."""
        sources = {layer.source for layer in accepted.layers} - self.digests.keys()
        for candidate in (one for pick in look.picks for one in pick.candidates if one.path in sources):
            with suppress(Refused, Busy):
                self.admit(candidate)

    def mend(self, look: Look, stacks: Iterable[Stack], damaged: Collection[str]) -> None:
        """Have damaged copies made anew that the choice did not depend on: the service may go back to them."""
        layers = (layer for stack in stacks for layer in stack.layers)
        sources = {layer.source for layer in layers if layer.digest in damaged}
        for candidate in (one for pick in look.picks for one in pick.candidates if one.path in sources):
            with suppress(Refused, Busy):
                self.read(candidate, self._modes)

    def read(self, candidate: Candidate, modes: StrictModes | None = None) -> Copy:
        """`Admission.admit()`; without `modes`, whoever can write to it."""
        assert self._made_for is not None  # choose() asks for no candidate of a look that is unknown
        return self._admission.admit(candidate, self._made_for, self.at_hand, modes, self._rule)


class _Staying:
    """What is gone, and stays for now.

    Attributes:
        gone: the layers.
        remarks: what there is to say about that.
        seconds: for how long each of it stays.
    """

    def __init__(self, given: Given, accepted: Stack, look: Look) -> None:
        self.remarks: list[Remark] = []
        self.seconds: list[float] = []
        self._given = given
        there = {candidate.path for pick in look.picks for candidate in pick.candidates}
        self.gone = [layer for layer in accepted.layers if layer.source not in there]
        given.removals.seen(given.slots, (layer.source for layer in self.gone))

    def with_entries(self, look: Look, recorded: Sequence[Entry]) -> Look:
        """With the entries of which nothing is left, and whose layers stay."""
        gone = {layer.slot: layer for layer in self.gone}

        def missing(entry: Entry) -> Picks | None:
            layer = gone.get(entry.slot) if not entry.declared else None
            return Picks(entry, ()) if layer and self._left(layer, last=True) > 0 else None

        return with_entries(look, recorded, missing)

    def stays(self, layer: Layer, last: bool) -> bool:
        """Whether a layer whose file is gone stays for now."""
        seconds = self._left(layer, last=last)
        if seconds <= 0:
            return False
        self.seconds.append(seconds)
        words = "gone, and stays for now: it may be about to be replaced (RemoveSec=)"
        self.remarks.append(Remark("debug", layer.source, words))
        return True

    def _left(self, layer: Layer, *, last: bool) -> float:
        given = self._given
        return given.removals.left(given.slots, layer, given.limits, last=last)


def _as_now(accepted: Stack, wanted: Stack) -> Stack:
    """The accepted stack, with what was proved of its layers in this look."""
    new = {layer.digest: layer for layer in wanted.layers}
    return Stack(tuple(new.get(layer.digest, layer) for layer in accepted.layers))


def _effects(admission: Admission, wanted: Stack, before: Stack) -> list[Remark]:
    """What new layers do to the host's `/etc` besides bringing files."""
    new = [layer for layer in wanted.layers if layer.digest not in before.digests]
    return [
        Remark("warning", layer.source, text) for layer in new for text in admission.effects(layer.digest)
    ]


def _look_again(choice: Choice, staying: _Staying) -> float | None:
    """Seconds after which to look again: a tree may be complete then, or what is gone has to go."""
    reasons = [one.reason for one in choice.passed]
    settling = [reason.seconds for reason in reasons if isinstance(reason, Settling)]
    return min((*settling, *staying.seconds), default=None)


def _rule(store: Store, given: Given, accepted: Stack, look: Look) -> Rule:
    """When a tree of the service is complete."""
    slots = {candidate.path: pick.entry.slot for pick in look.picks for candidate in pick.candidates}
    before = marked(accepted.layers, slots, store.copies)
    return Rule(given.limits.tree_usec, given.limits.tree_max_usec, before)


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


def newest_whole(store: Store, slots: str, state: State) -> Stack:
    """The newest accepted stack of which no copy is damaged, and that did not prove bad; the empty one if none is left.

    Blocks, see integrity.py.
    """

    def usable(stack: Stack) -> bool:
        return not state.why_bad(stack) and store.is_whole(stack)

    current = state.accepted.stack
    return current if usable(current) else next(filter(usable, store.stacks(slots)), Stack())


def _is_lost(store: Store, slots: str, candidate: Candidate) -> bool:
    """Whether an accepted layer came from the candidate's path, and its copy is damaged."""
    return any(
        layer.source == candidate.path and not store.verify(layer.digest)
        for stack in store.stacks(slots)
        for layer in stack.layers
    )


def _damaged(store: Store, stack: Stack, instead: Stack) -> Remark:
    lost = next(layer for layer in stack.layers if not store.verify(layer.digest))
    then = ", ".join(layer.label for layer in instead.layers)
    what = (
        f"the copy of {lost.label} in the store is damaged, and no whole file is there to take it from again"
    )
    return Remark("warning", lost.source, f"{what}: {then} is used instead; drop it again")


def _too_many(stack: Stack) -> Remark:
    first = stack.layers[LAYERS_MAX].source
    what = f"one too many: {len(stack.layers)} layers, and {LAYERS_MAX} are allowed; all stays as it is"
    return Remark("warning", first, what)
