# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ledger, and its file (records/database.py): what a kill, a full disk or damage leaves of it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import CHECKOUT
from support.killing import killed_before
from support.needs import root, tool, userns
from watcher.model import Event, Kind, Layer, Outcome, Verdict
from watcher.records import database
from watcher.records.ledger import NAME, OUTPUT_MAX, OUTPUTS_KEPT, Ledger, LedgerError, Reader
from watcher.records.schema import Quarantined

NGINX = "nginx.service"
SSHD = "sshd.service"


def event(number: int, service: str = NGINX, output: str = "") -> Event:
    return Event(service, Outcome.APPLIED, f"message {number}", when=number, output=output)


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(str(tmp_path)) as made:
        yield made


# History


def test_an_event_comes_back_as_it_was(ledger: Ledger, tmp_path: Path) -> None:
    layer = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw")
    told = Event(
        service=NGINX,
        outcome=Outcome.ROLLED_BACK,
        message="nginx.service: web 1.5 rolled back",
        when=1_700_000_000_000_000,
        stack="0123456789abcdef",
        previous="fedcba9876543210",
        image="web_1.5.raw",
        version="1.5",
        digest="b" * 64,
        source="/srv/web_1.5.raw",
        reason="reload failed",
        output="line 1\nline 2\n",
        swap_usec=400,
        total_usec=14_000,
        layers=(layer,),
        verdict=Verdict.RELOAD_FAILED,
    )
    ledger.append(told)
    assert ledger.history() == [told]
    assert Reader(str(tmp_path)).history() == [told]
    ledger.append(event(1))
    assert ledger.history(limit=1)[0].verdict is None


def test_history_is_newest_first_by_service_and_limited(ledger: Ledger) -> None:
    ledger.append(event(1), event(2, SSHD), event(3), event(4))
    assert messages(ledger.history()) == ["message 4", "message 3", "message 2", "message 1"]
    assert messages(ledger.history(NGINX, limit=2)) == ["message 4", "message 3"]
    assert ledger.history("absent.service") == []
    assert ledger.history(limit=-1) == []


def test_the_newest_outcome_of_each_service_is_one_question(ledger: Ledger) -> None:
    ledger.append(
        event(1), event(2, SSHD), dataclasses.replace(event(3), output="x" * 1000, reason="because")
    )
    newest = ledger.newest()
    assert {name: found.when for name, found in newest.items()} == {NGINX: 3, SSHD: 2}
    assert (newest[NGINX].output, newest[NGINX].reason) == ("", "because")


def test_history_is_pruned_to_its_maximum(tmp_path: Path) -> None:
    with Ledger(str(tmp_path), history_max=5) as ledger:
        for number in range(12):
            ledger.append(event(number))
        assert [found.when for found in ledger.history()] == [11, 10, 9, 8, 7]


def test_outputs_are_cut_and_only_the_newest_are_kept(ledger: Ledger) -> None:
    ledger.append(*(event(number, output="x" * (OUTPUT_MAX + 1)) for number in range(OUTPUTS_KEPT + 3)))
    kept = [found.when for found in ledger.history(limit=1000) if found.output]
    assert kept == list(range(OUTPUTS_KEPT + 2, 2, -1))
    assert len(ledger.history(limit=1)[0].output) == OUTPUT_MAX


def test_names_that_are_not_utf8_are_recorded(ledger: Ledger) -> None:
    ledger.append(Event(NGINX, Outcome.REFUSED, "no", when=1, source=os.fsdecode(b"/srv/\xff.raw")))
    assert ledger.history()[0].source == "/srv/\\xff.raw"


def test_what_a_round_records_is_one_commit(ledger: Ledger) -> None:
    seen: list[str] = []
    assert ledger._db is not None
    ledger._db.set_trace_callback(seen.append)
    ledger.append(event(1), event(2))
    assert seen.count("COMMIT") == 1
    seen.clear()
    ledger.append()
    assert seen == []


def test_many_threads_may_record_at_once(ledger: Ledger) -> None:
    def record(service: str) -> None:
        for number in range(20):
            ledger.append(event(number, service))

    threads = [threading.Thread(target=record, args=(f"{name}.service",)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "abcd":
        assert len(ledger.history(f"{name}.service")) == 20


def test_exec_may_add_to_the_history_beside_the_daemon(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(event(1))
    with Ledger(str(tmp_path)) as beside:
        beside.append(event(2))
    ledger.append(event(3))
    assert messages(ledger.history()) == ["message 3", "message 2", "message 1"]


# A file of version 1

VERSION_1 = """
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    service TEXT NOT NULL, outcome TEXT NOT NULL, message TEXT NOT NULL, "when" INTEGER NOT NULL,
    stack TEXT NOT NULL, previous TEXT NOT NULL, image TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    source TEXT NOT NULL, reason TEXT NOT NULL, output TEXT NOT NULL,
    swap_usec INTEGER, total_usec INTEGER, layers TEXT NOT NULL
);
CREATE INDEX history_service ON history (service, id);
CREATE INDEX history_output ON history (id) WHERE output <> '';
CREATE TABLE quarantine (
    service TEXT NOT NULL, digest TEXT NOT NULL, reason TEXT NOT NULL, "when" INTEGER NOT NULL, source TEXT NOT NULL,
    PRIMARY KEY (service, digest)
) WITHOUT ROWID;
CREATE TABLE pins (service TEXT PRIMARY KEY, stack TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO history VALUES
    (1, 'nginx.service', 'applied', 'message 1', 1, '', '', '', '', '', '', '', '', NULL, NULL, '[]');
INSERT INTO quarantine VALUES ('nginx.service', 'd', 'no', 5, '/srv/web_2.raw');
INSERT INTO pins VALUES ('nginx.service', '0123456789abcdef');
PRAGMA application_id = 0x43464558;
PRAGMA user_version = 1;
"""
DECISIONS = ([Quarantined(NGINX, "d", "no", 5, "/srv/web_2.raw")], {NGINX: "0123456789abcdef"})


def version_1(directory: Path) -> Path:
    path = directory / NAME
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    path.chmod(0o600)
    return path


def test_a_reader_of_version_1_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = version_1(tmp_path)
    before = path.read_bytes()
    reader = Reader(str(tmp_path))
    assert reader.history() == [event(1)] and list(reader.newest()) == [NGINX]
    assert path.read_bytes() == before


def test_a_ledger_of_version_1_goes_on_and_what_decides_is_not_lost(tmp_path: Path) -> None:
    path = version_1(tmp_path)
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(dataclasses.replace(event(2), verdict=Verdict.GOOD))
        assert messages(ledger.history()) == ["message 2", "message 1"]
        assert ledger.remarks == []
    with contextlib.closing(database.open_to_write(path)) as db:
        assert database.decisions(db) == DECISIONS
        database.drop_decisions(db)
        assert database.decisions(db) == ([], {})
        database.drop_decisions(db)
    assert messages(Reader(str(tmp_path)).history()) == ["message 2", "message 1"]


def test_the_conversion_is_killed_at_any_moment(tmp_path: Path) -> None:
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = version_1(directory)
        killed = killed_before(number, lambda directory=directory: Ledger(str(directory)).close())
        assert Reader(str(directory)).history() == [event(1)]
        with contextlib.closing(database.open_to_write(path)) as db:
            assert database.decisions(db) == DECISIONS
        if not killed:
            break
    assert number > 5


# A file that will not do


def set_aside_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(f"{NAME}."))


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_corrupt_ledger_is_set_aside_with_one_remark(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with Ledger(str(tmp_path)) as ledger:
        (aside,) = set_aside_in(tmp_path)
        assert aside.startswith(f"{NAME}.corrupt-")
        assert (tmp_path / aside).read_bytes() == content
        (remark,) = ledger.remarks
        assert remark.level == "warning"
        assert str(tmp_path / NAME) in remark.text and aside in remark.text
        ledger.append(event(1))
        assert len(ledger.history()) == 1


def test_damage_in_the_middle_is_found_at_the_start(tmp_path: Path) -> None:
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(*(event(number, output="x" * 4000) for number in range(50)))
    size = (tmp_path / NAME).stat().st_size
    with (tmp_path / NAME).open("r+b") as file:
        file.seek(size // 2 // 4096 * 4096)
        file.write(os.urandom(4096))
    with Ledger(str(tmp_path)) as ledger:
        assert "corrupt" in ledger.remarks[0].text


def test_the_journal_of_a_ledger_is_set_aside_with_it(tmp_path: Path) -> None:
    killed_in_commit(tmp_path)
    journal = (tmp_path / f"{NAME}-journal").read_bytes()
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/nowhere/at/all")
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(event(7))
    (aside,) = tmp_path.glob(f"{NAME}.*-journal")
    assert aside.read_bytes() == journal
    assert messages(Reader(str(tmp_path)).history()) == ["message 7"]


def test_a_ledger_of_a_newer_version_is_set_aside_untouched(tmp_path: Path) -> None:
    Ledger(str(tmp_path)).close()
    with sqlite3.connect(tmp_path / NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match="newer confext-watcher"):
        Reader(str(tmp_path)).history()
    with Ledger(str(tmp_path)) as ledger:
        (aside,) = set_aside_in(tmp_path)
        assert aside.startswith(f"{NAME}.newer-")
        assert "schema 99" in ledger.remarks[0].text
        assert ledger.history() == []


def test_a_database_of_something_else_is_set_aside(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / NAME)
    db.execute("CREATE TABLE history (moment)")
    db.close()
    with Ledger(str(tmp_path)) as ledger:
        assert "something else" in ledger.remarks[0].text
        ledger.append(event(1))


def test_a_directory_in_its_place_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with Ledger(str(tmp_path)) as ledger:
        assert set_aside_in(tmp_path)[0].startswith(f"{NAME}.unreadable-")
        ledger.append(event(1))


def test_a_fifo_or_a_dangling_link_in_its_place_does_not_stop_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(event(1))
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/nowhere/at/all")
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(event(1))


def test_a_file_in_order_is_never_set_aside(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(event(1))
    ledger.close()
    with Ledger(str(tmp_path)) as again:
        assert again.remarks == []
        assert set_aside_in(tmp_path) == []


def test_corruption_found_while_running_costs_the_history(tmp_path: Path) -> None:
    with Ledger(str(tmp_path)) as ledger:
        ledger.append(event(0))
        size = (tmp_path / NAME).stat().st_size
        with (tmp_path / NAME).open("r+b") as file:
            file.write(os.urandom(size))
        # SQLite keeps what it has read until the file's change counter differs, as it does now.
        ledger.append(event(1))
        assert len(ledger.remarks) == 1
        assert messages(Reader(str(tmp_path)).history()) == ["message 1"]


def test_a_ledger_deleted_while_running_is_begun_anew(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(event(0))
    (tmp_path / NAME).unlink()
    ledger.append(event(1))
    assert messages(Reader(str(tmp_path)).history()) == ["message 1"]


def test_without_its_directory_it_says_so_and_recovers(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    ledger = Ledger(str(directory))
    assert "cannot be opened" in ledger.remarks[0].text
    with pytest.raises(LedgerError, match=re.escape(str(directory / NAME))):
        ledger.append(event(0))
    directory.mkdir()
    ledger.append(event(1))
    assert Reader(str(directory)).history() == [event(1)]
    ledger.close()


# Reading without the daemon


def test_a_reader_of_no_ledger_finds_nothing_and_makes_nothing(tmp_path: Path) -> None:
    reader = Reader(str(tmp_path))
    assert reader.history() == []
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_may_read(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(event(1))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {NAME: 0o600, f"{NAME}-journal": 0o600}


def test_a_reader_of_a_broken_ledger_says_so_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"rubbish" * 1000)
    with pytest.raises(LedgerError, match=re.escape(str(tmp_path / NAME))):
        Reader(str(tmp_path)).history()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def run_python(code: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, behind `command`."""
    return subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )


AS_NOBODY = """
    import os
    from watcher.records.ledger import Reader
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    print([event.message for event in Reader({directory!r}).history()])
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


READ_LOCK = """
import os, sqlite3, sys
os.setresgid({group}, {group}, {group})
os.setresuid(65534, 65534, 65534)
try:
    db = sqlite3.connect("file:{path}?mode=ro", uri=True)
    db.execute("BEGIN")
    print(db.execute("SELECT count(*) FROM history").fetchone(), flush=True)
except sqlite3.Error as error:
    print(error, flush=True)
sys.stdin.read()
"""


@root
def test_nobody_else_can_hold_a_read_lock_which_no_commit_gets_past(open_directory: Path) -> None:
    """Whoever is in the file's group, also where a version before made the file."""
    with Ledger(str(open_directory)) as ledger:
        ledger.append(event(1))
    path = open_directory / NAME
    os.chown(path, 0, 65533)
    path.chmod(0o640)
    with Ledger(str(open_directory)) as ledger:
        code = READ_LOCK.format(group=65533, path=path)
        words = [sys.executable, "-c", code]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            said = reader.stdout.readline()
            ledger.append(event(2))
            reader.communicate()
        assert said == "unable to open database file\n"
        assert messages(ledger.history()) == ["message 2", "message 1"]


@root
def test_reading_needs_no_write_permission_whether_or_not_the_daemon_runs(open_directory: Path) -> None:
    code = AS_NOBODY.format(directory=str(open_directory))
    with Ledger(str(open_directory)) as ledger:
        ledger.append(event(1))
        refused = run_python(code)
        assert "only root may read it: use sudo" in refused.stderr
        (open_directory / NAME).chmod(0o644)
        (open_directory / f"{NAME}-journal").chmod(0o644)
        assert run_python(code).stdout == "['message 1']\n"
    assert run_python(code).stdout == "['message 1']\n"


@root
def test_reading_needs_no_write_permission_after_a_kill_in_the_middle(open_directory: Path) -> None:
    killed_in_commit(open_directory)
    for name in (NAME, f"{NAME}-journal"):
        (open_directory / name).chmod(0o644)
    before = {path.name: path.read_bytes() for path in open_directory.iterdir()}
    done = run_python(AS_NOBODY.format(directory=str(open_directory)))
    assert (done.stdout, done.stderr) == ("['message 1']\n", "")
    assert {path.name: path.read_bytes() for path in open_directory.iterdir()} == before


def killed_in_commit(directory: Path) -> None:
    """Leaves a ledger whose writer died with the database half written: as a kill there does, copied from there."""
    with Ledger(str(directory)) as ledger:
        ledger.append(event(1))
        ledger.close()
    db = sqlite3.connect(directory / NAME, isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("PRAGMA cache_spill = 1")
    db.execute("BEGIN IMMEDIATE")
    # More than the cache holds: SQLite must write pages before the commit.
    db.execute("UPDATE history SET message = 'never'")
    db.execute("UPDATE history SET output = ?", ("x" * 100_000,))
    taken = {path: path.read_bytes() for path in directory.iterdir()}
    db.close()
    for path, content in taken.items():
        path.write_bytes(content)


def test_a_daemon_plays_back_what_a_kill_left(tmp_path: Path) -> None:
    killed_in_commit(tmp_path)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        sqlite3.connect(f"file:{tmp_path / NAME}?mode=ro", uri=True).execute("SELECT * FROM history")
    with Ledger(str(tmp_path)) as ledger:
        assert messages(ledger.history()) == ["message 1"]
        assert ledger.remarks == []


# Kills and full disks


WRITER = """
    import os, sys
    from watcher.records.ledger import Ledger, LedgerError
    from watcher.model import Event, Outcome
    ledger = Ledger({directory!r}, history_max=1)
    os.write(1, b"begin\\n")
    for number in range(2):
        try:
            ledger.append(Event("a.service", Outcome.APPLIED, str(number), when=number, output="x" * 9000))
        except LedgerError as error:
            os.write(2, f"{{error}}\\n".encode())
        else:
            os.write(1, f"{{number}}\\n".encode())
    ledger.close()
"""
CHANGING = ("pwrite64", "fdatasync", "fsync", "ftruncate", "unlink", "rename")


def changing_calls(directory: Path, trace: Path) -> list[tuple[str, int]]:
    """The calls that change a file, in one run of WRITER: each with its number among those of its name."""
    strace = ["strace", "-f", "--seccomp-bpf", "-o", str(trace), "-e", ",".join(CHANGING)]
    done = run_python(WRITER.format(directory=str(directory)), *strace)
    assert done.stdout == "begin\n0\n1\n", done.stderr
    names = re.findall(rf"\b({'|'.join(CHANGING)})\(", trace.read_text())
    return [
        (name, number) for name, count in collections.Counter(names).items() for number in range(1, count + 1)
    ]


def every_fault(tmp_path: Path, fault: str) -> Iterator[tuple[Path, str, subprocess.CompletedProcess[str]]]:
    (tmp_path / "whole").mkdir()
    calls = changing_calls(tmp_path / "whole", tmp_path / "trace")
    assert len(calls) > 10
    assert ("fdatasync", 1) in calls, "a commit must be on the disk"

    def run(call: tuple[str, int]) -> tuple[Path, str, subprocess.CompletedProcess[str]]:
        name, number = call
        directory = tmp_path / f"{name}-{number}"
        directory.mkdir()
        inject = f"inject={name}:{fault}:when={number}"
        strace = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={name}", "-e", inject]
        return directory, inject, run_python(WRITER.format(directory=str(directory)), *strace)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(run, calls)


def write_twice(directory: Path) -> None:
    """Two rounds; the numbers of those that are committed are in the file `said`. The history has one event."""
    said = os.open(directory / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Ledger(str(directory), history_max=1) as ledger:
        for number in range(2):
            ledger.append(event(number, output="x" * 9000))
            os.write(said, str(number).encode())


def test_a_kill_at_any_write_leaves_it_whole_and_keeps_what_was_committed(tmp_path: Path) -> None:
    seen = []
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        killed = killed_before(number, lambda directory=directory: write_twice(directory))
        if not killed:
            break
        said = directory / "said"
        committed = [int(digit) for digit in said.read_text()] if said.exists() else []
        seen.append(len(committed))
        for reading in (Reader(str(directory)), Ledger(str(directory))):
            history = [entry.when for entry in reading.history()]
            # The event that was being written is there, or not: then the one before is.
            assert history in (committed[-1:], [len(committed)]), number
            if isinstance(reading, Ledger):
                assert reading.remarks == [], number
                reading.append(event(9))
                assert reading.history(limit=1) == [event(9)]
                reading.close()
    assert {0, 1, 2} == set(seen) and seen == sorted(seen)


@tool("strace")
def test_an_error_at_any_write_is_one_ledger_error_and_passes(tmp_path: Path) -> None:
    for directory, inject, done in every_fault(tmp_path, "error=ENOSPC"):
        assert done.returncode == 0, f"{inject}: {done.stderr}"
        failed = done.stderr.splitlines()
        assert len(failed) <= 1, f"{inject}: {done.stderr}"
        assert all(line.startswith(f"{directory / NAME}: cannot be") for line in failed)
        found = [entry.when for entry in Reader(str(directory)).history()]
        assert found == [1] or (found == [0] and done.stdout == "begin\n0\n"), inject


ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from watcher.records.ledger import Ledger, LedgerError, Reader
    from watcher.model import Event, Outcome

    state = Path({directory!r})
    ballast = state / "ballast"
    ballast.write_bytes(b"x" * 100_000)
    ledger = Ledger(str(state))
    written = 0
    try:
        while True:
            ledger.append(Event("a.service", Outcome.APPLIED, str(written), when=1, output="x" * 5000))
            written += 1
    except LedgerError as error:
        print(error)
    assert len(Reader(str(state)).history(limit=1000)) == written > 10
    ballast.unlink()
    ledger.append(Event("a.service", Outcome.APPLIED, "again", when=2))
    assert Reader(str(state)).history(limit=1)[0].message == "again"
    assert ledger.remarks == []
"""


@userns
def test_a_full_disk_is_an_error_and_passes(tmp_path: Path) -> None:
    shell = f'mount -t tmpfs -o size=400k none {tmp_path} && exec "$@"'
    done = run_python(
        ON_A_FULL_DISK.format(directory=str(tmp_path)),
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / NAME}: cannot be written: database or disk is full\n"
