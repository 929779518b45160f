# SPDX-License-Identifier: LGPL-2.1-or-later
"""That nothing systemd does while it is being asked is missed; a real one is followed in tests/beds/.

Covers managers/systemd/executor.py, managers/systemd/unit_ends.py and managers/systemd/journal_entries.py, too.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from jeepney import DBusAddress, new_signal

from watcher.images.stacks import Stacks
from watcher.managers.systemd import dbus, tracker
from watcher.managers.systemd.systemd1 import Systemd1, unit_path
from watcher.managers.systemd.tracker import Tracker
from watcher.managers.systemd.unit_ends import has_failed
from watcher.managers.systemd.wire import Received
from watcher.model import Stack


class Host(Systemd1):
    """systemd with units that can be started between any two answers of it.

    Attributes:
        before: what happens on the host before a question is answered, by the question; once.
    """

    def __init__(self, base: Path) -> None:
        self.units, self.state = base / "units", base / "state"
        self.units.mkdir()
        self.tracker = Tracker(str(self.state))
        self.before: dict[str, Callable[[], None]] = {}
        self.asked: list[str] = []
        self.pids: dict[str, int] = {}
        self.sockets: dict[str, list[str]] = {}
        self._loaded: set[str] = set()
        self._followed: set[str] = set()

    def unit_file(self, name: str) -> None:
        (self.units / name).write_text("[Service]\nExecStart=/bin/true\n")
        (self.units / f"{name}.confext.d").mkdir()
        self._loaded.add(name)

    def start(self, name: str) -> None:
        """Start a unit, which systemd tells to those that have asked for it."""
        if name not in self._loaded:
            self._loaded.add(name)
            self.tracker.note(_signal("UnitNew", "/", name, unit_path(name)))
        self.pids[name] = os.getpid()
        if name in self._followed:
            self.tracker.note(_changed(name, os.getpid()))

    async def update(self) -> None:
        """As often as there is something to look at."""
        while self.tracker._news.is_set() or self.tracker._everything:
            await self.tracker.update(self)

    async def follow(self) -> None:
        """For ever."""
        while True:
            await self.update()
            await self.tracker.news()

    def main(self, name: str) -> int:
        """PID of the main process, as it is known."""
        process = self.tracker.services[name].main
        return process.pid if process else 0

    def _is_asked(self, question: str) -> None:
        self.asked.append(question)
        self.before.pop(question, lambda: None)()

    async def unit_paths(self) -> tuple[str, ...]:
        self._is_asked("UnitPath")
        return (str(self.units),)

    async def manager(self, member: str, signature: str = "", *arguments: Any, timeout: float = 30.0) -> Any:
        self._is_asked(member)

    async def loaded(self, patterns: Iterable[str]) -> dict[str, str]:
        prefixes = tuple(pattern.partition("*")[0] for pattern in patterns)
        assert prefixes, "no pattern at all matches everything"
        names = sorted(name for name in self._loaded if name.startswith(prefixes))
        units = {name: "active" if name in self.pids else "inactive" for name in names if "@." not in name}
        self._is_asked("ListUnits")
        return units

    async def follow_units(self, names: Iterable[str]) -> None:
        self._is_asked("AddMatch")
        self._followed = set(names)

    async def get(self, unit: str, name: str) -> Any:
        pid = self.pids.get(unit, 0)
        values = {"ActiveState": "inactive", "SubState": "dead", "TriggeredBy": self.sockets.get(unit, [])}
        self._is_asked(name)
        return values.get(name, pid)

    async def invocation(self, unit: str) -> str:
        return "1" * 32


def _signal(member: str, path: str, *strings: str) -> Received:
    message = new_signal(DBusAddress(path, interface="a.b"), member, "s" * len(strings), strings)
    return Received(message.serialise(serial=1))


def _changed(name: str, pid: int) -> Received:
    body = "a.b", {"MainPID": ("u", pid)}, []
    message = new_signal(DBusAddress(unit_path(name), interface="a.b"), "PropertiesChanged", "sa{sv}as", body)
    return Received(message.serialise(serial=1))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    async def run_sync(function: Callable[..., object], *arguments: object) -> object:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    # A thread takes time that a clock which jumps knows nothing of.
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    host = Host(tmp_path)
    yield host
    host.tracker.close()


@pytest.mark.parametrize("question", ["MainPID", "ActiveState", "SubState"])
async def test_a_start_while_the_same_unit_is_being_asked_about(host: Host, question: str) -> None:
    host.unit_file("web.service")
    await host.update()
    host.before[question] = lambda: host.start("web.service")
    host.tracker.look_at("web.service")
    await host.update()
    assert host.main("web.service") == os.getpid()


async def test_a_service_that_tells_its_state_and_is_the_same_as_before_is_not_asked_about(
    host: Host,
) -> None:
    host.unit_file("web.service")
    host.start("web.service")
    await host.update()
    host.asked.clear()
    host.tracker.note(_changed("web.service", os.getpid()))
    assert not host.tracker._news.is_set()
    with subprocess.Popen(["sleep", "infinity"]) as other:
        host.pids["web.service"] = other.pid
        host.tracker.note(_changed("web.service", other.pid))
        await host.update()
        assert host.main("web.service") == other.pid
        # systemd reaps it after we have seen its end: what it tells now may be of before.
        other.kill()
        other.wait()
    host.pids["web.service"] = 0
    host.tracker.note(_changed("web.service", other.pid))
    await host.update()
    assert host.main("web.service") == 0


@pytest.mark.parametrize("question", ["AddMatch", "ListUnits"])
async def test_a_start_while_all_units_are_being_asked_about(host: Host, question: str) -> None:
    host.unit_file("web.service")
    host.before[question] = lambda: host.start("web.service")
    await host.update()
    assert host.main("web.service") == os.getpid()


@pytest.mark.parametrize("question", ["AddMatch", "ListUnits"])
async def test_an_instance_that_starts_while_all_units_are_being_asked_about(
    host: Host, question: str
) -> None:
    host.unit_file("web@.service")
    host.before[question] = lambda: host.start("web@one.service")
    await host.update()
    assert host.main("web@one.service") == os.getpid()


async def test_the_server_of_one_connection_does_not_have_all_files_read_again(host: Host) -> None:
    host.unit_file("echo@.service")
    await host.update()
    host.asked.clear()
    for number in range(3):
        host.sockets[f"echo@{number}.service"] = ["echo.socket"]
        host.start(f"echo@{number}.service")
        await host.update()
    assert "UnitPath" not in host.asked and list(host.tracker.services) == ["echo@.service"]
    host.start("echo@by-hand.service")
    await host.update()
    assert host.main("echo@by-hand.service") == os.getpid()
    assert sorted(host.tracker.services) == ["echo@.service", "echo@by-hand.service"]


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        dbus.Error("org.freedesktop.DBus.Error.UnknownObject", ""),
        ValueError(),
    ],
)
@pytest.mark.parametrize("question", ["MainPID", "ListUnits"])
async def test_what_cannot_be_found_out_costs_nobody_else_anything_and_is_tried_again(
    host: Host, question: str, error: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    for name in ("a.service", "b.service"):
        host.unit_file(name)
        host.start(name)
    if question == "MainPID":
        host.before[question] = lambda: fail(error)
        await host.update()
        assert (host.main("b.service"), "a.service" in host.tracker.services) == (os.getpid(), False)
    else:
        await host.update()
        host.unit_file("c.service")
        host.start("c.service")
        host.before[question] = lambda: fail(error)
        host.tracker.look_at_everything()
        await host.update()
        assert host.main("a.service") == os.getpid()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.follow)
        await trio.sleep(60)
        assert [host.main(name) for name in host.pids] == [os.getpid()] * len(host.pids)
        asked = len(host.asked)
        await trio.sleep(3600)
        assert len(host.asked) == asked
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [dbus.BusLost(), dbus.Error("org.freedesktop.DBus.Error.NoReply", "")])
async def test_a_systemd_that_cannot_be_reached_is_for_whoever_holds_the_connection(
    host: Host, error: Exception
) -> None:
    host.unit_file("web.service")
    host.start("web.service")
    host.before["MainPID"] = lambda: fail(error)
    with pytest.raises(type(error)):
        await host.update()
    await host.update()
    assert host.main("web.service") == os.getpid()


@pytest.mark.parametrize("takes", [0.03, 1.0, 30.0])
async def test_an_executor_that_waits_for_long_is_looked_at_less_and_less(
    host: Host, takes: float, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    looks: list[float] = []
    begun = trio.current_time()

    def is_executor(process: object) -> bool:
        looks.append(trio.current_time())
        return trio.current_time() < begun + takes

    monkeypatch.setattr(tracker, "is_executor", is_executor)
    host.unit_file("web.service")
    host.start("web.service")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.follow)
        await trio.sleep(takes * 1.3 + 0.01)
        assert host.main("web.service") == os.getpid()
        assert len(looks) < 50
        looks.clear()
        await trio.sleep(3600)
        assert not looks
        nursery.cancel_scope.cancel()


async def test_a_systemd_that_starts_anew_while_it_is_subscribed_to_is_subscribed_to_again(
    host: Host,
) -> None:
    host.unit_file("web.service")
    anew = _signal("NameOwnerChanged", "/", "org.freedesktop.systemd1", "", ":1.7")
    await host.update()
    host.before["Subscribe"] = lambda: host.tracker.note(anew)
    host.tracker.note(anew)
    await host.update()
    assert host.asked.count("Subscribe") == 2


async def test_a_unit_is_let_go_once_what_it_has_lost_was_said(host: Host) -> None:
    """Nothing in the files changes then: until something does, it would stay in `status`."""
    host.unit_file("a.service")
    await host.update()
    stacks = Stacks(str(host.state))
    stacks.accept("a.service", Stack(), [], change=lambda state: replace(state, replaced="0" * 16))
    (host.units / "a.service.confext.d").rmdir()
    assert await host.tracker.read_files() == {"a.service"}
    await host.update()
    assert not host.tracker.is_outdated("a.service") and "a.service" in host.tracker.services
    stacks.change("a.service", lambda state: replace(state, replaced=None))
    assert host.tracker.is_outdated("a.service")
    assert await host.tracker.read_files() == set()
    told: list[str] = []
    host.tracker.changed = told.append
    await host.update()
    assert (told, host.tracker.services) == (["a.service"], {})
    assert not host.tracker.is_outdated("a.service")


async def test_what_stands_in_the_files_counts_without_a_question_to_systemd(host: Host) -> None:
    for name in ("a.service", "b.service"):
        host.unit_file(name)
        host.start(name)
    await host.update()
    told: list[str] = []
    host.tracker.changed = told.append
    host.asked.clear()
    assert not host.tracker.is_outdated("a.service")
    drop_in = host.units / "a.service.d/check.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[X-Confext]\nCheck=/bin/true\n")
    assert host.tracker.is_outdated("a.service")
    assert await host.tracker.read_files() == {"a.service", "b.service"}
    assert host.tracker.services["a.service"].settings.check == ("/bin/true",)
    assert (told, host.asked, host.main("a.service")) == (["a.service"], [], os.getpid())
    assert not host.tracker.is_outdated("a.service")
    # Which units take part is looked at with systemd.
    drop_in.write_text("[X-Confext]\nEnabled=no\n")
    assert await host.tracker.read_files() == {"b.service"}
    await host.update()
    assert list(host.tracker.services) == ["b.service"]
    assert str(drop_in.parent) in [one.path for one in host.tracker.interests()]
    drop_in.write_text("[X-Confext]\n")
    await host.tracker.read_files()
    await host.update()
    assert sorted(host.tracker.services) == ["a.service", "b.service"]


async def test_files_that_change_while_all_units_are_being_asked_about(host: Host) -> None:
    for name in ("a.service", "b.service"):
        host.unit_file(name)
    await host.update()
    host.unit_file("c.service")
    (host.units / "b.service.confext.d").rmdir()
    async with trio.open_nursery() as nursery:
        host.before["AddMatch"] = lambda: nursery.start_soon(host.tracker.read_files)
        host.tracker.look_at_everything()
        await host.update()
    await host.update()
    assert list(host.tracker.services) == ["a.service", "c.service"]


@pytest.mark.parametrize(
    ("state", "detail", "result", "failed"),
    [
        ("failed", "failed", "exit-code", True),
        ("activating", "auto-restart", "signal", True),
        ("activating", "auto-restart-queued", "signal", True),
        (
            "deactivating",
            "stop-sigterm",
            "signal",
            True,
        ),  # its main process died, and systemd ends the others
        ("deactivating", "stop-post", "exit-code", True),
        ("deactivating", "stop-sigterm", "success", False),  # it is being stopped
        ("inactive", "dead", "success", False),
        ("activating", "start-pre", "success", False),
    ],
)
async def test_a_unit_went_down_by_itself(state: str, detail: str, result: str, failed: bool) -> None:
    class Asked:
        async def get(self, unit: str, name: str) -> str:
            return {"SubState": detail, "Result": result}[name]

    assert await has_failed(cast(Systemd1, Asked()), "web.service", state) is failed
