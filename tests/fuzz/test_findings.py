# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the fuzz targets have found where an input alone does not show it: each with what a stranger does for it."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from jeepney import DBusAddress, HeaderFields, Message, new_signal
from managers.systemd.test_dbus import Daemon

from support.needs import filesystem, root, tool
from support.nobody import NOBODY
from watcher.managers import cgroup
from watcher.managers.systemd import dbus, systemd1
from watcher.managers.systemd.manager import Systemd
from watcher.managers.systemd.wire import Received
from watcher.mounts import table
from watcher.mounts.process import Process
from watcher.resolve import trust
from watcher.settings import syntax, values
from watcher.settings.config import Settings
from watcher.settings.os_release import parse_os_release
from watcher.watch.watcher import Watcher


@pytest.fixture
def bus_daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    daemon.start()
    yield daemon
    daemon.stop()


@tool("dbus-daemon")
async def test_a_signal_that_a_stranger_sends_straight_to_us_is_not_heard(bus_daemon: Daemon) -> None:
    """The system bus lets any user send signals to any connection: "the job is done", "systemd has reloaded"."""
    heard: list[tuple[str, str]] = []

    def note(message: Message) -> None:
        heard.append((message.header.fields[HeaderFields.member], message.header.fields[HeaderFields.sender]))

    address = bus_daemon.address
    async with (
        dbus.connect(note, address) as bus,
        dbus.connect(_ignore, address) as real,
        dbus.connect(_ignore, address) as stranger,
    ):
        us = await _name(bus, "com.example.Us")
        manager = await _name(real, systemd1.NAME)
        await bus.hear(systemd1.NAME)
        for sender in (stranger, real):
            await _send(sender, us, "Reloading", "b", (False,))
            await _send(sender, us, "JobRemoved", "uoss", (1, "/job/1", "a.service", "done"))
        # The name goes to the stranger: from now on it is he who is heard, and the other is not.
        await real.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "ReleaseName", "s", systemd1.NAME)
        await _name(stranger, systemd1.NAME)
        await _send(real, us, "UnitNew", "so", ("a.service", "/a"))
        await _send(stranger, us, "UnitNew", "so", ("a.service", "/a"))
        await _answered(real)
        await _answered(stranger)
        await _answered(bus)
    signals = [(member, sender) for member, sender in heard if sender.startswith(":")]
    assert [member for member, _ in signals] == ["Reloading", "JobRemoved", "UnitNew"]
    assert [sender == manager for _, sender in signals] == [True, True, False]


def _ignore(message: Message) -> None:
    pass


async def _name(bus: dbus.Bus, name: str) -> str:
    """The unique name of a connection, which it gets a name for."""
    await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "RequestName", "su", name, 0)
    (unique,) = await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "GetNameOwner", "s", name)
    return str(unique)


async def _send(bus: dbus.Bus, to: str, member: str, signature: str, body: tuple[object, ...]) -> None:
    message = new_signal(DBusAddress(systemd1.PATH, interface=systemd1.MANAGER), member, signature, body)
    message.header.fields[HeaderFields.destination] = to
    await bus._connection.send(message, serial=next(bus._connection.outgoing_serial))


async def _answered(bus: dbus.Bus) -> None:
    """Everything sent before has gone through the bus."""
    await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "GetId")


@pytest.mark.parametrize(
    "member", ["JobRemoved", "NameOwnerChanged", "PropertiesChanged", "Reloading", "UnitNew"]
)
def test_a_signal_with_other_arguments_is_passed_over(member: str) -> None:
    manager = Systemd(Settings())
    for arguments in ((), ("as", (["a"],))):
        message = new_signal(DBusAddress("/", interface="a.b"), member, *arguments)
        manager._on_signal(Received(message.serialise(serial=1)))
    manager.close()


async def test_what_is_no_message_costs_the_connection_and_not_the_daemon(tmp_path: Path) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with listener:
        await listener.bind(f"{tmp_path}/bus")
        listener.listen()

        async def talk_rubbish() -> None:
            peer, _ = await listener.accept()
            with peer:
                await peer.recv(4096)
                await peer.send(b"OK 0123456789abcdef0123456789abcdef\r\n")
                await peer.recv(4096)
                await peer.send(b"l\4\1\1" + struct.pack("<III", 0, 1, 8) + b"\xff" * 8)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk_rubbish)
            with pytest.raises(BaseExceptionGroup) as raised, trio.fail_after(30):
                async with dbus.connect(_ignore, f"unix:path={tmp_path}/bus"):
                    pass
            nursery.cancel_scope.cancel()
    assert raised.group_contains(dbus.BusLost)


@root
async def test_a_carriage_return_in_the_path_of_a_mount(tmp_path: Path) -> None:
    """Anybody may mount a FUSE at such a path (fusermount3); the kernel escapes blanks and newlines, and not this."""
    directory = tmp_path / "a\rb\x0bc"
    directory.mkdir()
    with Watcher() as watcher:
        watcher.set("a", [])
        mounts = watcher._mounts
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
        try:
            assert str(directory) in (mounts.changed() or ())
        finally:
            subprocess.run(["umount", directory], check=True)
        assert str(directory) in (mounts.changed() or ())


@root
@filesystem("fuse")
def test_what_a_user_serves_is_his_also_at_a_path_with_a_carriage_return(tmp_path: Path) -> None:
    """Read as text, such a row of the mount table was two: its file system was the kernel's, and its owners counted."""
    directory = tmp_path / "a\rb c"
    directory.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={NOBODY},group_id={NOBODY}"
    before = Path("/proc/self/mountinfo").read_bytes()
    assert ctypes.CDLL(None).mount(b"nobodys", os.fsencode(directory), b"fuse", 0, options.encode()) == 0
    try:
        (row,) = set(Path("/proc/self/mountinfo").read_bytes().split(b"\n")) - set(before.split(b"\n"))
        _, minor = row.split(b" ")[2].split(b":")
        assert trust.served_by(os.makedev(0, int(minor))) == NOBODY
        # Every row is read, and none of them fails it.
        assert trust.served_by(os.makedev(0, 1 << 19)) is None
        assert cgroup._read("/proc/self/mountinfo").count("\r") == row.count(b"\r")
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        os.close(device)


@root
def test_a_service_below_a_mount_with_a_carriage_return(tmp_path: Path) -> None:
    """Everybody's mount is in every mount table."""
    directory = tmp_path / "a\rb"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        with Process(os.getpid()) as process:
            assert table.Table(process.read("mountinfo")).top
        assert cgroup.processes(os.getpid(), "web.service")
    finally:
        subprocess.run(["umount", directory], check=True)


def test_mounts_on_each_other_however_many() -> None:
    """A service that may mount puts one upon the other on a directory of its `/etc`; recursion ended at a thousand."""
    rows = ["1 1 0:1 / / rw - tmpfs a rw", "2 1 0:2 / /etc rw - tmpfs a rw"]
    rows += [f"{number + 3} {number + 2} 0:3 / /etc/a rw - tmpfs a rw" for number in range(5000)]
    found = table.Table("\n".join(rows))
    assert found.carries(found.top, found.top)


def test_lines_of_an_extension_release_end_as_systemd_has_it() -> None:
    """Written on Windows it was "made for ID=debian\\r": parse_env_file() ends a line at either."""
    wanted = {"ID": "debian", "VERSION_ID": "13", "NAME": "a\rb"}
    assert parse_os_release('ID=debian\r\nVERSION_ID="13"\rNAME="a\rb"\r\n') == wanted


# A million bytes each; what copies all it has at every step needs minutes for them.
LONG = {
    "lines that go on": ("parse", "\\\n" * 500_000),
    "a word": ("split", "x" * 1_000_000),
    "a word between quotes": ("split", '"' + "x" * 1_000_000 + '"'),
    "a time span": ("time_span", "1us " * 250_000),
    "a list": ("values", "[Service]\n" + "A=b\n" * 250_000),
    "quotes that are not closed": ("os_release", 'A="\\"\n' * 200_000),
    "apostrophes": ("os_release", "A='\n\"" * 200_000),
}
LIMIT_SEC = 20
"""Of the processor's time, for what takes less than two seconds."""


@pytest.mark.parametrize("case", LONG)
def test_a_million_bytes_are_read_in_one_go(case: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"from fuzz.test_findings import read; read({case!r})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SEC, LIMIT_SEC)),
        check=True,
    )


def read(case: str) -> None:
    """In a process of its own, which the kernel ends when it takes too long."""
    how, text = LONG[case]
    if how == "parse":
        syntax.parse(text, "/a")
    elif how == "values":
        assert len(syntax.assigned(syntax.parse(text, "/a").assignments, "Service", "A")) == 250_000
    elif how == "os_release":
        parse_os_release(text)
    elif how == "split":
        assert len(values.split(text)) == 1
    else:
        assert values.time_span(text) == 250_000
