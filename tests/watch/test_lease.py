# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nobody writes while a lease is held, nobody waits long for it, and no signal of it hurts. Writers are processes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.needs import root, tool, userns
from watcher.model import Busy
from watcher.watch.lease import Lease, coarse_now_ns

FLAGS = {"append": "a", "overwrite": "r+", "truncate": "w"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "web.raw"
    path.write_bytes(b"content")
    return path


@contextmanager
def reading(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@root
@tool("losetup")
def test_an_image_that_is_mounted_is_not_being_written_to(file: Path) -> None:
    """As systemd does it: by way of a loop device that could be written to. Any other writer counts."""
    file.write_bytes(bytes(8192))
    done = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        with reading(file) as fd, Lease(fd) as lease:
            assert not lease.exact and lease.held()
            os.utime(file)
            assert not lease.held()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    with open(file, "ab"), reading(file) as fd, pytest.raises(Busy), Lease(fd):
        pass


@contextmanager
def program(source: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that ends at the end of the block; it says so on its output when it is ready."""
    command = [sys.executable, "-S", "-c", source, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


OPEN = """
import sys
print("begin", flush=True)
file = open(sys.argv[1], sys.argv[2])
print("open", flush=True)
sys.stdin.read()
"""

MAP = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 0)
os.close(fd)
print("open", flush=True)
sys.stdin.read()
"""


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("mode", FLAGS.values(), ids=FLAGS.keys())
def test_no_lease_while_somebody_has_the_file_open_for_writing(file: Path, mode: str) -> None:
    with reading(file) as fd:
        with program(OPEN, file, mode) as writer:
            assert (line(writer), line(writer)) == (b"begin", b"open")
            with pytest.raises(Busy, match="open for writing"), Lease(fd):
                pass
        with Lease(fd) as lease:
            assert lease.exact
            assert lease.held()


def test_no_lease_while_the_file_is_mapped_writable(file: Path) -> None:
    with reading(file) as fd, program(MAP, file) as writer:
        assert line(writer) == b"open"
        with pytest.raises(Busy), Lease(fd):
            pass


def test_readers_do_not_matter(file: Path) -> None:
    with reading(file) as fd, program(OPEN, file, "r") as reader:
        assert (line(reader), line(reader)) == (b"begin", b"open")
        with Lease(fd) as lease:
            lease.check()


@pytest.mark.parametrize("mode", FLAGS.values(), ids=FLAGS.keys())
def test_a_writer_breaks_the_lease_and_goes_on_once_it_is_released(file: Path, mode: str) -> None:
    with reading(file) as fd, Lease(fd) as lease, program(OPEN, file, mode) as writer:
        assert line(writer) == b"begin"
        until_broken(lease)
        with pytest.raises(Busy, match="while it was read"):
            lease.check()
        assert file.read_bytes() == b"content"  # it waits: nothing has happened to the file yet
        lease.release()
        assert line(writer) == b"open"


def test_truncating_by_path_breaks_it_too(file: Path) -> None:
    source = (
        "import os, sys; print('begin', flush=True); os.truncate(sys.argv[1], 1); print('done', flush=True)"
    )
    with reading(file) as fd, Lease(fd) as lease, program(source, file) as writer:
        assert line(writer) == b"begin"
        until_broken(lease)
        assert os.fstat(fd).st_size == 7
        lease.release()
        assert line(writer) == b"done"


def until_broken(lease: Lease) -> None:
    # There is no event that could be awaited without a handler for the signal; the kernel's answer is what counts.
    while lease.held():
        select.select([], [], [], 0.001)


BROKEN = """
import os, signal, sys, time
for number in (signal.SIGIO, signal.SIGURG):
    signal.signal(number, signal.SIG_DFL)
from watcher.watch.lease import Lease
fd = os.open(sys.argv[1], os.O_RDONLY)
with Lease(fd) as lease:
    print("begin", flush=True)
    while lease.held():
        time.sleep(0.001)
print("alive", flush=True)
"""


def test_a_holder_without_any_signal_handler_survives(file: Path) -> None:
    with program(f"import sys; sys.path[:0] = {sys.path!r}\n{BROKEN}", file) as holder:
        assert line(holder) == b"begin"
        with file.open("ab"):
            pass
        assert line(holder) == b"alive"
    assert holder.returncode == 0


def test_the_lease_ends_with_the_block(file: Path) -> None:
    with reading(file) as fd:
        with pytest.raises(ZeroDivisionError), Lease(fd):
            raise ZeroDivisionError
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
        with Lease(fd) as lease:
            lease.release()
            assert not lease.held()
            assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
        lease.release()


def test_a_lease_that_the_kernel_took_back_is_given_back_without_error(file: Path) -> None:
    with reading(file) as fd, Lease(fd) as lease:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        assert not lease.held()


def test_proven_when_last_seen_held(file: Path) -> None:
    with reading(file) as fd, Lease(fd) as lease:
        assert lease.proven_ns == 0
        before = coarse_now_ns()
        lease.check()
        assert before <= lease.proven_ns <= coarse_now_ns()


def test_a_busy_file_does_not_change_the_signal_of_the_process(file: Path) -> None:
    before = signal.getsignal(signal.SIGIO), signal.getsignal(signal.SIGURG)
    with reading(file) as fd, Lease(fd):
        pass
    assert (signal.getsignal(signal.SIGIO), signal.getsignal(signal.SIGURG)) == before


class TestWithoutLeases:
    def test_size_and_times_must_do(self, tmp_path: Path) -> None:
        with reading(tmp_path) as fd, Lease(fd) as lease:  # the kernel has none for what is no regular file
            assert not lease.exact
            lease.check()
            (tmp_path / "new").touch()
            assert not lease.held()

    @root
    @tool("setpriv")
    def test_a_change_shows_in_them(self, file: Path) -> None:
        """Another user's file, without CAP_LEASE."""
        file.parent.chmod(0o755)
        os.chown(file, 1, 1)
        source = (
            f"import sys; sys.path[:0] = {sys.path!r}\n"
            "import os\n"
            "from watcher.watch.lease import Lease\n"
            "with Lease(os.open(sys.argv[1], os.O_RDONLY)) as lease:\n"
            "    print('begin', lease.exact, lease.held(), flush=True)\n"
            "    sys.stdin.readline()\n"
            "    print(lease.held(), flush=True)\n"
        )
        command = [
            "setpriv",
            "--bounding-set=-lease",
            "--inh-caps=-lease",
            sys.executable,
            "-S",
            "-c",
            source,
            file,
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin is not None
            assert line(holder) == b"begin False True"
            file.write_bytes(b"something else")
            holder.stdin.write(b"\n")
            holder.stdin.close()
            assert line(holder) == b"False"


@userns
def test_in_a_user_namespace_leases_on_own_files_are_exact(file: Path) -> None:
    source = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import os\n"
        "from watcher.watch.lease import Lease\n"
        "with Lease(os.open(sys.argv[1], os.O_RDONLY)) as lease:\n"
        "    print(lease.exact)\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-S", "-c", source, file]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"True\n"
