# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two writers of one file at once, and all that is one writer, or two one after the other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from support.needs import root
from support.nobody import AS_NOBODY
from support.writer import Writer
from watcher.watch.writers import _AT_ONCE, _NAMED_MAX, _OPEN_MAX, _PAUSE_SEC, RECORD, Writers

pytestmark = root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    drops = tmp_path / "drops"
    drops.mkdir()
    return drops / "web_1.4.raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(16384))
    return path


@pytest.fixture
def writers(tmp_path: Path, target: Path) -> Iterator[Writers]:
    with Writers(str(tmp_path)) as made:
        made.begin()
        made.watch((str(target.parent), str(tmp_path / "not-there")))
        yield made


def test_a_directory_of_proc_is_no_error(tmp_path: Path) -> None:
    with Writers(str(tmp_path)) as made:
        made.begin()
        made.watch(("/proc/self",))


def blend(writers: Writers, target: Path) -> str:
    fd = os.open(target, os.O_RDONLY)
    try:
        return writers.blend(fd, alone=True)
    finally:
        os.close(fd)


@contextlib.contextmanager
def unread(writers: Writers, wanted: bool) -> Iterator[None]:
    """Nobody reads what the kernel tells meanwhile, as on a busy machine."""
    with writers._lock if wanted else contextlib.nullcontext():
        yield


busy = pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])


@busy
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param("1otw 2otwwc 1wc", id="within the other"),
        pytest.param("1otw 2ot 1wc 2wwc", id="crossing"),
        pytest.param("1o 2o 1t 1w 1w 2t 2w 2w 2c 1c", id="one after the other, both open"),
    ],
)
def test_two_at_once(writers: Writers, target: Path, source: Path, steps: str, late: bool) -> None:
    with Writer(target, source) as one, Writer(target, source) as other:
        with unread(writers, late):
            for step in steps.split():
                (one if step[0] == "1" else other)(step[1:])
        who = blend(writers, target)
        assert str(one.pid) in who and str(other.pid) in who
        assert who.count("python") == 2
        assert blend(writers, target) == who, "until it is written again"


def test_two_at_once_of_whom_one_goes_on_alone(writers: Writers, target: Path, source: Path) -> None:
    """What nobody has read when the first one ended is put down to the second one when that ends."""
    with Writer(target, source) as one, Writer(target, source) as other:
        with unread(writers, True):
            one("otw")
            other("o")
            one("wc")
        assert not blend(writers, source)
        with writers._lock:
            writers._read()
        other("twwc")
        assert str(one.pid) in blend(writers, target)


@pytest.mark.parametrize("reads", range(3))
@pytest.mark.parametrize("steps", ["1otw 2otw 1wc", "1otw 2otw 1w 2w 1c", "1otw 2o 3otwwc 1wc 2tw"])
def test_two_at_once_of_whom_the_second_ends_while_we_read(
    writers: Writers, target: Path, source: Path, monkeypatch: pytest.MonkeyPatch, steps: str, reads: int
) -> None:
    """Its end is in what inotify tells, and not, or only later, in what fanotify does."""
    with contextlib.ExitStack() as stack:
        many = {number: stack.enter_context(Writer(target, source)) for number in "123"}
        with unread(writers, True):
            for step in steps.split():
                many[step[0]](step[1:])
            meanwhile(monkeypatch, reads, lambda: many["2"]("c"))
            writers._read()
        assert blend(writers, target)


@pytest.mark.parametrize("reads", range(3))
@pytest.mark.parametrize(("first", "then"), [("1otwwc 2otw", "2wc"), ("1otww", "1c"), ("1otwwc", "2otwwc")])
def test_one_after_the_other_while_we_read(
    writers: Writers,
    target: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    then: str,
    reads: int,
) -> None:
    with Writer(target, source) as one, Writer(target, source) as other:
        many = {"1": one, "2": other}
        with unread(writers, True):
            for step in first.split():
                many[step[0]](step[1:])
            meanwhile(monkeypatch, reads, lambda: many[then[0]](then[1:]))
            writers._read()
        assert not blend(writers, target)


def meanwhile(monkeypatch: pytest.MonkeyPatch, reads: int, act: Callable[[], None]) -> None:
    """Do something after so many more reads: first of inotify, then of fanotify until there is nothing more."""
    read, left = os.read, iter(range(reads, -1, -1))

    def noticed(fd: int, length: int) -> bytes:
        try:
            return read(fd, length)
        finally:
            if next(left, None) == 0:
                act()

    monkeypatch.setattr(os, "read", noticed)


@busy
def test_one_after_the_other(writers: Writers, target: Path, source: Path, late: bool) -> None:
    with Writer(target, source) as one, Writer(target, source) as other:
        with unread(writers, late):
            one("otwwc")
            other("otwwc")
            target.read_bytes()
            subprocess.run(["touch", target], check=True)
        assert not blend(writers, target)


def test_one_after_the_other_of_whom_the_second_is_slow(writers: Writers, target: Path, source: Path) -> None:
    namesake = target.parent.parent / "others" / target.name
    namesake.parent.mkdir()
    writers.watch((str(namesake.parent),))
    with Writer(target, source) as one, Writer(target, source) as other:
        with unread(writers, True):
            one("otwwc")
            other("ot")
            namesake.touch()
        with writers._lock:
            writers._read()
        other("wwc")
        assert not blend(writers, target)


@busy
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "exec 3> {0}; (cat {1} >&3; sleep 0.02; echo >&3) & exec 3>&-; wait", id="a child that closes it"
        ),
        pytest.param("exec 3< {0}; cat {1} > {0}; cat <&3 >&2; cat {0} > /dev/null", id="readers"),
        pytest.param("for i in 1 2 3 4 5; do cat {1} >> {0}; done", id="many one after the other"),
        pytest.param("exec 3> {0} 4>> {0}; cat {1} >&3; exec 3>&-; echo >&4; exec 4>&-", id="two handles"),
    ],
)
def test_what_one_program_does(
    writers: Writers, target: Path, source: Path, command: str, late: bool
) -> None:
    target.touch()
    with unread(writers, late):
        subprocess.run(["sh", "-ec", command.format(target, source)], check=True, stderr=subprocess.DEVNULL)
    assert not blend(writers, target)


@busy
@pytest.mark.parametrize("command", ["cp {1} {0}", "sh -c 'cp {1} {0}; :'"], ids=["a child", "its child"])
def test_a_child_that_writes_and_is_gone_at_once_is_its_parent(
    writers: Writers, target: Path, source: Path, command: str, late: bool
) -> None:
    """Who it was cannot be asked any more. Its parent can: it has waited for one."""
    words = f"exec 3>> {{0}}; echo; read go; {command}; echo; read go || :; exec 3>&-"
    shell = subprocess.Popen(
        ["sh", "-ec", words.format(target, source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with shell:
        assert shell.stdin is not None and shell.stdout is not None
        with unread(writers, late):
            shell.stdout.read(1)
            with unread(writers, not late):  # once its open was read
                if not late:
                    writers._read()
                shell.stdin.write(b"\n")
                shell.stdin.flush()
                shell.stdout.read(1)
        with writers._lock:
            writers._read()
    assert shell.returncode == 0
    assert not blend(writers, target)


@busy
def test_a_stranger_that_writes_and_is_gone_at_once(
    writers: Writers, target: Path, source: Path, late: bool
) -> None:
    with Writer(target, source) as one:
        with unread(writers, late):
            one("ot")
            with unread(writers, not late):
                if not late:
                    writers._read()
                subprocess.run(["cp", source, target], check=True)
        with writers._lock:
            writers._read()
        one("wwc")
        assert str(one.pid) in blend(writers, target)


# loop(4), LOOP_CLR_FD: the file is closed by who has the device open last.
DETACH = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(fd, 0x4C01)
os.close(fd)
sys.exit(os.system(sys.argv[2]) >> 8)
"""


# {p}: it goes on when all that has happened has been read; "late", nothing is read but then.
@busy
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "cat {0} >&2; {p}; cp {1} {0}; {p}; exec 3> {0}; {p}; (cat {1} >&3; {p}) & exec 3>&-; wait",
            id="a reader that is gone, and a child that closes it",
        ),
        pytest.param(
            "exec 4< {0}; {p}; cp {1} {0}; {p}; L=$(losetup --show -f {0}); {p}; losetup -d $L; {p}",
            id="a reader that stays, and a loop device that closes it",
        ),
        pytest.param(
            "exec 4< {0}; {p}; cp {1} {0}; {p}; L=$(losetup --show -f {0}); {p}; python3 -c '"
            + DETACH
            + "' $L '{p}'",
            id="a reader that stays, and its child that closes a loop device, and lives on",
        ),
        pytest.param(
            "L=$(losetup --show -f {0}); {p}; cp {1} {0}; {p}; losetup -d $L; {p}", id="a loop device"
        ),
        pytest.param(
            "cat {0} >&2; exec 3< {0} 3<&-; {p}; cp {1} {0}; {p}; echo >> {0}", id="it has read before"
        ),
        pytest.param(
            "exec 3>> {0}; {p}; sh -c 'exec 4> {0}; {p}; cat {1} >&4'; {p}; exec 3>&-",
            id="a child writes while its parent has it open",
        ),
        pytest.param(
            "L=$(losetup --show -f {0}); mkfs.ext4 -q $L; losetup -d $L; tune2fs -L web {0} >&2", id="mkfs"
        ),
    ],
)
def test_what_programs_do_one_after_the_other(
    writers: Writers, target: Path, source: Path, command: str, late: bool
) -> None:
    target.write_bytes(bytes(1 << 20))
    # Not standard input: what a shell starts in the background has none.
    words = ["sh", "-ec", "exec 9<&0; " + command.format(target, source, p="echo; read on <&9")]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with unread(writers, late), subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
        assert process.stdin and process.stdout
        for _ in iter(process.stdout.readline, b""):
            with unread(writers, not late):
                writers._read()
            process.stdin.write(b"on\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert not blend(writers, target)


def test_whoever_may_only_read_it_keeps_nothing_out(writers: Writers, target: Path, source: Path) -> None:
    """He has it open all the time, in more processes than are remembered; a child closes it for its parent."""
    target.touch()
    command = (
        f"cp {source} {target}; sleep 0.05; exec 3> {target}; sleep 0.1; (cat {source} >&3) & exec 3>&-; wait"
    )
    with contextlib.ExitStack() as readers:

        def read() -> None:
            for _ in range(_OPEN_MAX + 2):
                reader = subprocess.Popen([*AS_NOBODY, "sleep", "100"], stdin=os.open(target, os.O_RDONLY))
                readers.callback(reader.wait)
                readers.callback(reader.kill)

        read()
        with subprocess.Popen(["sh", "-ec", command]):
            read()
        assert not blend(writers, target)


def test_what_is_remembered_is_bounded(writers: Writers, target: Path) -> None:
    """Whoever may write to a drop directory makes files that are no images, which nobody looks at."""
    target.touch()
    command = f"for i in $(seq 300); do sh -c ': >> {target}' & done; for i in $(seq 5000); do : > {target}.$i; done"
    subprocess.run(["sh", "-ec", f"exec 3< {target}; {command}; wait"], check=True)
    time.sleep(0.1)
    with writers._lock:
        writers._read()
        files = [file for file in writers._files.values() if file.open]
    assert len(files) <= 1, "who has closed it is forgotten"
    assert all(len(file.open) <= _OPEN_MAX for file in files)
    assert all(len(one.beside or {}) <= _NAMED_MAX for file in files for one in file.open.values())


def test_whoever_opens_files_without_end_costs_little(
    writers: Writers, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    read = writers._read

    def counted() -> None:
        nonlocal reads
        reads += 1
        read()

    monkeypatch.setattr(writers, "_read", counted)
    begun = time.monotonic()
    subprocess.run(["sh", "-ec", f"for i in $(seq 20000); do : >> {target}; done"], check=True)
    assert 0 < reads <= (time.monotonic() - begun) / _PAUSE_SEC + _AT_ONCE


def test_events_that_were_lost_accuse_nobody(writers: Writers, target: Path, source: Path) -> None:
    """What had been seen before counts only while the file is as it was."""
    write_at_once(target, source)
    assert blend(writers, target)
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    flood = f"import sys\nfor count in range({limit + 10}): open(f'{{sys.argv[1]}}.{{count % 20000}}', 'w').close()"
    with Writer(target, source) as one, unread(writers, True):
        subprocess.run([sys.executable, "-ISc", flood, f"{target.parent}/other"], check=True)
        one("otwwc")
    assert not blend(writers, target)


def write_at_once(target: Path, source: Path) -> None:
    with Writer(target, source) as one, Writer(target, source) as other:
        one("otw")
        other("o")
        one("wc")
        other("twwc")


@pytest.mark.parametrize("command", ["touch {0}", "cp {1} {0}", "cp {1} {0}.new; mv {0}.new {0}"])
def test_written_by_one_alone_it_is_good_again(
    writers: Writers, target: Path, source: Path, command: str
) -> None:
    write_at_once(target, source)
    assert blend(writers, target)
    subprocess.run(["sh", "-ec", command.format(target, source)], check=True)
    assert not blend(writers, target)


def test_by_another_name_it_is_the_same_file(writers: Writers, target: Path, source: Path) -> None:
    write_at_once(target, source)
    target = target.rename(target.with_name("web_1.5.raw"))
    target.chmod(0o600)
    assert blend(writers, target)


def test_the_next_one_knows_it_and_forgets_it_when_it_was_changed(
    writers: Writers, tmp_path: Path, target: Path, source: Path
) -> None:
    write_at_once(target, source)
    who = blend(writers, target)
    with Writers(str(tmp_path)) as without:
        assert blend(without, target) == who
    writers.__exit__()
    with Writers(str(tmp_path)) as later:
        later.begin()
        later.watch((str(target.parent),))
        assert blend(later, target) == who
        target.chmod(0o600)
        assert blend(later, target) == who, "it has seen that nobody has written to it"
    target.write_bytes(b"while it was not there")
    with Writers(str(tmp_path)) as last:
        assert not blend(last, target)


@pytest.mark.parametrize(
    "content",
    ["", "{", '[["a", 1]]', '[[1, "zz", 1, "a"]]', "7", '[[1e999, "", 1, ""]]', "[" * 99999],
    ids=range(7),
)
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with structlog.testing.capture_logs() as said, Writers(str(tmp_path)) as made:
        assert not blend(made, tmp_path / RECORD)
    assert [one["log_level"] for one in said] == ["warning"]


def test_who_is_writing(writers: Writers, tmp_path: Path, target: Path, source: Path) -> None:
    with Writer(target, source) as one, Writers(str(tmp_path)) as without:
        one("o")
        fd = os.open(target, os.O_RDONLY)
        for each in (writers, without):
            assert f"(pid {one.pid}, user root)" in each.writing(fd)
        one("c")
        assert not writers.writing(fd)
        os.close(fd)
