# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is decided about a service holds: at once in memory, on the disk as soon as the disk takes it."""

from __future__ import annotations

import errno
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.killing import killed_before
from watcher.images import record_files
from watcher.images.stacks import Stacks
from watcher.images.store import Store
from watcher.images.unit_locks import UnitLocks
from watcher.model import Entry, Event, Kind, Later, Layer, Outcome, Stack, Verdict
from watcher.records.ledger import LedgerError
from watcher.records.state import Accepted, Quarantine, State, Trial

UNIT = "web.service.exec"
MIB = 1 << 20
BAD = Quarantine("b" * 64, "its check failed", 5, "/srv/web.raw.v/web_2.raw")


def keep_out(state: State) -> State:
    return replace(state, quarantine=(*state.quarantine, BAD))


def opened(tmp_path: Path, history: Callable[[str], list[Event]] = lambda slots: []) -> Store:
    return Store(str(tmp_path), 64 * MIB, 32 * MIB, 2, history)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path) as made:
        yield made


def count(name: str, state: State) -> State:
    return replace(state, counted={**state.counted, name: 1})


def stack(store: Store, *names: str) -> Stack:
    """Of copies that are not there: the store has a file by their names."""
    layers = []
    for name in names:
        digest = f"{len(name):02d}{ord(name[0]):02x}" * 16
        path = Path(store.state_directory, "store", digest)
        if not path.exists():
            path.write_text(name)
        layers.append(Layer(f"{name}.raw", name, "1", digest, Kind.IMAGE, f"/srv/{name}.raw.v/{name}_1.raw"))
    return Stack(tuple(layers))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFullDisk:
    def test_a_decision_holds_in_memory_and_is_written_with_the_next(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = stack(store, "a")
        store.accept(UNIT, first, ())
        with monkeypatch.context() as patched:
            patched.setattr(record_files, "create", full)
            with pytest.raises(Later, match=r"in memory only.*No space left"):
                store.change(UNIT, keep_out)
            assert store.state(UNIT).quarantine == (BAD,)
            with pytest.raises(Later):
                store.change(UNIT, lambda state: replace(state, fell=True))
            assert store.state(UNIT).quarantine == (BAD,) and store.state(UNIT).fell
            assert dict(store.states())[UNIT].fell
            store.forget(UNIT)
        assert Stacks(str(tmp_path)).read(UNIT) == State(accepted=store.state(UNIT).accepted)
        state = store.change(UNIT, lambda state: replace(state, owed="x"))
        assert (state.quarantine, state.fell, state.owed) == ((BAD,), True, "x")
        assert Stacks(str(tmp_path)).read(UNIT) == state == store.state(UNIT)

    def test_what_changes_nothing_more_writes_what_is_owed(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(record_files, "create", full)
            with pytest.raises(Later):
                store.change(UNIT, keep_out)
        store.change(UNIT, lambda state: state)
        state = Stacks(str(tmp_path)).read(UNIT)
        assert state is not None and state.quarantine == (BAD,)

    def test_the_next_accepted_stack_takes_it_along(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = stack(store, "a"), stack(store, "b")
        store.accept(UNIT, first, ())
        with monkeypatch.context() as patched:
            patched.setattr(record_files, "create", full)
            with pytest.raises(Later):
                store.change(UNIT, keep_out)
            with pytest.raises(Later):
                store.accept(UNIT, second, (), lambda state: replace(state, trial=Trial(second.id)))
            # The stack was not accepted, so it is not on trial either.
            assert store.state(UNIT).trial is None and store.accepted(UNIT) == first
        state = store.accept(UNIT, second, (), lambda state: replace(state, trial=Trial(second.id)))
        assert (state.quarantine, state.trial) == ((BAD,), Trial(second.id))
        assert Stacks(str(tmp_path)).read(UNIT) == state

    def test_another_process_goes_on_meanwhile(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(record_files, "create", full)
            with pytest.raises(Later):
                store.change(UNIT, keep_out)
        with opened(tmp_path) as other:
            theirs = other.accept(UNIT, stack(other, "a"), (), lambda state: replace(state, counted={"a": 1}))
        assert store.state(UNIT) == replace(theirs, quarantine=(BAD,))
        assert store.change(UNIT, lambda state: state) == replace(theirs, quarantine=(BAD,))

    def test_not_even_the_lock_can_be_had(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.change(UNIT, lambda state: replace(state, pin="a"))
        with monkeypatch.context() as patched:
            patched.setattr(UnitLocks, "held", full)
            with pytest.raises(Later):
                store.change(UNIT, keep_out)
        assert store.state(UNIT).quarantine == (BAD,)
        assert store.change(UNIT, lambda state: state) == State(pin="a", quarantine=(BAD,))


def test_many_change_it_at_once_and_no_change_is_lost(store: Store, tmp_path: Path) -> None:
    def work(other: Store, name: str) -> None:
        for number in range(20):
            other.change(UNIT, functools.partial(count, f"{name}{number}"))

    with opened(tmp_path) as other:
        threads = [
            threading.Thread(target=work, args=(one, name))
            for one, name in ((store, "a"), (store, "b"), (other, "c"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store.state(UNIT).counted) == 60


@pytest.mark.parametrize("what", ["change", "accept", "change without slots"])
def test_a_kill_at_any_moment_leaves_the_old_record_or_the_new_one(
    store: Store, tmp_path: Path, what: str
) -> None:
    first, second = stack(store, "a"), stack(store, "b")
    if what != "change without slots":
        store.accept(UNIT, first, ())
    old = store.state(UNIT)

    def act() -> None:
        with opened(tmp_path) as made:
            if what == "accept":
                made.accept(UNIT, second, (), keep_out)
            else:
                made.change(UNIT, keep_out)

    number, seen = 1, set()
    while killed_before(number, act):
        state = opened(tmp_path).state(UNIT)
        assert state == old or state.quarantine == (BAD,)
        if what == "accept":
            assert state.accepted.stack == (second if state.quarantine else first)
        seen.add(state.quarantine)
        if state != old:  # once more from the old one
            opened(tmp_path).accept(UNIT, first, ()) if what == "accept" else None
            opened(tmp_path).change(UNIT, lambda state: replace(state, quarantine=()))
            old = opened(tmp_path).state(UNIT)
        number += 1
    assert seen == {(), (BAD,)}
    assert not any(name.startswith(".tmp") for name in os.listdir(tmp_path / "stacks" / UNIT))


class TestDamaged:
    def damage(self, store: Store, content: str = "{") -> Path:
        path = Path(store.state_directory, "units", UNIT, ".state.json")
        path.write_text(content)
        return path

    def test_it_is_set_aside_said_once_and_made_anew(
        self, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = stack(store, "b", "a", "c")
        store.accept(UNIT, wanted, (), lambda state: replace(state, pin="x"))
        before = os.readlink(tmp_path / "units" / UNIT)
        path = self.damage(store, "{half")
        state = store.state(UNIT)
        assert state.accepted.stack.digests == wanted.digests  # the order is that of the identity
        assert [entry.slot for entry in state.accepted.entries] == ["b.raw", "a.raw", "c.raw"]
        assert os.readlink(tmp_path / "units" / UNIT) == before
        assert store.state(UNIT) == state == opened(tmp_path).state(UNIT)
        (aside,) = (tmp_path / "set-aside").iterdir()
        assert re.fullmatch(rf"{UNIT}\.state\.json\.damaged-\d{{8}}T\d{{6}}\.\d{{9}}Z", aside.name)
        assert aside.read_text() == "{half" and aside.stat().st_mode & 0o777 == 0o600
        assert aside.parent.stat().st_mode & 0o777 == 0o700
        assert path.read_text().startswith("{")
        output = "".join(capsys.readouterr())
        assert output.count("cannot be read") == 1 and "a pin" in output and aside.name in output

    def test_a_newer_one(self, store: Store, tmp_path: Path) -> None:
        store.accept(UNIT, stack(store, "a"), ())
        self.damage(store, '{"version": 2}')
        assert store.accepted(UNIT) == Stack(store.state(UNIT).accepted.stack.layers)
        assert [".newer-" in name for name in os.listdir(tmp_path / "set-aside")] == [True]

    def test_no_room_for_a_new_one(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digests = store.accept(UNIT, stack(store, "a"), ()).accepted.stack.digests
        self.damage(store)
        with monkeypatch.context() as patched:
            patched.setattr(record_files, "create", full)
            for _ in range(2):
                assert [layer.digest for layer in store.state(UNIT).accepted.stack.layers] == list(digests)
            with pytest.raises(Later):
                store.change(UNIT, lambda state: replace(state, pin="a"))
            assert store.state(UNIT).pin == "a"
        store.change(UNIT, lambda state: state)
        assert store.state(UNIT).pin == "a" and store.accepted(UNIT) is not None
        assert len(os.listdir(tmp_path / "set-aside")) == 1

    def test_a_directory_in_its_place(self, store: Store, tmp_path: Path) -> None:
        accepted = store.accept(UNIT, stack(store, "a"), ()).accepted.stack
        path = tmp_path / "units" / UNIT / ".state.json"
        path.unlink()
        path.mkdir()
        assert store.state(UNIT).accepted.stack.digests == accepted.digests
        assert path.is_file()
        (aside,) = (tmp_path / "set-aside").iterdir()
        assert aside.is_dir()

    def test_one_set_aside_that_leads_nowhere(self, store: Store, tmp_path: Path) -> None:
        accepted = store.accept(UNIT, stack(store, "a"), ()).accepted.stack
        path = tmp_path / "units" / UNIT / ".state.json"
        for _ in range(2):
            path.unlink()
            path.symlink_to("/nowhere")
            assert store.state(UNIT).accepted.stack.digests == accepted.digests
        assert len(list((tmp_path / "set-aside").iterdir())) == 2

    def test_a_directory_in_the_place_of_the_slots(self, store: Store, tmp_path: Path) -> None:
        """Nothing can be accepted for this unit then; others are not concerned."""
        (tmp_path / "units" / UNIT).mkdir()
        assert (store.state(UNIT), store.without_layers()) == (State(), ())
        with pytest.raises(Later):
            store.accept(UNIT, stack(store, "a"), ())
        assert store.accept("other.service", stack(store, "a"), ()).accepted.stack.layers

    def test_a_record_that_is_gone(self, store: Store, tmp_path: Path) -> None:
        store.accept(UNIT, stack(store, "a"), ())
        (tmp_path / "units" / UNIT / ".state.json").unlink()
        assert store.accepted(UNIT) is not None

    def test_slots_that_lead_nowhere(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "units" / UNIT).symlink_to(f"../stacks/{UNIT}/00000007-0123456789abcdef")
        assert store.state(UNIT) == State()
        assert store.accepted(UNIT) is None
        store.accept(UNIT, stack(store, "a"), ())
        assert store.accepted(UNIT) == stack(store, "a")

    def test_from_the_history(self, tmp_path: Path) -> None:
        asked = []
        events: list[Event] = []

        def history(slots: str) -> list[Event]:
            asked.append(slots)
            return events

        with opened(tmp_path, history) as store:
            good = stack(store, "a", "b")
            bad = Layer("c.raw", "c", "2", "c" * 64, Kind.IMAGE, "/srv/c_2.raw")
            applied = Event(
                "web.service", Outcome.APPLIED, "", 7, stack=good.id, layers=good.layers, swap_usec=3
            )
            refused = Event(
                "web.service", Outcome.REFUSED, "", 9, "0" * 16, good.id, digest=bad.digest, source=bad.source,
                reason="no", layers=(*good.layers, bad), verdict=Verdict.CHECK_FAILED,
            )  # fmt: skip
            events += [refused, applied]
            store.accept(UNIT, good, (Entry("a.raw", "/srv/a.raw.v", Kind.IMAGE),))
            self.damage(store)
            state = store.state(UNIT)
            assert (state.accepted.stack, state.accepted.when, state.trial) == (good, 7, None)
            assert state.quarantine == (Quarantine(bad.digest, "no", 9, bad.source),)
            assert asked == ["web.service"]

    def test_the_history_cannot_be_read(self, tmp_path: Path) -> None:
        def history(slots: str) -> list[Event]:
            raise LedgerError("no")

        with opened(tmp_path, history) as store:
            wanted = stack(store, "a")
            store.accept(UNIT, wanted, ())
            self.damage(store)
            assert store.state(UNIT).trial == Trial(wanted.id)

    def test_an_order_that_cannot_be_found(self, store: Store, tmp_path: Path) -> None:
        """Someone has changed the links: the stack gets another identity, and so another directory."""
        store.accept(UNIT, stack(store, "a", "b"), ())
        (tmp_path / "units" / UNIT / "b.raw").unlink()
        self.damage(store)
        assert store.accepted(UNIT) is not None
        assert os.listdir(tmp_path / "units" / UNIT / "..") is not None
        assert store.state(UNIT).accepted.stack.digests == stack(store, "a").digests
        assert len(os.listdir(tmp_path / "set-aside")) == 1

    def test_what_only_held_a_record(self, store: Store) -> None:
        store.change(UNIT, keep_out)
        self.damage(store)
        assert store.state(UNIT) == State(accepted=Accepted())
