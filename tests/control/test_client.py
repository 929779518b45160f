# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client, and servers that only look like the daemon; see test_server.py for the daemon's own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import CHECKOUT
from watcher.control import client as calls
from watcher.control.client import Client, Closed, Disconnected, NotRunning, TimedOut
from watcher.model import Event, Outcome
from watcher.records import schema
from watcher.records.schema import Answer, Failed, Waited, to_dict


@pytest.fixture
def directory() -> Iterator[Path]:
    """A path short enough to be an address as it is."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_without_a_daemon_the_client_says_so(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotRunning, match="not running"):
            Client(str(missing))


@pytest.mark.parametrize("answer", [b"", b"half", b"rubbish\0", b"[]\0", b"[" * 100_000 + b"\0"])
def test_the_client_survives_a_server_that_talks_nonsense(directory: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / schema.SOCKET))
        listener.listen()
        with Client(str(directory), timeout=60) as client:
            server, _ = listener.accept()
            with server:
                server.sendall(answer)
            with pytest.raises(Disconnected):
                client.status()


@pytest.mark.parametrize(
    "reply",
    [
        {"error": "org.varlink.service.MethodNotFound", "parameters": {"method": "Status"}},
        {"error": "io.confext.Watcher.ServiceNotFound", "parameters": {"colour": "red"}},
        {"parameters": {}},
        {"parameters": {"services": [{"service": 5}]}},
    ],
)
def test_the_client_survives_a_daemon_of_another_version(directory: Path, reply: object) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / schema.SOCKET))
        listener.listen()
        with Client(str(directory), timeout=60) as client:
            server, _ = listener.accept()
            with server:
                server.sendall(json.dumps(reply).encode() + b"\0")
                with pytest.raises(Failed, match="another version"):
                    client.status()


def test_a_daemon_that_knows_no_deep_look_is_asked_without(directory: Path) -> None:
    unknown = {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": "deep"}}
    known = {"services": [{"service": "web.service", "manager": "systemd", "state": "running"}]}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / schema.SOCKET))
        listener.listen()
        with Client(str(directory), timeout=60) as client:
            server, _ = listener.accept()
            with server:
                for reply in (unknown, {"parameters": known}):
                    server.sendall(json.dumps(reply).encode() + b"\0")
                (found,) = client.status("web.service", deep=True)
                asked = server.recv(1 << 16).rstrip(b"\0").split(b"\0")
    assert [json.loads(one)["parameters"].get("deep") for one in asked] == [True, None]
    assert (found.newer, found.step, found.entries) == ((), "", ())


def test_the_client_does_not_wait_for_ever_to_connect(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(directory / schema.SOCKET))
        listener.listen(0)
        with pytest.raises(TimedOut):
            for _ in range(3):
                stack.enter_context(contextlib.closing(Client(str(directory), timeout=0.05)))


def test_the_client_starts_without_trio_and_varlink() -> None:
    code = "import sys, watcher.control.client; print({'trio', 'varlink', 'sqlite3', 'structlog'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.stdout == "set()\n"


# wait, and a daemon that is being restarted


def waited(kind: str, status: int) -> Waited:
    return Waited(Event("web.service", Outcome.UNCHANGED, kind, when=1), Answer(kind, status, kind))


def listen(directory: Path) -> socket.socket:
    """A daemon's socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / schema.SOCKET))
    listener.listen()
    return listener


def serve(listener: socket.socket, *answers: Waited) -> None:
    """One daemon: it takes one call, gives these answers, and ends."""
    with listener:
        server, _ = listener.accept()
        with server:
            received = server.recv(1 << 16)
            assert received.endswith(b"\0") and b"Wait" in received
            Path(listener.getsockname()).unlink()
            for one in answers:
                reply = {
                    "parameters": to_dict(one) | {"redacted": False},
                    "continues": one.answer.status == 4,
                }
                server.sendall(json.dumps(reply).encode() + b"\0")


@pytest.mark.parametrize("timeout", [60, None])
def test_a_daemon_that_ends_during_a_wait_has_time_to_come_back(
    directory: Path, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, before, after = threading.Event(), waited("checking", 4), waited("applied", 0)

    def restarted(listener: socket.socket | None = None) -> None:
        serve(listener or listen(directory), before)
        serve(listen(directory), after)

    if timeout is None:  # it must run then
        daemon = threading.Thread(target=restarted, args=(listen(directory),))
        daemon.start()
        found = list(calls.wait(str(directory), "web.service", "web_1.raw", None, lambda _: None))
    else:
        daemon = threading.Thread(target=restarted)
        slept: list[float] = []
        monkeypatch.setattr(
            calls.time, "sleep", lambda seconds: slept.append(seconds) or started.wait(seconds)
        )
        threading.Timer(0.3, daemon.start).start()
        found = list(calls.wait(str(directory), "web.service", "web_1.raw", timeout, lambda _: None))
        assert slept
    daemon.join()
    assert found == [before, after]


def test_a_daemon_that_does_not_run_is_waited_for_no_longer_than_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(calls.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(calls.time, "sleep", sleep)
    with pytest.raises(NotRunning):
        list(calls.wait(str(directory), "web.service", "web_1.raw", 40, lambda _: None))
    assert 39 < clock[0] <= 40
    with pytest.raises(NotRunning):
        list(calls.wait(str(directory), "web.service", "web_1.raw", None, lambda _: None))
    assert clock[0] <= 40


def test_a_daemon_that_ended_for_good_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "RESTART_SEC", 0.2)
    daemon = threading.Thread(target=serve, args=(listen(directory), waited("checking", 4)))
    daemon.start()
    found: list[Waited] = []
    with pytest.raises((NotRunning, Closed)):
        found.extend(calls.wait(str(directory), "web.service", "web_1.raw", None, lambda _: None))
    daemon.join()
