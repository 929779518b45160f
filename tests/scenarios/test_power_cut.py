# SPDX-License-Identifier: LGPL-2.1-or-later
"""A power cut after each system call, on a disk that keeps what was synced and any part of the rest.

What a unit starts on is whole, and what was accepted last; records and history name nothing that is not there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import powercut
from support.images import confext
from support.needs import root, tool
from watcher.images import tree
from watcher.images.stacks import Stacks
from watcher.records.ledger import Ledger
from watcher.records.state import State

UNIT = "web.service"

# What the daemon and `exec` do, in their order; each promise of a call that has returned is said.
PROGRAM = """
import os, sys
from dataclasses import replace
sys.path[:0] = {path!r}
from watcher.images import tree
from watcher.images.formats.image import Image
from watcher.images.formats.squashfs import SQUASHFS
from watcher.records.ledger import Ledger
from watcher.records.state import Quarantine, Trial
from watcher.watch.lease import Lease
from watcher.model import Event, Kind, Layer, Outcome, Stack
from watcher.images.store import Store
state, directory, *images = sys.argv[1:]
UNIT = "web.service"

def say(*words):
    os.write(1, " ".join(words).encode())

def image(path):
    fd = os.open(path, os.O_RDONLY)
    with Lease(fd) as lease:
        return store.add_image(fd, Image(SQUASHFS, 0), lease)

def accept(stack, trial=True):
    say("accepting", stack.id, "trial" if trial else "")
    on_trial = Trial(stack.id) if trial else None
    store.accept(UNIT, stack, (), lambda state: replace(state, trial=on_trial) if trial else state)
    store.settle()
    say("accepted", stack.id)

def judge(stack):
    say("judged", stack.id)
    store.change(UNIT, lambda state: replace(state, trial=None))

def tell(outcome, stack):
    say("telling", outcome.value, stack.id)
    ledger.append(Event(UNIT, outcome, "", 1, stack.id))
    say("told", outcome.value, stack.id)

def keep_out(bad, good):
    say("deciding")
    quarantine = tuple(Quarantine(digest, "bad", 1) for digest in bad.digests)
    store.change(UNIT, lambda state: replace(state, quarantine=quarantine, pin=good.id))
    say("decided")

def pass_through(path):
    store.change(UNIT, lambda state: replace(state, sysexts=(path,)))
    say("passed", path)

with Store(state, 1 << 40, 1 << 40, 2) as store, Ledger(state) as ledger:
    stack = lambda *copies: Stack(
        tuple(Layer(str(n), "web", "1", copy.digest, copy.kind, "") for n, copy in enumerate(copies)))
    with store.using():
        pass_through("/srv/none")
        root = os.open(directory, os.O_RDONLY)
        first = stack(image(images[0]), store.add_tree(root, tree.signature(root)))
        accept(first)
        tell(Outcome.APPLIED, first)
        judge(first)
        second = stack(image(images[1]))
        accept(second)
        keep_out(second, first)
        accept(first, trial=False)
        tell(Outcome.ROLLED_BACK, first)
        judge(second)
        pass_through("/srv/one")
        pass_through("/srv/two")
        third = stack(image(images[2]))
        accept(third)
        tell(Outcome.APPLIED, third)
    store.keep_stacks = 1
    say("collecting")
    store.collect(())
"""


@dataclass(frozen=True)
class Kept:
    """What is there after a power cut, as the program's own code reads it."""

    accepted: str | None
    history: frozenset[str]
    state: State


def kept(state: Path) -> Kept:
    """Read it; whatever can be wrong with it at any time is asserted."""
    whole = intact(state / "store") if (state / "store").exists() else set()
    stacks = Stacks(str(state))
    found = stacks.read(UNIT)  # Damaged is a failure
    if found is not None:
        links = {os.readlink(link) for link in (state / "units" / UNIT).iterdir() if link.is_symlink()}
        assert links == {f"../../../store/{digest}" for digest in found.accepted.stack.digests}
    history = stacks.history(UNIT)
    for one in history:
        assert set(one.stack.digests) <= whole, "a stack in the history is not in the store"
    found = found or State()
    return Kept(
        found.accepted.stack.id if found.accepted.when else None,
        frozenset(one.stack.id for one in history),
        found,
    )


def intact(store: Path) -> set[str]:
    """Whatever has a digest for its name is what the digest says."""
    digests = {path.name for path in store.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)}
    for path in (store / digest for digest in digests):
        if path.is_dir():
            fd = os.open(path, os.O_RDONLY)
            assert tree.digest(fd) == path.name, "half a tree"
            os.close(fd)
        else:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "half an image"
    return digests


Told = frozenset[str]


def told(state: Path) -> Told:
    """The events that a ledger has; it has lost nothing else."""
    with Ledger(str(state)) as ledger:
        assert ledger.remarks == [], "the ledger was set aside"
        return frozenset(f"{event.outcome.value} {event.stack}" for event in ledger.history())


def check(marks: list[str], found: Kept, events: Told) -> None:
    """Against what the program had begun and been promised."""
    words = [mark.split(" ") for mark in marks]
    accepts = [word for word in words if word[0] in ("accepting", "accepted")]
    done = max((n for n, word in enumerate(accepts) if word[0] == "accepted"), default=-1)
    last = [accepts[done][1]] if done >= 0 else [None]
    assert found.accepted in (*last, *(word[1] for word in accepts[done + 1 :])), "an older stack, or none"
    on_trial = {word[1] for word in accepts if word[-1] == "trial"} - {
        word[1] for word in words if word[0] == "judged"
    }
    trial = found.state.trial.stack if found.state.trial else ""
    assert found.accepted not in on_trial or trial == found.accepted, "accepted, and not on trial"
    began = {" ".join(word[1:]) for word in words if word[0] == "telling"}
    assert {" ".join(word[1:]) for word in words if word[0] == "told"} <= events <= began, "history"
    if ["collecting"] not in words:
        named = {event.split(" ")[1] for event in events} | ({found.state.pin} - {None})
        assert named <= found.history, "history of a stack, or a pin on one, that is not there"
    decided = bool(found.state.quarantine)
    assert decided == (found.state.pin is not None), "not in one step"
    assert (["decided"] in words) <= decided <= (["deciding"] in words), "a decision is lost"
    passed = len([word for word in words if word[0] == "passed"])
    lists = ((), ("/srv/none",), ("/srv/one",), ("/srv/two",))
    assert found.state.sysexts in lists[passed : passed + 2], "an older list of sysexts"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: the disk that counts is another one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as path:
        yield Path(path)


@root
@tool("strace")
@pytest.mark.limit(300)
def test_the_power_is_cut_after_any_call(scratch: Path, tmp_path: Path) -> None:
    state = scratch / "state"
    state.mkdir()
    images = []
    for number in range(3):
        images.append(tmp_path / f"{number}.raw")
        images[-1].write_bytes(b"%d" % number * 5000)
    source = confext(tmp_path / "web", "web", {"etc/a": b"1", "etc/b/c": b"2"})
    code = PROGRAM.format(path=sys.path)
    stores: dict[object, Kept] = {}
    ledgers: dict[object, Told] = {}
    numbers = itertools.count()
    cuts = 0
    for disk in powercut.replayed(code, [state, source, *images], state, tmp_path / "trace"):
        marks = list(disk.marks)
        seen = set()
        for chosen, data in disk.cuts():
            entries = disk.after(chosen, data)
            entries["store"] = without_temporary(entries.get("store"))
            ledger = {name: entries.pop(name) for name in list(entries) if name.startswith("ledger")}
            key, other = json.dumps(list(entries.items()), default=repr), repr(ledger)
            if (key, other) in seen:
                continue
            seen.add((key, other))
            cuts += 1
            try:
                if key not in stores:
                    made = scratch / f"cut{next(numbers)}"
                    powercut.make(entries, made)
                    stores[key] = kept(made)
                if other not in ledgers:
                    made = scratch / f"cut{next(numbers)}"
                    powercut.make(ledger, made)
                    ledgers[other] = told(made)
                check(marks, stores[key], ledgers[other])
            except Exception as error:
                raise AssertionError(
                    f"after {marks[-1:]}, {len(chosen)} of {len(disk.pending)}, {data}"
                ) from error
    assert disk.marks[-1] == "collecting"
    print(f"{cuts} power cuts, {len(stores)} states, {len(ledgers)} ledgers")


# What services that share an image do together.
TOGETHER = """
import os, sys
from dataclasses import replace
sys.path[:0] = {path!r}
from watcher.images.stacks import Stacks
from watcher.model import Kind, Layer, Stack
from watcher.records import durable
durable._PATHS_MAX, durable._dirty = {paths_max}, lambda: 0
stacks = Stacks(sys.argv[1])
os.mkdir(sys.argv[1] + "/store")
UNITS = ["a.service", "b.service", "c.service"]

def together(jobs):
    jobs = list(jobs)
    while jobs:
        needs = []
        for job in list(jobs):
            try:
                needs.append(next(job))
            except StopIteration:
                jobs.remove(job)
        if needs:
            needs[0].function([need.item for need in needs])

for number in "12":
    stack = Stack((Layer("web.raw", "web", number, number * 64, Kind.IMAGE, ""),))
    together(stacks.accepting(unit, stack, ()) for unit in UNITS)
    stacks.links.settle()
    os.write(1, b"accepted " + stack.id.encode())
    together(stacks.changing(unit, lambda state: replace(state, owed=stack.id)) for unit in UNITS)
    os.write(1, b"told " + stack.id.encode())
"""


@root
@tool("strace")
@pytest.mark.limit(300)
@pytest.mark.parametrize("paths_max", [0, 100], ids=["syncfs", "fsync"])
def test_the_power_is_cut_while_several_accept_a_stack(scratch: Path, tmp_path: Path, paths_max: int) -> None:
    state = scratch / "state"
    state.mkdir()
    code = TOGETHER.format(path=sys.path, paths_max=paths_max)
    seen = dict[str, list[State | None]]()
    for disk in powercut.replayed(code, [state], state, tmp_path / "trace"):
        done = dict[str, str](mark.split(" ") for mark in disk.marks)
        for chosen, data in disk.cuts():
            entries = disk.after(chosen, data)
            key = json.dumps(list(entries.items()), default=repr)
            if key not in seen:
                made = scratch / f"cut{len(seen)}"
                powercut.make(entries, made)
                stacks = Stacks(str(made))
                seen[key] = [stacks.read(f"{unit}.service") for unit in "abc"]
            for found in seen[key]:
                where = f"after {disk.marks}, {len(chosen)} of {len(disk.pending)}, {data}"
                assert found is not None or not done, where
                accepted = found.accepted.stack.id if found is not None else ""
                if found is not None and "accepted" in done and accepted != done["accepted"]:
                    assert disk.marks.count(f"accepted {accepted}") == 0, f"an older stack {where}"
                if found is not None and "told" in done and accepted == done["told"]:
                    assert found.owed == done["told"], where
    assert len(disk.marks) == 4
    assert len(seen) > 50


def without_temporary(store: powercut.Tree | None) -> powercut.Tree:
    """Nobody looks at what has no digest for its name; it would be another state for each step of a copy."""
    if store is None:
        return ("d", 0o700, ())
    kind, mode, inside = store
    assert isinstance(inside, tuple)
    return (kind, mode, tuple(one for one in inside if not one[0].startswith(".tmp")))
