# SPDX-License-Identifier: LGPL-2.1-or-later
"""A local user without rights holds every lock that he can get on our files: the daemon and `exec` go on."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scenarios.place import Place, Service
from support.needs import root, tool
from support.nobody import AS_NOBODY, NOBODY

pytestmark = [root, tool("mksquashfs"), tool("setpriv")]


# Each lock that the kernel has, on each file and directory that can be opened; kept until standard input is closed.
HOLD = """
import fcntl, os, struct, sys
kind = getattr(fcntl, sys.argv[1])
held = []
def hold(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    held.append((path, fd))
    whole = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    for lock in (
        lambda: fcntl.flock(fd, kind | fcntl.LOCK_NB),
        lambda: fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole),
        lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    ):
        try:
            lock()
        except OSError:
            pass
for top in sys.argv[2:]:
    hold(top)
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            hold(os.path.join(directory, name))
print(len(held), flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(place: Place, kind: str) -> Iterator[int]:
    """A stranger that has locked what he can; how much that is."""
    words = [*AS_NOBODY, sys.executable, "-c", HOLD, kind, str(place.state), str(place.runtime)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdin is not None and stranger.stdout is not None
        yield int(stranger.stdout.readline())
        stranger.stdin.close()


def started(place: Place) -> Service:
    """A daemon, and a service that has got something."""
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("applied in", "version=1.3 ")
    return service


@pytest.mark.parametrize("kind", ["LOCK_EX", "LOCK_SH"])
def test_no_lock_of_a_strangers_is_waited_for(open_place: Place, kind: str) -> None:
    service = started(open_place)
    with holding(open_place, kind) as locked:
        assert locked >= 2  # the state and the runtime directory themselves
        service.put("1.4")
        service.reloaded("1.4")
        service.logged("applied in", "version=1.4 ")
        assert service.status()["layers"][0]["version"] == "1.4"
        other = open_place.start()
        other.put("1.3")
        other.reloaded("1.3")
        assert open_place.daemon is not None
        open_place.daemon.stop()
        third = open_place.start()
        assert third.heard


def test_what_only_root_can_open(open_place: Place) -> None:
    """Names of images, their sources and the commands of services are nobody's business."""
    started(open_place)
    words = [*AS_NOBODY, "find", str(open_place.state), str(open_place.runtime), "-readable", "-type", "d,f"]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
    names = {os.path.relpath(path, open_place.path) for path in found}
    assert names == {"state", "state/units", "run"}


def test_the_event_loop_waits_for_no_lock(open_place: Place) -> None:
    """Whoever collects copies, and for however long: `status` is answered, SIGTERM is followed."""
    service = started(open_place)
    lock = os.open(open_place.state / "store/.lock", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service.put("1.4")
        assert service.status()["layers"][0]["version"] == "1.3"
        fcntl.flock(lock, fcntl.LOCK_UN)
        service.reloaded("1.4")
        service.logged("applied in", "version=1.4 ")
        fcntl.flock(lock, fcntl.LOCK_EX)
        service.put("1.5")
        assert service.status()["layers"][0]["version"] == "1.4"
        assert open_place.daemon is not None
        open_place.daemon.stop()
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    "command", [["run"], ["exec", "--name", "web.service", "--", "true"]], ids=["run", "exec"]
)
@pytest.mark.parametrize("which", ["state", "runtime"])
@pytest.mark.parametrize("how", ["another's", "for all to write"])
def test_a_directory_that_others_can_change_is_not_ours(
    open_place: Place, which: str, how: str, command: list[str]
) -> None:
    """Made by somebody in `/tmp` before us, say: what he puts in there would be a record, a copy, a registration."""
    directory: Path = getattr(open_place, which)
    directory.mkdir()
    directory.chmod(0o755 if how == "another's" else 0o777)
    os.chown(directory, NOBODY if how == "another's" else 0, 0)
    done = open_place.run(*command, check=False)
    assert done.returncode == 1
    assert f"{directory}: others can change it: chown it to root" in done.stderr, done.stderr
    assert os.listdir(directory) == []


LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.limit(30)
def test_check_does_not_wait_for_the_lease_of_an_images_owner(open_place: Place) -> None:
    """The kernel gives him 45 seconds to let go of it."""
    image = open_place.path / "web_1.raw"
    open_place.bring(open_place.confext("1"), image)
    os.chown(image, 65534, 65534)
    words = [*AS_NOBODY, sys.executable, "-c", LEASE, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
        done = open_place.run("check", str(image), check=False)
        owner.communicate()
    assert done.returncode == 1 and "open for writing" in done.stdout
