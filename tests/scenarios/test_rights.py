# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service without rights may do to what is run for it: nothing that it could not do itself.

The services are those of an attacker who is `nobody` (uid 65534) and knows what the watcher does.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import root, tool
from support.nobody import AS_NOBODY
from support.place import Place, eventually

pytestmark = [root, tool("mksquashfs"), tool("setpriv"), tool("unshare")]

WHO = "grep -E '^(Uid|CapEff):' /proc/self/status; readlink /proc/self/ns/user"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


@pytest.fixture
def lair() -> Iterator[Path]:
    """A directory of the attacker's own."""
    path = Path(tempfile.mkdtemp(prefix="confext-lair-", dir="/var/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def program(lair: Path, name: str, text: str) -> Path:
    path = lair / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def start(
    place: Place, *words: str, options: tuple[str, ...], comm: str = "sleep"
) -> subprocess.Popen[bytes]:
    """A service of nobody's, once it has become what it wants to be."""
    service = place.start(*AS_NOBODY, *words, options=options)
    eventually(lambda: Path(f"/proc/{service.pid}/comm").read_text().strip() == comm)
    return service


def said(place: Place, words: str) -> list[str]:
    """The lines of the daemon's with these words in them, once there is one."""
    eventually(lambda: any(words in line for line in place.log), lambda: place.log)
    return [line for line in place.log if words in line]


# All capabilities, in namespaces of its own, but one that a machine may not give to its root.
TAKEN = "unshare --user --map-root-user --mount --keep-caps setpriv --ambient-caps=-sys_resource sh -c"


@pytest.mark.parametrize("option", ["--check", "--health-check", "--reload-command"])
def test_capabilities_of_its_own_user_namespace_are_none_of_the_hosts(
    place: Place, lair: Path, option: str
) -> None:
    loot = lair / "loot"
    evil = program(lair, "evil", f"{{ {WHO}; }} >>{loot} 2>&1; chmod 666 {loot}")
    taken = f"mount --bind {evil} /usr/bin/true; exec sleep 1000"
    start(place, *TAKEN.split(), taken, options=(option, "/usr/bin/true"))
    place.start_daemon()
    place.image("1", "one")
    line = place.until("outcome=")
    place.stop_daemon()
    assert not loot.exists(), loot.read_text()
    assert "outcome=needs-restart" in line
    assert "has left the mount namespace that it was started in" in line
    assert "Traceback" not in "".join(place.log)


@pytest.mark.parametrize("option", ["--check", "--health-check", "--reload-command"])
def test_a_user_namespace_alone_is_enough_to_run_nothing(place: Place, lair: Path, option: str) -> None:
    """Its mount namespace is still the one that it was started in, its capabilities count for nothing there."""
    script = program(lair, "who", f"{WHO}; exit 1")
    place.image("1", "one")
    start(place, *TAKEN.replace("--mount", "").split(), "exec sleep 1000", options=(option, str(script)))
    place.image("2", "two")
    place.start_daemon()
    said(place, "could not be run: its main process has left the user namespace that it was started in")
    place.stop_daemon()
    assert "CapEff" not in "".join(event.output for event in place.history())


def test_what_unshares_itself_for_good_reasons_is_told_so_and_keeps_what_it_has(place: Place) -> None:
    place.image("1", "one")
    sandboxed = ("unshare", "--mount", "sleep", "1000")
    service = place.start(*sandboxed, options=("--check", "true"))
    eventually(lambda: Path(f"/proc/{service.pid}/comm").read_text().strip() == "sleep")
    mounts = Path(f"/proc/{service.pid}/mountinfo").read_text()
    place.start_daemon()
    place.image("2", "two")
    (line,) = said(place, "outcome=needs-restart")
    assert "not touched, its main process has left the mount namespace that it was started in" in line
    assert Path(f"/proc/{service.pid}/mountinfo").read_text() == mounts
    words = "web.service: not in a mount namespace that was made for it"
    assert words in place.command("status").stdout
    place.stop_daemon()
    assert words in place.command("status").stdout
    assert sum("outcome=needs-restart" in line for line in place.log) == 1


def borrowing(lair: Path) -> Path:
    """A set-user-ID program of root's, as every host has some, that waits to be told something."""
    path = lair / "borrowing"
    shutil.copyfile(shutil.which("sleep") or "", path)
    path.chmod(0o4755)
    return path


@pytest.mark.parametrize("option", ["--check", "--health-check", "--reload-command"])
def test_a_set_user_id_program_lends_it_no_rights(place: Place, lair: Path, option: str) -> None:
    """As `su` waits for a password: it is root's, but what is in its environment is the attacker's."""
    script = program(lair, "who", f"{WHO}; exit 1")
    place.image("1", "one")
    start(place, str(borrowing(lair)), "1000", options=(option, str(script)), comm="borrowing")
    place.image("2", "two")
    place.start_daemon()
    said(place, "could not be run: its main process runs a program with rights that are not its own")
    place.stop_daemon()
    assert "Uid" not in "".join(event.output for event in place.history())


def test_its_environment_is_that_which_it_was_started_with(place: Place) -> None:
    place.environment["COLOUR"] = "blue"
    place.image("1", "one")
    words = ("sh", "-c", "COLOUR=red LD_PRELOAD=/nowhere exec sleep 1000")
    start(place, *words, options=("--check", "sh -c 'echo $COLOUR $LD_PRELOAD; exit 1'"))
    place.start_daemon()
    place.until("started well")
    place.image("2", "two")
    place.outcome("refused")
    eventually(place.history)
    assert place.history()[0].output == "blue\n"
