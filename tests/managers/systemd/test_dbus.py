# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls, signals and the loss of the connection, against a bus of our own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from jeepney import HeaderFields, MatchRule, Message

from support.needs import tool, which
from watcher.managers.systemd import dbus

pytestmark = tool("dbus-daemon")

CONFIGURATION = """<busconfig>
  <type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/><allow user="*"/>
  </policy>
</busconfig>"""


@dataclass
class Daemon:
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:path={self.directory}/bus"

    def start(self) -> None:
        configuration = self.directory / "bus.conf"
        configuration.write_text(CONFIGURATION.format(path=self.directory / "bus"))
        program = which("dbus-daemon")
        assert program
        arguments = [program, f"--config-file={configuration}", "--nofork", "--print-address"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert self.process.stdout
        self.process.stdout.readline()  # the address: it listens

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    daemon.start()
    yield daemon
    daemon.stop()


async def list_names(bus: dbus.Bus) -> list[str]:
    (names,) = await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "ListNames")
    return list(names)


async def request_name(bus: dbus.Bus, name: str) -> None:
    await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "RequestName", "su", name, 0)


def ignore(message: Message) -> None:
    pass


async def test_a_call_gives_its_reply(daemon: Daemon) -> None:
    async with dbus.connect(ignore, daemon.address) as bus:
        assert dbus.BUS in await list_names(bus)


async def test_a_property_comes_without_its_wrapping(daemon: Daemon) -> None:
    async with dbus.connect(ignore, daemon.address) as bus:
        features = await bus.get(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "Features")
        assert isinstance(features, list)


async def test_an_error_has_the_name_and_the_words_of_the_other_side(daemon: Daemon) -> None:
    async with dbus.connect(ignore, daemon.address) as bus:
        with pytest.raises(dbus.Error, match=r"Could not get owner of name 'a\.b'") as raised:
            await bus.call(dbus.BUS, "/org/freedesktop/DBus", dbus.BUS, "GetNameOwner", "s", "a.b")
        assert raised.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


async def test_no_service_is_started_by_asking_for_it(daemon: Daemon) -> None:
    async with dbus.connect(ignore, daemon.address) as bus:
        with pytest.raises(dbus.Error) as raised:
            await bus.call("com.example.Nobody", "/", "com.example.Nobody", "Hello")
        assert raised.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


async def test_a_reply_that_does_not_come_is_an_error(daemon: Daemon) -> None:
    async with dbus.connect(ignore, daemon.address) as bus, dbus.connect(ignore, daemon.address) as silent:
        await request_name(silent, "com.example.Silent")
        with pytest.raises(dbus.Error, match=r"no reply within 0\.01 s"):
            await bus.call("com.example.Silent", "/", "com.example.Silent", "Hello", timeout=0.01)
        assert await list_names(bus)


async def test_no_signal_is_dropped_however_many_come_at_once(daemon: Daemon) -> None:
    seen: list[str] = []
    done = trio.Event()

    def note(message: Message) -> None:
        if message.header.fields[HeaderFields.member] == "NameOwnerChanged":
            seen.append(message.body[0])
            if message.body[0] == "com.example.Last" and message.body[2]:
                done.set()

    async with dbus.connect(note, daemon.address) as bus, dbus.connect(ignore, daemon.address) as other:
        await bus.add_match(MatchRule(type="signal", sender=dbus.BUS, member="NameOwnerChanged"))
        names = [f"com.example.Name{number}" for number in range(400)]
        for name in names:
            await request_name(other, name)
        await request_name(other, "com.example.Last")
        with trio.fail_after(60):
            await done.wait()
    assert [name for name in seen if "Name" in name] == names


async def test_what_is_no_longer_asked_for_does_not_come(daemon: Daemon) -> None:
    seen: list[str] = []

    def note(message: Message) -> None:
        if message.header.fields[HeaderFields.member] == "NameOwnerChanged":
            seen.append(message.body[0])

    rule = MatchRule(type="signal", sender=dbus.BUS, member="NameOwnerChanged")
    async with dbus.connect(note, daemon.address) as bus:
        await bus.add_match(rule)
        await request_name(bus, "com.example.First")
        await bus.remove_match(rule)
        await request_name(bus, "com.example.Second")
        await list_names(bus)
    assert seen == ["com.example.First"]


async def test_the_end_of_the_bus_ends_the_block_and_every_call(daemon: Daemon) -> None:
    outcomes: list[str] = []

    async def call(bus: dbus.Bus) -> None:
        try:
            await bus.call("com.example.Silent", "/", "com.example.Silent", "Hello", timeout=60)
        except dbus.BusLost:
            outcomes.append("lost")

    async with trio.open_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as raised:
            async with (
                dbus.connect(ignore, daemon.address) as silent,
                dbus.connect(ignore, daemon.address) as bus,
            ):
                await request_name(silent, "com.example.Silent")
                nursery.start_soon(call, bus)
                await trio.testing.wait_all_tasks_blocked()
                daemon.stop()
                await trio.sleep_forever()
    assert raised.value.split(dbus.BusLost)[1] is None
    assert outcomes == ["lost"]
    with pytest.raises(dbus.BusLost):
        await list_names(bus)


async def test_nobody_at_the_address_is_a_lost_connection(tmp_path: Path) -> None:
    with pytest.raises(dbus.BusLost, match="no connection"):
        async with dbus.connect(ignore, f"unix:path={tmp_path}/none"):
            pass


async def test_a_bus_that_hangs_up_at_once_is_a_lost_connection(tmp_path: Path) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    path = str(tmp_path / "bus")
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with listener:
        await listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, hang_up, [trio.SocketListener(listener)])
            with pytest.raises(dbus.BusLost):
                async with dbus.connect(ignore, f"unix:path={path}"):
                    pass
            nursery.cancel_scope.cancel()
