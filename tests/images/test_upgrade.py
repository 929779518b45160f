# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing that the last version without records had decided is lost, whenever the upgrade is killed.

`version_1.tar.gz` was made by that version: see support/version_1.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import powercut
from support.killing import killed_before
from support.needs import tool
from support.version_1 import INVOCATION, ODD
from watcher.images.stacks import Stacks
from watcher.images.store import Store
from watcher.images.upgrade import upgrade
from watcher.model import Entry, Kind, Later, Layer, Stack, Verdict, stack_id
from watcher.records import database
from watcher.records.ledger import NAME, Ledger, Reader
from watcher.records.state import Quarantine, State, Trial, Undoing

MADE = Path(__file__).parent / "version_1.tar.gz"


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def layer(content: str, slot: str = "web.raw") -> Layer:
    name = slot.removesuffix(".raw")
    return Layer(slot, name, content, digest(content), Kind.IMAGE, f"/srv/{slot}.v/{name}_{content}.raw")


def bad(service: str, what: str, source: str = "") -> Quarantine:
    return Quarantine(what, f"bad for {service}", 5, source)


BACK = layer("2")
# By the names of slots: the layers, and all that was decided beside them.
EXPECTED: dict[str, tuple[tuple[Layer, ...], State]] = {
    "web.service": (
        (layer("base", ODD), layer("3")),
        State(
            trial=Trial(stack_id([digest("base"), digest("3")])),
            owed=INVOCATION,
            quarantine=(
                bad("web.service", "b" * 64, "/srv/web.raw.v/web_4.raw"),
                bad("web.service", "stack:0123456789abcdef"),
            ),
            sysexts=(f"/srv/{ODD}", "/srv/tools.v"),
        ),
    ),
    "down.service": (
        (layer("1"),),
        State(
            trial=Trial(stack_id([digest("1")]), was_down=True),
            counted={digest("5")[:16]: 2, "c" * 16: 1},
        ),
    ),
    "rolling.service": (
        (layer("1"),),
        State(trial=Trial(stack_id([digest("1")]), verdict=Verdict.RELOAD_FAILED)),
    ),
    "empty.service": ((), State(trial=Trial(""))),
    "back.service": (
        (layer("1"),),
        State(
            trial=Trial(stack_id([digest("2")])),
            owed=INVOCATION,
            undoing=Undoing(Stack((BACK,)), Verdict.RELOAD_FAILED, "bad for back.service"),
            quarantine=(bad("back.service", BACK.digest, BACK.source),),
        ),
    ),
    "job.exec": (
        (layer("2", ODD),),
        State(
            owed="7-1234",
            quarantine=(bad("job", "d" * 64),),
            pin=stack_id([digest("1")]),
            counted={digest("1")[:16]: 1},
        ),
    ),
    "twin.service": ((layer("1"),), State(quarantine=(bad("twin.service", "e" * 64),))),
    "twin.service.exec": ((layer("2"),), State(quarantine=(bad("twin.service", "e" * 64),))),
    "odd.exec.exec": ((layer("1"),), State(trial=Trial(digest("1")))),
    "new.exec": ((), State(quarantine=(bad("new", "f" * 64),))),
    "later.service": ((), State(quarantine=(bad("later.service", "f" * 64),), pin="")),
    "tools.service": ((), State(sysexts=("/srv/tools",))),
}
WITHOUT_STACK = ("new.exec", "later.service", "tools.service")


@pytest.fixture
def base() -> Iterator[Path]:
    """In memory where that can be had: the test unpacks many."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def unpacked(base: Path) -> tuple[str, str]:
    base.mkdir(exist_ok=True)
    with tarfile.open(MADE) as tar:
        tar.extractall(base, filter="fully_trusted")
    return str(base / "state"), str(base / "run")


def check(state_directory: str, runtime_directory: str, units: Collection[str] = EXPECTED.keys()) -> None:
    """All is where it belongs, and nothing old is left."""
    with Store(state_directory, 1 << 30, 1 << 30, 3) as store:
        found = dict(store.states())
        assert found.keys() == set(units)
        for unit in units:
            layers, decided = EXPECTED[unit]
            state = found[unit]
            without = State(**{**fields(state), "accepted": State().accepted})
            assert without == decided, unit
            assert state.accepted.stack.layers == layers
            assert bool(state.accepted.when) == (unit not in WITHOUT_STACK)
            assert [entry.slot for entry in state.accepted.entries] == [one.slot for one in layers]
        if "web.service" in units:
            web = store.stacks("web.service")
            assert [stack.layers[-1].version for stack in web] == ["3", "2", "1"]
            assert found["web.service"].accepted.entries[0] == Entry(
                ODD, f"/srv/{ODD}.v", Kind.IMAGE, optional=True
            )
    left = {str(path.relative_to(state_directory)) for path in Path(state_directory).rglob("*")}
    assert not [name for name in left if re.search(r"trials|counted|sysexts|\.stack\.json", name)]
    assert not os.path.lexists(f"{runtime_directory}/pending")
    with contextlib.closing(database.open_to_write(Path(state_directory, NAME))) as db:
        assert database.decisions(db) == ([], {})
    events = Reader(state_directory).history()
    assert [event.service for event in events] == ["web.service"] * 3
    assert [event.verdict for event in events] == [None] * 3


def fields(state: State) -> dict[str, object]:
    return {name: getattr(state, name) for name in (one.name for one in dataclasses.fields(State))}


def test_nothing_is_lost(base: Path) -> None:
    state, run = unpacked(base)
    before = {path.name: path.read_bytes() for path in Path(state, "store").iterdir()}
    (remark,) = upgrade(state, run)
    assert (remark.level, remark.path) == ("info", state) and str(len(EXPECTED)) in remark.text
    check(state, run)
    assert {path.name: path.read_bytes() for path in Path(state, "store").iterdir()} == before
    assert upgrade(state, run) == []
    check(state, run)
    assert not (Path(state) / "set-aside").exists()
    assert not (Path(state) / "stacks/.locks/.upgrade").exists()


def test_two_at_once(base: Path) -> None:
    """The daemon and `exec`."""
    state, run = unpacked(base)
    with ThreadPoolExecutor(4) as pool:
        remarks = list(pool.map(lambda _: upgrade(state, run), range(4)))
    assert sorted(map(len, remarks)) == [0, 0, 0, 1]
    check(state, run)


def test_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert upgrade(str(tmp_path / "state"), str(tmp_path / "run")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.limit(600)
def test_it_is_killed_at_any_moment(base: Path) -> None:
    for number in itertools.count(1):
        state, run = unpacked(base / str(number))
        killed = killed_before(number, lambda state=state, run=run: upgrade(state, run))
        if not killed:
            break
        # Once more, killed a little later; then to its end.
        killed_before(3 * number, lambda state=state, run=run: upgrade(state, run))
        upgrade(state, run)
        check(state, run)
        shutil.rmtree(base / str(number))
    assert number > 300


UNITS = ("later.service", "down.service")
PROGRAM = """
import os, re, sqlite3, sys, tarfile
sys.path[:0] = {path!r}
from watcher.images.upgrade import upgrade
from watcher.records import durable
from watcher.records.ledger import Ledger
made, state, run, *units = sys.argv[1:]
with tarfile.open(made) as tar:
    for member in tar:
        name = re.sub("^state/?", "", member.name)
        parts = name.split("/")
        of_units = parts[0] in ("stacks", "units", "trials", "counted", "sysexts") and len(parts) > 1
        if not member.name.startswith("state/") or (of_units and parts[1] not in units):
            continue
        if member.isdir():
            os.mkdir(state + "/" + name, member.mode)
        elif member.issym():
            os.symlink(member.linkname, state + "/" + name)
        else:
            fd = os.open(state + "/" + name, os.O_WRONLY | os.O_CREAT, member.mode)
            os.write(fd, tar.extractfile(member).read())
            os.close(fd)
db = sqlite3.connect(state + "/ledger.sqlite")
marks = ", ".join("?" * len(units))
db.execute("DELETE FROM quarantine WHERE service NOT IN (" + marks + ")", units)
db.execute("DELETE FROM pins WHERE service NOT IN (" + marks + ")", units)
db.commit()
db.close()
Ledger(state).close()  # a power cut while SQLite converts it is for SQLite
fd = os.open(state, os.O_RDONLY)
durable.fsync_tree(fd, 1)
os.write(1, b"unpacked")
upgrade(state, run)
os.write(1, b"done")
"""


@tool("strace")
def test_the_power_is_cut_at_any_moment(base: Path, tmp_path: Path) -> None:
    state, run = base / "state", base / "run"
    state.mkdir()
    run.mkdir()
    seen = set()
    arguments = [MADE, state, run, *UNITS]
    for disk in powercut.replayed(PROGRAM.format(path=sys.path), arguments, state, tmp_path / "trace"):
        if not disk.marks:
            continue
        for chosen, data in disk.cuts():
            entries = disk.after(chosen, data)
            if repr(entries) not in seen:
                seen.add(repr(entries))
                cut = base / str(len(seen))
                powercut.make(entries, cut)
                upgrade(str(cut), str(run))
                check(str(cut), str(run), UNITS)
                shutil.rmtree(cut)
    assert disk.marks == ["unpacked", "done"]
    print(f"{len(seen)} states of the disk")


def test_a_daemon_of_the_older_version_runs(base: Path) -> None:
    state, run = unpacked(base)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, f"{run}/lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        with pytest.raises(Later, match=r"^the running daemon is of an older version: restart it first$"):
            upgrade(state, run)
        assert os.path.lexists(f"{state}/trials/web.service")
        daemon.communicate()
    upgrade(state, run)
    os.unlink(f"{run}/lock")
    check(state, run)


def test_the_daemon_itself_has_the_lock(base: Path) -> None:
    state, run = unpacked(base)
    with open(f"{run}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        upgrade(state, run)
    os.unlink(f"{run}/lock")
    check(state, run)


@pytest.mark.parametrize("form", ["half", "gone", "another stack's", "no directory"])
def test_a_damaged_record_is_made_anew_with_what_was_decided(base: Path, form: str) -> None:
    state, run = unpacked(base)
    link = Path(state, "units/web.service")
    if form == "half":
        (link / ".stack.json").write_text("{")
    elif form == "gone":
        (link / ".stack.json").unlink()
    elif form == "no directory":
        shutil.rmtree(link.resolve())
    else:
        other = sorted(link.resolve().parent.iterdir())[0]
        (link / ".stack.json").write_text((other / ".stack.json").read_text())
    remarks = upgrade(state, run)
    assert [remark.level for remark in remarks] == ["warning", "info"]
    if form != "no directory":
        check(state, run)
    found = Stacks(state).read("web.service")
    assert found is not None and found.quarantine == EXPECTED["web.service"][1].quarantine
    assert found.owed == INVOCATION
    aside = Path(state, "set-aside")
    assert aside.is_dir() == (form not in ("gone", "no directory")) or not list(aside.iterdir())


def test_a_broken_ledger_costs_what_it_knew(base: Path) -> None:
    state, run = unpacked(base)
    Path(state, NAME).write_bytes(b"\xff" * 9000)
    remarks = upgrade(state, run)
    assert [remark.level for remark in remarks] == ["warning", "info"] and "quarantine" in remarks[0].text
    assert Stacks(state).read("job.exec") is not None
    with Ledger(state) as ledger:
        assert len(ledger.remarks) == 1


def test_a_ledger_that_was_converted_before(base: Path) -> None:
    state, run = unpacked(base)
    Ledger(state).close()
    upgrade(state, run)
    check(state, run)


def test_the_disk_is_full(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, run = unpacked(base)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", state)

    with monkeypatch.context() as patched:
        patched.setattr("watcher.images.record_files.create", full)
        with pytest.raises(Later, match="No space left on device"):
            upgrade(state, run)
    upgrade(state, run)
    check(state, run)
