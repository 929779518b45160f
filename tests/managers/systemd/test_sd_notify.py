# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the service manager hears on $NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from watcher.managers.systemd import sd_notify


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield sock


def test_ready_carries_the_status_line(manager: socket.socket) -> None:
    sd_notify.ready("12 services")
    assert manager.recv(4096) == b"READY=1\nSTATUS=12 services"


def test_start_up_is_over_once_it_was_said(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd_notify, "_complete", False)
    assert sd_notify.is_starting()
    sd_notify.ready()
    assert not sd_notify.is_starting()
    monkeypatch.setattr(sd_notify, "_complete", False)
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not sd_notify.is_starting()


def test_a_status_stays_on_one_line(manager: socket.socket) -> None:
    sd_notify.status("one\nREADY=1")
    assert manager.recv(4096) == b"STATUS=one READY=1"


def test_reloading_says_since_when(manager: socket.socket) -> None:
    sd_notify.reloading()
    first, second = manager.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_an_abstract_socket_is_reached_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"confext-watcher-test-{os.getpid()}"
        sock.bind("\0" + name)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        sd_notify.stopping()
        assert sock.recv(4096) == b"STOPPING=1"


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify.ready("nobody listens")


def test_an_unusable_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    with pytest.raises(ValueError, match="vsock:2:1234"):
        sd_notify.ready()


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        pytest.param("30000000", str(os.getpid()), 30.0, id="30000000-own-30.0"),
        ("30000000", "", 30.0),
        ("30000000", "1", None),
        ("0", "", None),
        ("", "", None),
        ("soon", "", None),
    ],
)
def test_the_watchdog_is_only_ours_if_it_says_so(
    usec: str, pid: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert sd_notify.watchdog_interval() == expected


async def test_signs_of_life_come_twice_per_interval(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with trio.move_on_after(14):
        await sd_notify.keep_alive()
    assert [manager.recv(64) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    with pytest.raises(BlockingIOError):
        manager.recv(64)


def test_a_manager_that_does_not_read_is_told_in_the_end(manager: socket.socket) -> None:
    """Nothing here waits: it would be for ever."""
    for number in range(50):
        sd_notify.status(f"{number}")
    sd_notify.ready()
    manager.settimeout(30)
    assert [manager.recv(4096) for _ in range(50)] == [f"STATUS={number}".encode() for number in range(50)]
    assert manager.recv(4096) == b"READY=1"
