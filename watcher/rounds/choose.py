# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which stack a service should have: the pick of each entry among what is admitted. Pure.

The pick is the newest candidate that is admitted. One that is incomplete, refused or quarantined is passed over, as
systemd.v(7) passes over one with no tries left. What was accepted stays accepted while its file is there, even if that
is being uploaded again, or broken. It goes when the file is removed, when other admissible content has taken its name,
or when a newer one gets in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from watcher.model import Busy, Candidate, Copy, KeptOut, Layer, Look, Picks, Refused, Stack, shown
from watcher.resolve import version


@dataclass(frozen=True, slots=True)
class Passed:
    """A candidate that was passed over, and why: `Refused` and `Incomplete` are worth a line, `Busy` is not."""

    slot: str
    candidate: Candidate
    reason: Refused | Busy


@dataclass(frozen=True, slots=True)
class Choice:
    """The desired stack, and what was passed over on the way to it."""

    stack: Stack
    passed: tuple[Passed, ...]

    @property
    def busy(self) -> bool:
        """Whether something is still being written that may change the answer."""
        return any(isinstance(passed.reason, Busy) for passed in self.passed)


def choose(
    look: Look,
    admit: Callable[[Candidate], Copy],
    accepted: Stack,
    lost: Callable[[Candidate], bool] = lambda candidate: False,
    stays: Callable[[Layer, bool], bool] = lambda layer, last: False,
) -> Choice:
    """The stack that a service should have.

    Args:
        look: what is on disk.
        admit: gives the store's copy of a candidate. Called only where the answer depends on it. Raises Refused or
            Busy for a candidate that may not become a layer.
        accepted: the last accepted stack.
        lost: whether a candidate that is refused was accepted once, and its copy is damaged. What came in its place
            stays.
        stays: whether an accepted layer whose file is gone stays for now, where only less would come in its place: an
            older version, or nothing ("last").
    """
    if look.unknown:  # a directory that cannot be read takes nothing from a service
        return Choice(accepted, ())
    before = {layer.slot: layer for layer in accepted.layers}
    layers: list[Layer] = []
    passed: list[Passed] = []
    for pick in look.picks:
        accepted_layer = before.get(pick.entry.slot)
        layer = _pick(pick, admit, accepted_layer, passed, lost)
        if accepted_layer is not None and _is_less(layer, accepted_layer) and _is_gone(accepted_layer, pick):
            layer = accepted_layer if stays(accepted_layer, layer is None) else layer
        if layer is not None:
            layers.append(layer)
    return Choice(Stack(distinct(layers)), tuple(passed))


def _pick(
    pick: Picks,
    admit: Callable[[Candidate], Copy],
    accepted: Layer | None,
    passed: list[Passed],
    lost: Callable[[Candidate], bool],
) -> Layer | None:
    if pick.unsafe is not None:  # one line for all of them
        passed += [Passed(pick.entry.slot, candidate, pick.unsafe) for candidate in pick.candidates[:1]]
        return accepted
    if pick.unknown and accepted is not None and _is_gone(accepted, pick):
        return accepted  # it may be there, where the look could not see it
    kept_out = False
    for candidate in pick.candidates:
        try:
            copy = admit(candidate)
        except (Refused, Busy) as reason:
            passed.append(Passed(pick.entry.slot, candidate, reason))
            kept_out = kept_out or isinstance(reason, KeptOut) or lost(candidate)
            if accepted is not None and accepted.source == candidate.path:
                return accepted
        else:
            if kept_out and accepted is not None and _is_gone(accepted, pick):
                return accepted
            return Layer(
                pick.entry.slot,
                candidate.name,
                candidate.version,
                copy.digest,
                copy.kind,
                candidate.path,
                copy.trust,
                copy.format.file_system if copy.format is not None else "",
            )
    return accepted if kept_out else None


def _is_less(layer: Layer | None, accepted: Layer) -> bool:
    return layer is None or version.compare(layer.version, accepted.version) < 0


def _is_gone(layer: Layer, pick: Picks) -> bool:
    """Whether a layer's file is not there. A bad image that came instead of it must not take the layer away."""
    return all(candidate.path != layer.source for candidate in pick.candidates)


def distinct(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Without lower layers whose content comes again further up.

    overlayfs takes no directory twice (ELOOP), and the upper twin hides all that the lower one has.
    """
    kept: dict[str, Layer] = {}
    for layer in reversed(list(layers)):
        kept.setdefault(layer.digest, layer)
    return tuple(reversed(kept.values()))


def differences(before: Stack, after: Stack) -> list[tuple[Layer | None, Layer | None]]:
    """What changed between two stacks, by slot: (old, new), the new stack's order first; None for what is not there."""
    old = {layer.slot: layer for layer in before.layers}
    new = {layer.slot: layer for layer in after.layers}
    slots = [*new, *(slot for slot in old if slot not in new)]
    pairs = [(old.get(slot), new.get(slot)) for slot in slots]
    return [(a, b) for a, b in pairs if a is None or b is None or a.digest != b.digest]


def describe(before: Stack, after: Stack) -> str:
    """The change in words: "web 1.3 -> 1.4", "web 1.4 added", "web 1.3 removed", comma-separated."""
    return ", ".join(_words(old, new) for old, new in differences(before, after)) or "order of layers"


def _words(old: Layer | None, new: Layer | None) -> str:
    if old is None and new is not None:
        return f"{new.label} added"
    if new is None and old is not None:
        return f"{old.label} removed"
    assert old is not None and new is not None
    if old.name == new.name:
        if old.version == new.version:
            return f"{new.label} with new content"
        return f"{old.label} -> {shown(new.version or new.name)}"
    return f"{old.label} -> {new.label}"
