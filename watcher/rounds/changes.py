# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a step changes the record of a service, for the daemon and for `exec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from watcher.images import tries, unmounted
from watcher.images.store import Store
from watcher.model import Stack, Verdict
from watcher.records.state import INNOCENT, STACK, Quarantine, State, Trial, Undoing
from watcher.resolve.trust import Trust
from watcher.rounds import decide
from watcher.rounds.desired import Desired
from watcher.rounds.facts import Facts, both

# More than are gone back to.
_UNTRIED_MAX = 16


def let_in(step: decide.LetIn, invocation: str, state: State) -> State:
    """Try again what is kept out for the moment, or go on keeping it out during this start of the service."""
    if step.digests:
        return replace(
            state, quarantine=tuple(one for one in state.quarantine if one.digest not in step.digests)
        )
    stays = tuple(one for one in state.quarantine if not (step.anything and one.for_now))
    return replace(state, quarantine=stays, held_for=invocation, fell=False)


def count(
    store: Store,
    desired: Desired,
    facts: Facts,
    slots: str,
    service: str,
    renaming: tries.Renaming,
    trust: Trust,
) -> Desired:
    """Count one try of each new file of the wanted stack that has counters; with the files' names from now on.

    Another look would pass over a file that has no try left after this one.

    The note comes first: if the watcher is killed before the rename, the next attempt goes on with the same try.
    Blocks.

    Raises:
        FileNotFoundError: another service's attempt has just renamed a file; nothing is noted.
        Later: it cannot be noted.
    """
    stack, record = desired.wanted, facts.state.accepted
    uncounted = tries.uncounted(stack, facts.accepted, facts.state.counted)
    after = tries.noted(stack, facts.accepted) | {key: done + 1 for key, done in uncounted.items()}
    store.change(slots, lambda state: replace(state, counted=after))
    try:
        begun = tries.begin(stack, uncounted, service, renaming, trust)
    except FileNotFoundError:
        store.change(slots, lambda state: replace(state, counted={}))
        raise
    found = tries.noted(begun, facts.accepted)
    if found != after:  # some cannot be counted
        store.change(slots, lambda state: replace(state, counted=found))
    mounted = {**desired.mounted, **unmounted.noted(begun, record.mounted)}
    return replace(desired, wanted=begun, mounted=mounted)


def accept(
    step: decide.Accept, facts: Facts, invocation: str, sysexts: tuple[str, ...], state: State
) -> State:
    """A stack was accepted. If the service runs where it can be swapped, it is owed a reload from now on.

    Args:
        state: with that stack as the accepted one.
    """
    old = facts.accepted
    state = replace(state, checked="", counted={}, sysexts=sysexts)
    if step.stack.id == old.id:
        if _files(step.stack) != _files(old) and state.replaced is None:
            state = replace(state, replaced=old.id)  # by itself, which is told
        return state
    start = facts.invocation or facts.failed_start
    if start and step.stack.id in state.untried:  # that start was not on this stack
        state = replace(state, untried={**state.untried, step.stack.id: start})
    bad = state.why_bad(old) if facts.pinned is None else ""
    undoing = state.undoing if facts.undoing else None
    if bad and undoing is None and not step.new:
        undoing = Undoing(old, Verdict.WENT_DOWN, bad)
    return replace(
        state,
        undoing=undoing,
        trial=_trial(step.stack, facts) if step.new else None,
        owed=invocation if facts.reachable else state.owed,
        replaced=old.id,
    )


def _trial(stack: Stack, facts: Facts) -> Trial:
    other = "" if facts.reachable else facts.invocation or facts.failed_start
    return Trial(stack.id, was_down=facts.failed and not facts.running, other=other)


def good(facts: Facts, now: int, state: State) -> State:
    """The accepted stack proved good.

    Args:
        now: microseconds since the epoch.
    """
    if _is_another(facts, state):
        return state
    trial = None
    # Why a standalone service ends is not known: without a reload, that it may soon do is no sign.
    if facts.on_trial and (facts.was_told or facts.explained):
        trial = Trial(facts.accepted.id, verdict=Verdict.GOOD, judged=now, restarts=facts.restarts)
    replaced = None if facts.was_told else state.replaced
    tried = not facts.was_told or (facts.judged is not None and facts.judged.told == "restart")
    untried = _untried(facts, state, tried=tried)
    return replace(state, trial=trial, undoing=None, owed="", replaced=replaced, untried=untried)


def _untried(facts: Facts, state: State, *, tried: bool) -> Mapping[str, str]:
    """`State.untried` after a verdict on the accepted stack.

    Args:
        tried: on a start; else on a reload, which it took well.
    """
    others = {stack: start for stack, start in state.untried.items() if stack != facts.accepted.id}
    if tried or not facts.accepted.layers:
        return others
    return dict([*others.items(), (facts.accepted.id, facts.invocation)][-_UNTRIED_MAX:])


def told(state: State) -> State:
    """The service was told of the accepted stack, and an outcome says so. Its trial ends when its files are renamed."""
    return replace(state, owed="", replaced=None)


def keep(facts: Facts, verdict: Verdict, now: int, state: State) -> State:
    """The accepted stack proved bad, and stays.

    Args:
        now: microseconds since the epoch.
    """
    if _is_another(facts, state):
        return state
    trial = replace(state.trial, verdict=verdict, judged=now) if facts.on_trial and state.trial else None
    untried = _untried(facts, state, tried=True)
    return replace(state, trial=trial, undoing=None, owed="", replaced=None, untried=untried)


def reject(
    step: decide.Reject, facts: Facts, entries: Sequence[Quarantine], runs: bool, state: State
) -> State:
    """A stack proved bad. If it is the accepted one, it is taken out again next.

    Args:
        entries: what is to be kept out of the service.
        runs: its main process has not ended.
    """
    accepted = step.stack.id == facts.accepted.id
    keys = {one.digest for one in entries}
    others = [one for one in state.quarantine if one.digest not in keys]
    took_down = step.verdict is Verdict.WENT_DOWN and (facts.judged is not None or not facts.on_trial)
    bad = Undoing(step.stack, step.verdict, step.reason, both(step.output, step.logged), took_down)
    undoing = bad if accepted else state.undoing
    return replace(
        state,
        quarantine=(*others, *entries),
        undoing=undoing,
        held_for=facts.invocation,
        # What a standalone service ended by is not known, so its next `exec` makes the next try.
        fell=facts.explained and accepted and not runs,
        checked="",
        counted={},
    )


def undone(facts: Facts, well: bool, now: int, state: State) -> State:
    """The stack is back that the service had before a bad one: nothing is left to do.

    Args:
        well: the service takes it well. Else the other one is not to blame, and is kept out for now alone; but for one
            that took the service down while it ran.
        now: microseconds since the epoch.
    """
    if not well and state.undoing is not None and acquits(facts, state):
        state = replace(state, quarantine=tuple(_acquitted(state.undoing.stack, now, state.quarantine)))
    state = replace(state, undoing=None)
    if facts.invocation:
        # The way back may have been a start, which is no operator's.
        state = replace(state, held_for=facts.invocation, fell=False)
    if _is_another(facts, state):
        return state
    return replace(state, trial=None, owed="", replaced=None)


def acquits(facts: Facts, state: State) -> bool:
    """Whether the stack that is undone is not to blame where the service fails on the one before, too.

    Not one that took it down while it ran. Nor if it fails to start on one that no start has seen: both may be bad.
    """
    took_down = state.undoing is not None and state.undoing.took_down
    started = facts.judged is not None and facts.judged.told == "start"
    return not took_down and not (started and state.accepted.stack.id in state.untried)


def _acquitted(stack: Stack, now: int, entries: Sequence[Quarantine]) -> Iterator[Quarantine]:
    for one in entries:
        is_of_it = one.digest in (STACK + stack.id, *stack.digests)
        yield replace(one, for_now=True, judge=INNOCENT, since=now) if is_of_it else one


def said(state: State) -> State:
    """An outcome has said what became of the accepted stack."""
    return replace(state, replaced=None)


def _files(stack: Stack) -> list[str]:
    return [tries.plain(layer.source) for layer in stack.layers]


def _is_another(facts: Facts, state: State) -> bool:
    """Whether `exec` has accepted another stack since."""
    return state.accepted.stack.id != facts.accepted.id
