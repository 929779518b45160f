# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit's slots go from one whole stack to the next, and history keeps what it should.

With images/record_files.py, images/unit_links.py and images/unit_locks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.images import program
from watcher.images.stacks import Stacks
from watcher.model import Entry, Kind, Layer, Stack
from watcher.records import durable
from watcher.records.state import Accepted, Damaged, Quarantine, State, Trial

UNIT = "web.service"


def layer(slot: str, version: str = "1") -> Layer:
    digest = f"{hash((slot, version)) & (1 << 256) - 1:064x}"
    return Layer(slot, slot.removesuffix(".raw"), version, digest, Kind.IMAGE, f"/srv/{slot}.v/{version}.raw")


def stack(version: str, *slots: str) -> Stack:
    return Stack(tuple(layer(slot, version) for slot in slots or ("a.raw", "b.raw")))


ENTRIES = (
    Entry("a.raw", "/srv/a.raw.v", Kind.IMAGE, declared=True, options="x"),
    Entry("b.raw", "/srv/b.raw.v", Kind.IMAGE, optional=True),
)


def current_of(stacks: Stacks) -> Accepted | None:
    state = stacks.read(UNIT)
    return state.accepted if state is not None else None


def names(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "stacks" / UNIT))


@pytest.fixture
def stacks(tmp_path: Path) -> Stacks:
    return Stacks(str(tmp_path))


def slots(tmp_path: Path, unit: str = UNIT) -> dict[str, str]:
    directory = tmp_path / "units" / unit
    links = [path for path in directory.iterdir() if path.is_symlink()]
    assert all(os.readlink(link).startswith("../../../store/") for link in links)
    return {link.name: os.path.basename(os.readlink(link)) for link in links}


def test_nothing_was_ever_accepted(stacks: Stacks) -> None:
    assert current_of(stacks) is None
    assert stacks.history(UNIT) == ()
    assert stacks.links.units() == ()


def test_what_was_accepted_is_read_back_in_order(stacks: Stacks) -> None:
    wanted = stack("1", "z.raw", "a.raw", "m")
    stacks.accept(UNIT, wanted, ENTRIES)
    current = current_of(stacks)
    assert current is not None
    assert (current.stack, current.entries) == (wanted, ENTRIES)
    assert stacks.links.units() == (UNIT,)


def test_each_layer_has_its_slot_in_the_store(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / layer("a.raw").digest).write_text("it")
    assert slots(tmp_path) == {"a.raw": layer("a.raw").digest, "b.raw": layer("b.raw").digest}
    assert (tmp_path / "units" / UNIT / "a.raw").read_text() == "it"


def test_the_slots_follow_as_one(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    stacks.accept(UNIT, stack("2", "b.raw", "c"), ENTRIES)
    assert set(slots(tmp_path)) == {"b.raw", "c"}


def test_the_empty_stack_is_not_the_same_as_none(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    stacks.accept(UNIT, Stack(), ())
    current = current_of(stacks)
    assert current is not None
    assert current.stack == Stack()
    assert slots(tmp_path) == {}


def test_the_same_again_writes_nothing(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    before = os.readlink(tmp_path / "units" / UNIT)
    stacks.accept(UNIT, stack("1"), ENTRIES)
    assert os.readlink(tmp_path / "units" / UNIT) == before
    stacks.accept(UNIT, stack("1"), ENTRIES[:1])
    assert os.readlink(tmp_path / "units" / UNIT) != before
    assert len(stacks.history(UNIT)) == 1


def test_history_is_newest_first_and_each_once(stacks: Stacks) -> None:
    for version in ("1", "2", "3", "2"):
        stacks.accept(UNIT, stack(version), ENTRIES)
    assert [accepted.stack for accepted in stacks.history(UNIT)] == [stack("2"), stack("3"), stack("1")]


def test_prune_keeps_the_last_ones_and_says_what_they_need(stacks: Stacks, tmp_path: Path) -> None:
    for version in ("1", "2", "3", "2", "4", "4"):
        stacks.accept(UNIT, stack(version), ENTRIES)
    stacks.accept("other.service", stack("9", "tree"), ENTRIES)
    used = stacks.prune(2)
    assert used == {*stack("4").digests, *stack("2").digests, *stack("9", "tree").digests}
    assert [accepted.stack for accepted in stacks.history(UNIT)] == [stack("4"), stack("2")]
    assert len(os.listdir(tmp_path / "stacks" / UNIT)) == 2


@pytest.mark.parametrize("keep", [0, 1])
def test_prune_never_takes_the_current_one(stacks: Stacks, keep: int) -> None:
    for version in ("1", "2"):
        stacks.accept(UNIT, stack(version), ENTRIES)
    stacks.prune(keep)
    current = current_of(stacks)
    assert current is not None
    assert current.stack == stack("2")
    assert stacks.prune(keep) == set(stack("2").digests)


def test_prune_removes_what_forget_left(stacks: Stacks, tmp_path: Path) -> None:
    (tmp_path / "stacks" / UNIT).mkdir()
    assert stacks.prune(3) == set()
    assert os.listdir(tmp_path / "stacks") == [".locks"]
    assert os.listdir(tmp_path / "stacks/.locks") == []


def test_a_stack_killed_half_way_is_cleared_away(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    left = tmp_path / "stacks" / UNIT / ".tmp-00000002-0123456789abcdef"
    left.mkdir()
    (left / "a.raw").symlink_to("x")
    (tmp_path / "stacks" / UNIT / ".tmp-link").symlink_to("x")
    assert stacks.links.units() == (UNIT,)
    stacks.accept(UNIT, stack("2"), ENTRIES)
    assert not left.exists()
    assert os.listdir(tmp_path / "units") == [UNIT]
    assert not any(name.startswith(".") for name in os.listdir(tmp_path / "stacks" / UNIT))


@pytest.mark.parametrize(
    "name", ["stack.json", "with space", "new\nline", os.fsdecode(b"caf\xe9.raw"), "a" * 255]
)
def test_odd_slots(stacks: Stacks, tmp_path: Path, name: str) -> None:
    wanted = stack("1", name)
    stacks.accept(UNIT, wanted, (Entry(name, f"/srv/{name}", Kind.DIRECTORY),))
    current = current_of(stacks)
    assert current is not None
    assert current.stack == wanted
    assert set(slots(tmp_path)) == {name}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/etc", "a\0b"])
def test_names_that_are_no_file_names(stacks: Stacks, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        stacks.accept(name, stack("1"), ENTRIES)
    with pytest.raises(ValueError, match="cannot be the name"):
        stacks.accept(UNIT, stack("1", name), ENTRIES)
    assert current_of(stacks) is None


def test_one_slot_for_two_layers(stacks: Stacks) -> None:
    with pytest.raises(ValueError, match="not unique"):
        stacks.accept(UNIT, stack("1", "a.raw", "a.raw"), ENTRIES)


def test_forgotten(stacks: Stacks, tmp_path: Path) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    stacks.forget(UNIT)
    accepted = current_of(stacks)
    assert accepted is not None and accepted.stack == stack("1")
    assert stacks.without_layers() == ()
    stacks.accept(UNIT, Stack(), ENTRIES)
    assert stacks.without_layers() == (UNIT,)
    stacks.forget(UNIT)
    assert current_of(stacks) is None
    assert os.listdir(tmp_path / "units") == os.listdir(tmp_path / "stacks/.locks") == []
    assert os.listdir(tmp_path / "stacks") == [".locks"]
    stacks.forget("never seen.service")
    stacks.accept(UNIT, stack("1"), ENTRIES)


class TestRecord:
    def test_it_is_replaced_where_it_lies(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        before = names(tmp_path)
        changed = stacks.change(UNIT, lambda state: replace(state, pin="a"))
        assert stacks.read(UNIT) == Stacks(str(tmp_path)).read(UNIT) == changed
        assert changed.pin == "a" and changed.accepted.stack == stack("1")
        assert names(tmp_path) == before

    def test_it_goes_with_its_stack(self, stacks: Stacks, tmp_path: Path) -> None:
        bad = (Quarantine("d", "bad", 1),)
        stacks.change(UNIT, lambda state: replace(state, quarantine=bad))
        state = stacks.accept(
            UNIT,
            stack("1"),
            ENTRIES,
            change=lambda state: replace(state, trial=Trial(state.accepted.stack.id)),
        )
        assert (state.quarantine, state.trial) == (bad, Trial(stack("1").id))
        assert Stacks(str(tmp_path)).read(UNIT) == state

    def test_the_same_stack_with_another_record(self, stacks: Stacks, tmp_path: Path) -> None:
        first = stacks.accept(UNIT, stack("1"), ENTRIES)
        before = names(tmp_path)
        second = stacks.accept(UNIT, stack("1"), ENTRIES, change=lambda state: replace(state, owed="x"))
        assert second == replace(first, owed="x") == stacks.read(UNIT)
        assert names(tmp_path) == before

    def test_what_changes_nothing_writes_nothing(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.change("other.service", lambda state: state)
        assert stacks.links.units() == ()
        assert os.listdir(tmp_path / "stacks") == [".locks"]
        assert os.listdir(tmp_path / "stacks/.locks") == []
        stacks.accept(UNIT, stack("1"), ENTRIES)
        path = tmp_path / "units" / UNIT / ".state.json"
        before = path.stat()
        stacks.change(UNIT, lambda state: replace(state, pin=None))
        assert path.stat() == before

    def test_it_needs_no_stack(self, stacks: Stacks, tmp_path: Path) -> None:
        state = stacks.change(UNIT, lambda state: replace(state, sysexts=("/srv/\udcff",)))
        assert state.accepted == Accepted() and stacks.read(UNIT) == state
        assert names(tmp_path) == ["00000001-empty"]
        assert stacks.history(UNIT) == ()
        # What only holds the record takes no stack's place among those that are kept.
        for version in ("1", "2"):
            assert stacks.accept(UNIT, stack(version), ENTRIES).sysexts == state.sysexts
        stacks.prune(2)
        assert [accepted.stack for accepted in stacks.history(UNIT)] == [stack("2"), stack("1")]
        assert len(names(tmp_path)) == 2

    def test_the_empty_stack_in_the_place_of_none(self, stacks: Stacks) -> None:
        stacks.change(UNIT, lambda state: replace(state, pin="a"))
        assert stacks.accept(UNIT, Stack(), ()).accepted.when
        assert len(stacks.history(UNIT)) == 1

    def test_a_record_left_by_one_that_was_killed(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        (tmp_path / "stacks" / UNIT / ".tmp-record").write_text("half")
        stacks.change(UNIT, lambda state: replace(state, pin="a"))
        assert not (tmp_path / "stacks" / UNIT / ".tmp-record").exists()

    @pytest.mark.parametrize("what", [{"quarantine": (Quarantine("d", "bad", 1),)}, {"pin": ""}])
    def test_what_was_decided_is_not_forgotten(self, stacks: Stacks, what: dict[str, Any]) -> None:
        stacks.change(UNIT, lambda state: replace(state, **what))
        stacks.forget(UNIT)
        assert stacks.read(UNIT) == State(**what)

    def test_another_process_has_changed_it(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        other = Stacks(str(tmp_path))
        for number in range(5):
            other.change(UNIT, lambda state, number=number: replace(state, owed=str(number)))  # type: ignore[misc]
            state = stacks.read(UNIT)
            assert state is not None and state.owed == str(number)


class TestDamaged:
    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 2}', '{"version": 1}'])
    def test_a_record_that_cannot_be_read(self, stacks: Stacks, tmp_path: Path, content: str) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        (tmp_path / "units" / UNIT / ".state.json").write_text(content)
        with pytest.raises(Damaged, match=r"web.service/.*/.state.json: "):
            stacks.read(UNIT)
        assert stacks.history(UNIT) == ()
        assert stacks.prune(3) == set(stack("1").digests)  # its slots are in use all the same

    def test_slots_that_lead_nowhere(self, stacks: Stacks, tmp_path: Path) -> None:
        (tmp_path / "units" / UNIT).symlink_to("../stacks/gone")
        with pytest.raises(Damaged):
            stacks.read(UNIT)

    def test_a_record_of_another_stack(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        path = tmp_path / "units" / UNIT / ".state.json"
        of_first = path.read_text()
        stacks.accept(UNIT, stack("2"), ENTRIES)
        path.write_text(of_first)
        with pytest.raises(Damaged, match="another stack"):
            stacks.read(UNIT)

    def test_extra_keys_of_a_later_version_are_no_surprise(self, stacks: Stacks, tmp_path: Path) -> None:
        stacks.accept(UNIT, stack("1"), ENTRIES)
        path = tmp_path / "units" / UNIT / ".state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
        assert current_of(stacks) is not None


def accept_many(state: str, first: str) -> None:
    stacks = Stacks(state)
    for number in range(100):
        stacks.accept(UNIT, stack(f"{first}{number}", *(f"{n}.raw" for n in range(5))), ENTRIES)


def test_a_start_at_any_moment_sees_one_whole_stack(stacks: Stacks, tmp_path: Path) -> None:
    """Two processes accept as fast as they can, one is killed; what a start would see is never a mix."""
    stacks.accept(UNIT, stack("0", *(f"{n}.raw" for n in range(5))), ENTRIES)
    writers = [
        subprocess.Popen(program("images.test_stacks", "accept_many", tmp_path, first)) for first in "ab"
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        # One lookup of the unit, as systemd does for each slot, cannot be held still; the directory it leads to can.
        fd = os.open(tmp_path / "units" / UNIT, os.O_RDONLY | os.O_DIRECTORY)
        links = {os.path.basename(os.readlink(name, dir_fd=fd)) for name in os.listdir(fd) if name[0] != "."}
        with open(os.open(".state.json", os.O_RDONLY, dir_fd=fd)) as record:
            digests = {entry["digest"] for entry in json.load(record)["accepted"]["stack"]["layers"]}
        os.close(fd)
        assert links == digests
        assert len(links) == 5
        seen += 1
        if seen == 50:
            writers[0].kill()
    assert writers[1].returncode == 0
    assert seen > 50
    stacks.prune(3)
    assert len(stacks.history(UNIT)) == 3


def test_forgetting_and_accepting_at_once_never_fails(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(job: str) -> None:
        stacks = Stacks(str(tmp_path))
        try:
            for number in range(60):
                if job == "forget":
                    stacks.accept(UNIT, Stack(), ENTRIES)
                    stacks.forget(UNIT)
                elif job == "prune":
                    stacks.prune(1)
                else:
                    stacks.accept(UNIT, stack(f"{job}{number}"), ENTRIES)
        except BaseException as error:  # noqa: BLE001 # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in ("a", "b", "forget", "prune")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_record_without_where_its_layers_were_mounted_is_one_too(stacks: Stacks, tmp_path: Path) -> None:
    places = {"/srv/a.raw.v/1.raw": "/srv"}
    stacks.accept(UNIT, stack("1"), ENTRIES)
    stacks.accept(UNIT, stack("1"), ENTRIES, places)
    before = os.readlink(tmp_path / "units" / UNIT)
    stacks.accept(UNIT, stack("1"), ENTRIES, places)
    assert os.readlink(tmp_path / "units" / UNIT) == before
    path = tmp_path / "units" / UNIT / ".state.json"
    record = json.loads(path.read_text())
    assert record["accepted"].pop("mounted") == places
    path.write_text(json.dumps(record))
    current = current_of(stacks)
    assert current is not None
    assert (current.stack, current.mounted) == (stack("1"), {})


def test_links_of_many_units_are_brought_to_the_disk_at_once(
    stacks: Stacks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the power cuts of scenarios/test_power_cut.py need of it, and no more."""
    synced: list[str] = []
    fsync = durable.fsync
    monkeypatch.setattr(durable, "fsync", lambda *paths: (synced.extend(paths), fsync(*paths))[1])
    units, links = str(tmp_path / "units"), stacks.links
    links.settle()
    assert synced.count(units) == 1, "what a process has left that was killed"
    for unit in ("a.service", "b.service"):
        stacks.accept(unit, stack("1"), ENTRIES)
    assert synced.count(units) == 1
    links.settle()
    links.settle()
    stacks.change("a.service", lambda state: replace(state, owed="x"))
    assert synced.count(units) == 2
    stacks.accept("a.service", stack("2"), ENTRIES)
    stacks.change("a.service", lambda state: replace(state, owed="y"))
    assert synced.count(units) == 3, "a changed record is where the link leads"


def test_a_link_that_moves_while_others_are_brought_to_the_disk(
    stacks: Stacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks.accept(UNIT, stack("1"), ENTRIES)
    fsync, synced = durable.fsync, list[str]()

    def meanwhile(*paths: str) -> None:
        fsync(*paths)
        monkeypatch.setattr(durable, "fsync", lambda *paths: synced.extend(paths))
        stacks.accept(UNIT, stack("2"), ENTRIES)

    monkeypatch.setattr(durable, "fsync", meanwhile)
    stacks.links.settle()
    synced.clear()
    stacks.links.settle()
    assert synced == [stacks.links.directory]
