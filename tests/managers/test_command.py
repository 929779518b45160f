# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command gets from a real process in namespaces of its own (managers/exec_context.py, managers/enter.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.needs import root, tool
from watcher.managers import command
from watcher.managers.base import Ended
from watcher.managers.exec_context import ExecContext, ExecOrder, context_of
from watcher.model import Later
from watcher.mounts.process import Process

pytestmark = [root, tool("unshare"), tool("chroot"), tool("setpriv")]

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

JAILED = """
cd "$0" && mkdir usr proc && echo yes >inside && mount --bind /usr usr && mount --bind /proc proc
for name in bin lib lib64; do ln -s usr/$name $name; done
exec chroot . /bin/sh -c 'echo ready; exec sleep 1000'
"""


@pytest.fixture
def jail(tmp_path: Path) -> Path:
    path = tmp_path / "above/jail"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def main(jail: Path) -> Iterator[Process]:
    """A process that has chrooted itself."""
    words = ["unshare", "--mount", "sh", "-ec", JAILED, str(jail)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with Process(child.pid) as process:
            yield process
        child.kill()


# Writes the auxiliary vector of a program that root has executed, as CRIU does, and then executes what it is told to.
FORGING = """
import ctypes, os, struct, sys
vector = bytearray(open("/proc/self/auxv", "rb").read())
for at in range(0, len(vector), 16):
    if struct.unpack_from("=Q", vector, at)[0] in (11, 12, 13, 14, 23):
        struct.pack_into("=Q", vector, at + 8, 0)
stat = [int(field) for field in open("/proc/self/stat").read().rpartition(")")[2].split()[1:]]
field = {number: stat[number - 4] for number in (26, 27, 28, 45, 46, 47, 48, 49, 50, 51)}
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
held = ctypes.create_string_buffer(bytes(vector), len(vector))
order = (26, 27, 45, 46, 47, None, 28, 48, 49, 50, 51)
places = [libc.sbrk(0) if number is None else field[number] for number in order]
told = struct.pack("=12QII", *places, ctypes.addressof(held), len(vector), 0xFFFFFFFF)
if libc.prctl(35, 14, ctypes.c_char_p(told), ctypes.c_ulong(len(told)), ctypes.c_ulong(0)):  # PR_SET_MM_MAP
    sys.exit(os.strerror(ctypes.get_errno()))
print("ready", flush=True)
input()
os.execv(sys.argv[1], sys.argv[1:])
"""


class Racing(Process):
    """Executes the next program after one file of its was read, and before the next one is."""

    after = ""

    def read_bytes(self, name: str) -> bytes:
        found = super().read_bytes(name)
        if name == self.after:
            self.after = ""
            self.go_on()
        return found

    def go_on(self) -> None:
        raise NotImplementedError


def test_what_enters_starts_without_what_takes_longer_than_to_start() -> None:
    """Each check, and each reload by a command, waits for it."""
    *python, program = command.PROGRAM
    before, _, _ = program.partition("; from ")
    done = subprocess.run(
        [*python, f"{before}; import watcher.managers.enter; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert {"typing", "re", "dataclasses", "inspect"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("after", ["auxv", "status"])
@pytest.mark.parametrize("environment", [None, {}], ids=["", "its environment is known"])
def test_a_program_that_says_root_has_executed_it_is_lent_nothing(
    after: str, environment: dict[str, str] | None
) -> None:
    """`sudo` and `newgrp` are as much root as they like, and some execute what the user likes when they have done."""
    with tempfile.TemporaryDirectory(prefix="confext-inside-", dir="/var/tmp") as lair:
        os.chmod(lair, 0o755)
        borrowing = shutil.copyfile(shutil.which("sleep") or "", f"{lair}/borrowing")
        os.chmod(borrowing, 0o4755)
        words = [*NOBODY, sys.executable, "-ISc", FORGING, borrowing, "1000"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            try:
                assert child.stdin is not None and child.stdout is not None
                assert child.stdout.readline() == b"ready\n"
                comm = Path(f"/proc/{child.pid}/comm")

                def become_root() -> None:
                    assert child.stdin is not None
                    child.stdin.write(b"\n")
                    child.stdin.flush()
                    while comm.read_text() != "borrowing\n":
                        pass

                with Racing(child.pid) as main:
                    main.after, main.go_on = after, become_root  # type: ignore[method-assign]
                    with pytest.raises(Later):
                        context_of(main, environment)
                    assert main.after == ""
            finally:
                child.kill()


# As squid does, `leave_suid()` and `enter_suid()` in its src/tools.cc.
ROOT_IN_PART = """
import os, sys, time
os.setgroups([65533])
os.setresgid(65534, 65534, int(sys.argv[4]))
os.setresuid(*map(int, sys.argv[1:4]))
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("users", [(65534, 0, 0), (65534, 65534, 0), (65534, 0, 65534), (65534, 65532, 0)])
async def test_a_command_of_a_service_that_is_root_in_part_is_its_real_user(
    users: tuple[int, int, int],
) -> None:
    """Nor does it get groups: the program of a set-user-ID file can have these from root, too."""
    words = [sys.executable, "-ISc", ROOT_IN_PART, *map(str, users), "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            with Process(child.pid) as main:
                ended = await run(
                    main, context_of(main, {}), "/bin/sh", "-c", "cat /proc/self/status; exit 1"
                )
        finally:
            child.kill()
    said = dict(line.partition(":")[::2] for line in ended.output.split("\n"))
    assert said["Uid"].split() == said["Gid"].split() == ["65534"] * 4
    assert said["Groups"].split() == []
    assert all(int(said[key], 16) == 0 for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"))


async def run(main: Process, context: ExecContext, *words: str) -> Ended:
    namespace = main.namespace()
    try:
        with command.namespaces(main, namespace) as paths:
            order = ExecOrder(paths, context, words, contained=True)
            return await command.run(order, timeout_sec=30)
    finally:
        os.close(namespace)


async def test_its_root_directory_is_that_of_the_process(main: Process, jail: Path) -> None:
    ended = await run(main, context_of(main, {}), "/bin/cat", "/inside")
    assert (ended.reason, ended.output) == ("", "yes\n")


def linked(jail: Path) -> None:
    jail.rename(jail.with_name("aside"))
    jail.symlink_to("/")


def linked_above(jail: Path) -> None:
    jail.parent.rename(jail.parent.with_name("aside"))
    jail.parent.symlink_to("/")
    assert not os.path.exists("/jail")


def another(jail: Path) -> None:
    jail.rename(jail.with_name("aside"))
    (jail / "usr").mkdir(parents=True)
    (jail / "bin").symlink_to("/usr/bin")


@pytest.mark.parametrize("exchange", [linked, linked_above, another])
async def test_whoever_exchanges_the_root_directory_gets_nothing_run(
    main: Process, jail: Path, exchange: Callable[[Path], None]
) -> None:
    context = context_of(main, {})
    exchange(jail)
    ended = await run(main, context, "/bin/true")
    assert ended.reason == (
        "cannot be started: it cannot be given the service's namespaces, user, root or capabilities"
    )
    assert ended.output == ""


async def test_what_cannot_be_executed_is_said(main: Process) -> None:
    ended = await run(main, context_of(main, {}), "/nowhere")
    assert ended.reason == "cannot be started: No such file or directory"


async def test_what_was_to_run_it_says_why_it_has_failed(
    main: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = (sys.executable, "-c", r"import sys; sys.exit('Traceback\nno such module')")
    monkeypatch.setattr(command, "PROGRAM", failing)
    with pytest.raises(Later, match=r"what was to run it has failed \(no such module\)$"):
        await run(main, context_of(main, {}), "/bin/true")
