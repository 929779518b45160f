# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client, and servers that only look like the daemon; see test_server.py for the daemon's own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import CHECKOUT
from watcher.control.client import Client, Disconnected, NotRunning, TimedOut
from watcher.records import schema
from watcher.records.schema import Failed


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
