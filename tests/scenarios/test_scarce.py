# SPDX-License-Identifier: LGPL-2.1-or-later
"""Short of something: it is said once, the old stack stays, and a drop is applied when there is some again."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest
from inotify_simple import INotify, flags

from scenarios.place import Daemon, Place, Service, image, until
from support.needs import filesystem, loop, tool

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)
trees_only = pytest.mark.parametrize("place", ["trees"], indirect=True)

# A /dev of its own, as a container may have it, in a mount namespace of its own.
BARE_DEV = """
mount -t tmpfs dev /dev
mknod -m 666 /dev/null c 1 3
[ -z "$1" ] || mknod /dev/loop-control c 10 237
shift
exec "$@"
"""
# Other tests may hold most of them at the same time.
LOOPS = """
import os, stat
if not os.path.exists("/dev/loop-control"):
    os.mknod("/dev/loop-control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
for number in range(1024):
    os.mknod(f"/dev/loop{number}", stat.S_IFBLK | 0o600, os.makedev(7, number))
"""


@loop
@images_only
@pytest.mark.parametrize("control", ["", "control"], ids=["no loop devices", "no free loop device"])
def test_no_loop_device(place: Place, control: str) -> None:
    service = place.start()
    daemon = place.start_daemon("unshare", "--mount", "sh", "-ec", BARE_DEV, "sh", control)
    service.put("1.3")
    line = service.logged(
        "web_1.3.raw has to wait, it is tried again by itself: no loop device is to be had: /dev/loop"
    )
    assert "level=warning" in line
    assert service.heard == ["nothing"]
    image = (service.versions / "web_1.3.raw").read_bytes()
    copy = place.state / "store" / hashlib.sha256(image).hexdigest()
    before = copy.stat()
    into = ["nsenter", f"--target={daemon.pid}", "--mount", sys.executable, "-ISc", LOOPS]
    subprocess.run(into, check=True)
    service.reloaded("1.3")
    assert len([line for line in service.log_lines() if "has to wait" in line]) == 1
    # While it waited, it was not copied at each try.
    assert copy.stat().st_mtime_ns == before.st_mtime_ns


@loop
@images_only
@tool("mkfs.erofs")
@filesystem("erofs")
def test_without_loop_devices_what_needs_none_is_applied(place: Place) -> None:
    """A directory tree; and erofs, which Linux 6.12 reads straight from a file."""
    service = place.start()
    place.start_daemon("unshare", "--mount", "sh", "-ec", BARE_DEV, "sh", "")
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 12):
        place.bring(image("web_1.2", "1.2", fstype="erofs"), service.versions / "web_1.2.raw")
        service.reloaded("1.2")
    service.put("1.3")
    service.logged("web_1.3.raw has to wait")


@pytest.fixture
def cramped(place: Place) -> Iterator[Place]:
    """The state directory on a file system of one megabyte, in memory."""
    place.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=755", "state", place.state], check=True)
    yield place
    for service in place.services:
        service.kill()
    if place.daemon:
        place.daemon.stop()
        place.daemon = None
    subprocess.run(["umount", "--lazy", place.state], check=True)


def large(service: Service, version: str) -> None:
    value = random.Random(version).randbytes(600_000).hex()
    path = service.place.path / "large"
    service.place.bring(image(f"large-{version}", value), path)
    path.rename(service.versions / f"web_{version}.raw")


@images_only
def test_no_space_in_the_store_and_no_memory(cramped: Place) -> None:
    cramped.start_daemon()
    service = cramped.start()
    service.put("1.3")
    service.reloaded("1.3")
    large(service, "1.4")
    large(service, "1.5")
    line = service.logged(
        r"web_1.[45].raw has to wait, it is tried again by itself: .*no room: No space left"
    )
    assert "level=warning" in line
    assert service.has("1.3") or service.etc("web.conf").stat().st_size > 1_000_000
    subprocess.run(["mount", "-o", "remount,size=64M", cramped.state], check=True)
    service.logged("web .* -> 1.5 applied")
    assert not [one for one in service.log_lines() if "a bug in" in one]


@images_only
def test_a_full_disk_stops_nothing_that_needs_no_space(cramped: Place) -> None:
    """Back to what is in the store; a service that is started."""
    cramped.start_daemon()
    service = cramped.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    with pytest.raises(OSError, match="No space left"):
        (cramped.state / "fill").write_bytes(bytes(2 << 20))
    service.remove("1.4")
    other = cramped.start(name="other.service")
    assert other.heard == ["nothing"]
    (cramped.state / "fill").unlink()
    service.reloaded("1.3")


def watches(pid: int) -> int:
    """inotify watches that a process has."""
    infos = (path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir())
    return sum(info.count("inotify wd:") for info in infos)


@trees_only
def test_the_watch_limit(place: Place) -> None:
    """Of the user namespace; what cannot be watched is looked at from time to time, and whenever somebody asks."""
    daemon = place.start_daemon()
    first = place.start()
    first.put("1.3")
    first.logged("web 1.3 added")
    place.inside("sh", "-c", f"echo {watches(daemon.pid)} > /proc/sys/user/max_inotify_watches")
    second = place.start()
    line = daemon.log.wait_for("the limit fs.inotify.max_user_watches is reached", "looked at every 30 s")
    assert "level=warning" in line
    first.put("1.4")
    first.reloaded("1.4")
    second.put("1.3")
    daemon.send(signal.SIGHUP)
    second.reloaded("1.3")
    place.inside("sh", "-c", "echo 100000 > /proc/sys/user/max_inotify_watches")
    daemon.send(signal.SIGHUP)
    for _ in range(2):
        daemon.log.wait_for("settings read again")
    second.put("1.4")
    second.reloaded("1.4")
    second.put("1.5")
    second.reloaded("1.5")


def overflow(directory: Path) -> None:
    """More events than any queue holds; the kernel makes one of two that are alike, so they are different."""
    names = [directory / name for name in (".one", ".other")]
    with INotify(nonblocking=True) as own:
        for name in names:
            name.touch()
        own.add_watch(directory, flags.ATTRIB)
        for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 100):
            for name in names:
                name.chmod(0o600)
        assert any(event.mask & flags.Q_OVERFLOW for event in own.read(timeout=0))


@pytest.mark.parametrize("drop", ["before", "after"])
@trees_only
def test_the_queue_of_events_overflows(place: Place, drop: str) -> None:
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    daemon.send(signal.SIGSTOP)
    if drop == "before":
        service.put("1.4")
    overflow(service.drops)
    if drop == "after":
        service.put("1.4")
    daemon.send(signal.SIGCONT)
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


@contextmanager
def no_descriptors(daemon: Daemon) -> Iterator[None]:
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(
        daemon.pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{daemon.pid}/fd")), limits[1])
    )
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)


@images_only
def test_no_descriptor_is_left(place: Place) -> None:
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    with no_descriptors(daemon):
        service.put("1.4")
        service.logged("Too many open files|too many open files")
        assert service.has("1.3")
    service.reloaded("1.4")


@images_only
def test_no_descriptor_is_left_to_follow_a_directory(place: Place) -> None:
    """Its watches cannot be renewed; they are when there are descriptors again, and somebody asks."""
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    with no_descriptors(daemon):
        shutil.rmtree(service.drops)
        service.versions.mkdir(parents=True)
        daemon.log.wait_for("cannot be watched: Too many open files")
    daemon.send(signal.SIGHUP)
    service.put("1.4")
    service.logged("1.4.* applied")
    service.put("1.5")
    service.reloaded("1.5")


def loops(place: Place) -> int:
    """Loop devices with a copy of this place's store behind them, as `losetup -a` lists them."""
    found = 0
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it has just been detached
            found += path.read_text().startswith(f"{place.state}/store/")
    return found


@loop
@images_only
def test_loop_devices_are_given_back(place: Place) -> None:
    """However many swaps, and restarts of the service and of the daemon, there were."""
    service = place.start()
    daemon = place.start_daemon()
    numbers = iter(range(1, 1000))
    most = []
    for _ in range(5):
        for number in islice(numbers, 10):
            service.put(str(number))
            service.reloaded(str(number))
        service.kill()
        service = place.start(name=service.name)
        daemon.stop()
        daemon = place.start_daemon()
        service.put(str(number := next(numbers)))
        service.reloaded(str(number))
        until(lambda: loops(place) <= 2)  # the daemon gives back what it needs no more when it is idle
        most.append(loops(place))
    assert most[-1] <= most[0]
