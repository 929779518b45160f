# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control socket (control/transport.py, control/conversation.py), its clients and answers; the daemon is a fake."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import structlog
import trio
import trio.testing

from beds.roots import SUITES, cache_directory
from support import CHECKOUT
from support.needs import root, which
from watcher.control import peers, server, transport
from watcher.control.client import Client, NotRunning, TimedOut
from watcher.control.trace_process import Asked
from watcher.model import Event, Kind, Layer, Outcome
from watcher.records import schema
from watcher.records.schema import (
    ALL_OUTCOMES,
    Answer,
    CallError,
    Failed,
    NoSuchStack,
    Quarantined,
    ServiceNotFound,
    ServiceStatus,
    Waited,
    Which,
)

NGINX = "nginx.service"
LAYER = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw")
APPLIED = Event(NGINX, Outcome.APPLIED, "applied", when=1, output="secret\n", layers=(LAYER,))
REFUSED = Event(NGINX, Outcome.REFUSED, "refused", when=2)
STATUS = ServiceStatus(
    NGINX, "standalone", "running", pid=7, stack="0123456789abcdef", layers=(LAYER,), last=APPLIED
)
PLANNED = schema.PlannedChange(NGINX, False, report=json.dumps({"name": "\udcff\n\x1b"}, indent=2))
BAD = Quarantined(NGINX, "d" * 64, "nginx -t failed", 5)


class Backend:
    """Services that exist only in words; what it was asked is in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.events: list[Event] = [APPLIED, REFUSED]
        self.waiting = trio.Event()
        self.ended = trio.Event()
        self.verdict = trio.Event()
        self.rolled_back = trio.Event()

    async def status(self, service: str | None, *, deep: bool) -> Sequence[ServiceStatus]:
        self.calls.append(("status", service))
        if service not in (None, NGINX):
            raise ServiceNotFound(service)
        return [STATUS]

    async def history(self, service: str | None, limit: int, which: Which) -> Sequence[Event]:
        self.calls.append(("history", service, limit, *([which] if which != ALL_OUTCOMES else [])))
        return self.events[:limit]

    async def plan(self, service: str | None, *, debug: bool, check: bool) -> Sequence[schema.PlannedChange]:
        self.calls.append(("plan", service, debug))
        if service is None:
            raise ZeroDivisionError("not a CallError")
        return [PLANNED]

    async def wait(
        self, service: str, image: str, tell: server.TellWaited, waits: Callable[[], None]
    ) -> Waited:
        self.calls.append(("wait", service, image))
        waits()
        self.waiting.set()
        try:
            half = Event(NGINX, Outcome.INCOMPLETE, "half of it", when=1)
            await tell(Waited(half, Answer("incomplete", 4, half.message)))
            await self.verdict.wait()
            return Waited(REFUSED, Answer("refused", 1, REFUSED.message, "chmod it"))
        finally:
            self.ended.set()

    async def rollback(self, service: str, to: str | None, by: str, tell: server.Tell) -> Event:
        if to == "absent":
            raise NoSuchStack(service, to)
        await tell(Event(NGINX, Outcome.REQUESTED, f"asked for by {by}", when=1))
        self.waiting.set()
        await self.verdict.wait()
        self.rolled_back.set()
        return APPLIED

    async def forget(self, service: str, digest: str | None, by: str) -> Sequence[Quarantined]:
        self.calls.append(("forget", service, digest))
        return [BAD]

    async def trace(self, asked: Asked) -> BinaryIO:
        raise AssertionError

    async def reload(self) -> None:
        self.calls.append(("reload",))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A runtime directory that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def backend(directory: Path) -> AsyncIterator[Backend]:
    """A server with this backend, for the length of the test."""
    made = Backend()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, made, str(directory), peers.Readers())
        yield made
        nursery.cancel_scope.cancel()


async def connected(directory: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(directory / schema.SOCKET))


async def said(stream: trio.SocketStream) -> dict[str, Any]:
    """The next reply."""
    received = bytearray()
    while not received.endswith(b"\0"):
        more = await stream.receive_some(1)
        assert more, "the connection was closed"
        received += more
    reply = json.loads(received[:-1])
    assert isinstance(reply, dict)
    return reply


async def asked(
    stream: trio.SocketStream, method: str, parameters: object = None, **flags: bool
) -> dict[str, Any]:
    await stream.send_all(call(method, parameters, **flags))
    return await said(stream)


def call(method: str, parameters: object = None, **flags: bool) -> bytes:
    name = method if "." in method else f"{schema.INTERFACE}.{method}"
    return json.dumps({"method": name, "parameters": parameters, **flags}).encode() + b"\0"


async def by_client(directory: Path, ask: Callable[[Client], Any]) -> Any:
    """What the blocking client gets, in a thread."""

    def run() -> Any:
        with Client(str(directory), timeout=60) as client:
            return ask(client)

    return await trio.to_thread.run_sync(run)


async def ended(stream: trio.SocketStream) -> bool:
    """Reads to the end; whether there was nothing before it."""
    try:
        return await stream.receive_some() == b""
    except trio.BrokenResourceError:
        return True


# What it answers


async def test_the_client_gets_what_the_backend_says(backend: Backend, directory: Path) -> None:
    assert await by_client(directory, lambda client: client.status()) == [STATUS]
    assert await by_client(directory, lambda client: client.history(limit=1)) == [APPLIED]
    assert await by_client(directory, lambda client: client.forget(NGINX, "d" * 64)) == [BAD]
    await by_client(directory, lambda client: client.call("Reload"))
    assert backend.calls == [("status", None), ("history", None, 1), ("forget", NGINX, "d" * 64), ("reload",)]


async def test_a_report_is_made_where_it_is_asked_for_and_travels_as_it_is(
    backend: Backend, directory: Path
) -> None:
    assert await by_client(directory, lambda client: client.plan(NGINX, debug=True)) == [PLANNED]
    await by_client(directory, lambda client: client.plan(NGINX))
    await by_client(directory, lambda client: client.call("Plan", service=NGINX, debug=False))
    assert backend.calls == [("plan", NGINX, True), ("plan", NGINX, False), ("plan", NGINX, False)]


async def test_a_report_is_of_one_service(backend: Backend, directory: Path) -> None:
    async with await connected(directory) as stream:
        reply = await asked(stream, "Plan", {"debug": True})
    assert reply["error"] == "org.varlink.service.InvalidParameter"
    assert reply["parameters"] == {"parameter": "service"}
    assert backend.calls == []


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda client: client.status("absent.service"), ServiceNotFound),
        (lambda client: list(client.rollback(NGINX, "absent")), NoSuchStack),
        (lambda client: client.call("Nonsense"), Failed),
        (lambda client: client.call("Status", service=5), Failed),
    ],
)
async def test_errors_travel(
    backend: Backend, directory: Path, ask: Callable[[Client], Any], error: type[CallError]
) -> None:
    with pytest.raises(error):
        await by_client(directory, ask)


async def test_a_mistake_in_the_backend_is_logged_and_answered(backend: Backend, directory: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        stream = await connected(directory)
        reply = await asked(stream, "Plan")
    assert reply["error"] == "io.confext.Watcher.Failed"
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert (await asked(stream, "Status"))["parameters"]["services"][0]["service"] == NGINX
    await stream.aclose()


@pytest.mark.parametrize(
    ("method", "parameters", "error", "about"),
    [
        ("Nonsense", {}, "MethodNotFound", {"method": "Nonsense"}),
        ("com.example.Other.Status", {}, "InterfaceNotFound", {"interface": "com.example.Other"}),
        ("Status", {"service": 5}, "InvalidParameter", {"parameter": "service"}),
        ("Status", {"colour": "red"}, "InvalidParameter", {"parameter": "colour"}),
        ("Wait", {"service": NGINX}, "InvalidParameter", {"parameter": "image"}),
        ("Wait", None, "InvalidParameter", {"parameter": "service"}),
        ("History", {"limit": "many"}, "InvalidParameter", {"parameter": "limit"}),
        ("History", {"limit": 1e999}, "InvalidParameter", {"parameter": "limit"}),
        ("org.varlink.service.GetInterfaceDescription", {}, "InvalidParameter", {"parameter": "interface"}),
        ("org.varlink.service.Nonsense", {}, "MethodNotFound", {"method": "Nonsense"}),
        (".", {}, "InterfaceNotFound", {"interface": ""}),
    ],
)
async def test_wrong_calls_get_varlinks_own_errors(
    backend: Backend, directory: Path, method: str, parameters: object, error: str, about: object
) -> None:
    async with await connected(directory) as stream:
        raw = call(method, parameters).replace(b"Infinity", b"1e999")
        await stream.send_all(raw)
        assert await said(stream) == {"error": f"org.varlink.service.{error}", "parameters": about}
        # And the connection goes on.
        assert "parameters" in await asked(stream, "Status", {"service": None})


async def test_what_is_asked_of_the_history_reaches_it(backend: Backend, directory: Path) -> None:
    which = Which(("refused",), 1_700_000_000_000_000, "web_1.4.raw")
    assert await by_client(directory, lambda client: client.history(NGINX, 5, which)) == backend.events
    assert backend.calls == [("history", NGINX, 5, which)]


@pytest.mark.parametrize(
    "wrong",
    [{"outcomes": "refused"}, {"outcomes": [1]}, {"since": "x"}, {"image": [3]}],
    ids=str,
)
async def test_what_cannot_be_asked_of_the_history_is_said(
    backend: Backend, directory: Path, wrong: dict[str, object]
) -> None:
    with pytest.raises(CallError):
        await by_client(directory, lambda client: client.call("History", **wrong))
    assert backend.calls == []


@pytest.mark.parametrize("limit", [-5, 0, 10**30])
async def test_the_limit_of_history_is_brought_into_range(
    backend: Backend, directory: Path, limit: int
) -> None:
    async with await connected(directory) as stream:
        await asked(stream, "History", {"limit": limit})
    assert backend.calls == [("history", None, max(0, min(limit, server.HISTORY_MAX)))]


async def test_a_history_too_big_for_one_reply_is_cut_and_says_so(backend: Backend, directory: Path) -> None:
    backend.events = [Event(NGINX, Outcome.FAILED, "m", when=1, output="\x1b" * 65536)] * server.HISTORY_MAX
    answer = await by_client(directory, lambda client: client.call("History", limit=server.HISTORY_MAX))
    assert answer["truncated"]
    assert 1 < len(answer["events"]) < server.HISTORY_MAX
    assert len(json.dumps(answer)) < schema.MESSAGE_MAX


async def test_names_that_are_not_utf8_can_be_asked_for(backend: Backend, directory: Path) -> None:
    image = os.fsdecode(b"/srv/\xff.raw")
    backend.verdict.set()
    await by_client(directory, lambda client: list(client.wait(NGINX, image)))
    assert backend.calls == [("wait", NGINX, "/srv/\\xff.raw")]


async def test_calls_sent_together_are_answered_in_order(backend: Backend, directory: Path) -> None:
    async with await connected(directory) as stream:
        oneway = call("Forget", {"service": NGINX}, oneway=True)
        await stream.send_all(call("Status") + oneway + call("History") + call("Nonsense", {}, oneway=True))
        await stream.send_all(call("Nonsense"))
        assert "services" in (await said(stream))["parameters"]
        assert "events" in (await said(stream))["parameters"]
        assert "error" in await said(stream)
    assert [name for name, *_ in backend.calls] == ["status", "forget", "history"]


async def test_a_client_that_only_shuts_its_writing_side_is_still_answered(
    backend: Backend, directory: Path
) -> None:
    async with await connected(directory) as stream:
        await stream.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
        await stream.send_eof()
        await backend.waiting.wait()
        await trio.testing.wait_all_tasks_blocked()
        backend.verdict.set()
        assert (await said(stream))["parameters"]["event"]["outcome"] == "refused"
        assert await ended(stream)


# Wait


async def test_wait_with_more_tells_what_happens_on_the_way(backend: Backend, directory: Path) -> None:
    backend.verdict.set()
    told = await by_client(directory, lambda client: list(client.wait(NGINX, "web.raw")))
    assert [one.event.outcome for one in told] == [Outcome.INCOMPLETE, Outcome.REFUSED]
    assert [(one.answer.kind, one.answer.status) for one in told] == [("incomplete", 4), ("refused", 1)]
    assert told[1].answer.command == "chmod it"


async def test_wait_without_more_replies_once(backend: Backend, directory: Path) -> None:
    async with await connected(directory) as stream:
        await stream.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
        await backend.waiting.wait()
        backend.verdict.set()
        reply = await said(stream)
        assert reply["parameters"]["event"]["outcome"] == "refused"
        assert "continues" not in reply


@pytest.mark.parametrize("unread", [b"", call("Status"), b"half a call"])
async def test_wait_ends_when_its_client_goes_away(backend: Backend, directory: Path, unread: bytes) -> None:
    stream = await connected(directory)
    await stream.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}) + unread)
    await backend.waiting.wait()
    assert not backend.ended.is_set()
    await stream.aclose()
    await backend.ended.wait()


async def test_a_rollback_is_finished_when_its_client_goes_away(backend: Backend, directory: Path) -> None:
    stream = await connected(directory)
    await stream.send_all(call("Rollback", {"service": NGINX}))
    await backend.waiting.wait()
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    backend.verdict.set()
    await backend.rolled_back.wait()


async def test_a_waiting_client_holds_up_nobody(backend: Backend, directory: Path) -> None:
    async with await connected(directory) as waiting:
        await waiting.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
        await backend.waiting.wait()
        async with await connected(directory) as stream:
            assert "parameters" in await asked(stream, "Status")
        assert not backend.ended.is_set()


async def test_a_client_that_gives_up_says_that_it_timed_out(backend: Backend, directory: Path) -> None:
    def run() -> None:
        with Client(str(directory), timeout=60) as client:
            answers = client.wait(NGINX, "web.raw")
            next(answers)
            client._deadline = time.monotonic() + 0.01  # not before it has asked, however busy the machine is
            list(answers)

    with pytest.raises(TimedOut) as raised:
        await trio.to_thread.run_sync(run)
    assert raised.value.exit_code == 4
    await backend.ended.wait()


# Hostile clients


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\0",
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"\xff\xfe\0",
        b"[]\0",
        b"5\0",
        b"null\0",
        b'{"parameters":{}}\0',
        b'{"method":5}\0',
        b'{"method":"io.confext.Watcher.Status","parameters":[]}\0',
        b'{"method":"io.confext.Watcher.Status","more":"yes"}\0',
        b'{"method":"io.confext.Watcher.History","parameters":{"limit":NaN}}\0',
        b"[" * 60_000 + b"\0",
        b'{"a":' * 10_000 + b"\0",
        b'{"method":' + b"9" * 60_000 + b"}\0",
        b"x" * (transport.REQUEST_MAX + 100_000),
        pytest.param(os.urandom(50_000) + b"\0", id="random"),
    ],
    ids=lambda rubbish: repr(rubbish[:20]),
)
async def test_rubbish_closes_its_connection_and_nothing_else(
    backend: Backend, directory: Path, rubbish: bytes
) -> None:
    async with await connected(directory) as other:
        async with await connected(directory) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(rubbish)
            assert await ended(stream)
        assert "parameters" in await asked(other, "Status")


@pytest.mark.parametrize("part", [b"", b"{", call("Status")[:-1]])
async def test_half_a_call_hurts_nobody(backend: Backend, directory: Path, part: bytes) -> None:
    stream = await connected(directory)
    if part:
        await stream.send_all(part)
    async with await connected(directory) as other:
        assert "parameters" in await asked(other, "Status")
    await stream.aclose()


async def test_a_call_in_pieces_is_a_call(backend: Backend, directory: Path) -> None:
    async with await connected(directory) as stream:
        for byte in call("Status"):
            await stream.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert "parameters" in await said(stream)


async def test_a_client_that_goes_away_instead_of_reading_hurts_nobody(
    backend: Backend, directory: Path
) -> None:
    backend.events = [Event(NGINX, Outcome.FAILED, "m", when=1, output="x" * 60_000)] * 30
    for _ in range(5):
        stream = await connected(directory)
        await stream.send_all(call("History") * 10)
        await stream.receive_some(1)
        await stream.aclose()
    async with await connected(directory) as other:
        assert "parameters" in await asked(other, "Status")


async def test_a_client_that_does_not_take_its_reply_is_dropped(
    directory: Path, mock_clock: trio.testing.MockClock
) -> None:
    backend = Backend()
    backend.events = [Event(NGINX, Outcome.FAILED, "m", when=1, output="x" * 60_000)] * 30
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, backend, str(directory), peers.Readers())
        stream = await connected(directory)
        await stream.send_all(call("History"))
        # A first byte, so that it is at it; then it waits for us.
        received = bytearray(await stream.receive_some(1))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(transport.SEND_SEC + 1)
        await trio.testing.wait_all_tasks_blocked()
        while more := await stream.receive_some():
            received += more
        assert received and not received.endswith(b"\0")
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_thousand_connections_are_too_many_and_soon_forgotten(
    backend: Backend, directory: Path
) -> None:
    streams = [await connected(directory) for _ in range(1000)]
    await trio.testing.wait_all_tasks_blocked()
    served = 0
    for stream in streams:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(call("Status"))
            served += bool(await stream.receive_some())
    assert served == peers.CONNECTIONS
    for stream in streams:
        await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    async with await connected(directory) as stream:
        assert "parameters" in await asked(stream, "Status")


async def test_being_out_of_descriptors_is_said_once_and_passes(
    backend: Backend, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = trio.SocketListener.accept
    failures = iter([True] * 3)

    async def accept(listener: trio.SocketListener) -> trio.SocketStream:
        stream = await accepted(listener)
        if next(failures, False):
            await stream.aclose()
            raise OSError(24, "Too many open files")
        return stream

    monkeypatch.setattr(trio.SocketListener, "accept", accept)
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            async with await connected(directory) as stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(call("Status"))
                    await stream.receive_some()
    assert [entry["log_level"] for entry in logs] == ["warning"]


# Who may do what


AS_NOBODY = """
    import os, sys
    from watcher.control.client import Client
    from watcher.records.schema import NotPermitted
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    with Client({directory!r}, timeout=60) as client:
        reload = lambda: client.call("Reload")
        for change in (lambda: list(client.rollback("nginx.service")), lambda: client.forget("nginx.service"), reload):
            try:
                change()
            except NotPermitted as error:
                print(error)
        print(client.status()[0].service)
        print([event.output for event in client.history()])
        print([one.event.output for one in client.wait("nginx.service", "web.raw")])
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )


@root
async def test_others_may_read_but_not_change_nor_see_outputs(backend: Backend, directory: Path) -> None:
    backend.verdict.set()
    done = await trio.to_thread.run_sync(run_python, AS_NOBODY.format(directory=str(directory)))
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *(
            f"io.confext.Watcher.{method} is for root and the watcher's own user only"
            for method in ("Rollback", "Forget", "Reload")
        ),
        NGINX,
        "['', '']",
        "['', '']",
    ]
    assert [name for name, *_ in backend.calls] == ["status", "history", "wait"]


async def test_the_watchers_own_user_sees_outputs_and_may_change(backend: Backend, directory: Path) -> None:
    history = await by_client(directory, lambda client: client.history())
    assert [event.output for event in history] == ["secret\n", ""]
    with structlog.testing.capture_logs() as logs:
        await by_client(directory, lambda client: client.forget(NGINX))
    assert logs[0]["event"] == f"forget {NGINX}: asked for by uid {os.getuid()} (pid {os.getpid()})"


# Start and stop


async def test_the_socket_is_there_for_everybody_and_goes_with_the_server(directory: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, Backend(), str(directory), peers.Readers())
        assert [path.name for path in directory.iterdir()] == [schema.SOCKET]
        assert (directory / schema.SOCKET).stat().st_mode & 0o777 == 0o666
        stream = await connected(directory)
        await stream.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
        nursery.cancel_scope.cancel()
    assert list(directory.iterdir()) == []
    assert await ended(stream)
    await stream.aclose()


async def test_the_socket_of_a_killed_daemon_is_replaced(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / schema.SOCKET))
    with pytest.raises(NotRunning) as raised:
        Client(str(directory))
    assert raised.value.exit_code == 3
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, Backend(), str(directory), peers.Readers())
        assert await by_client(directory, lambda client: client.status())
        nursery.cancel_scope.cancel()


async def test_a_long_runtime_directory_is_no_obstacle(directory: Path) -> None:
    deep = directory / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, Backend(), str(deep), peers.Readers())
        assert await by_client(deep, lambda client: client.status())
        nursery.cancel_scope.cancel()


async def test_nothing_is_left_open(directory: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    async with trio.open_nursery() as nursery:
        backend = Backend()
        await nursery.start(server.serve, backend, str(directory), peers.Readers())
        stream = await connected(directory)
        await stream.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
        await backend.waiting.wait()
        await stream.aclose()
        await backend.ended.wait()
        nursery.cancel_scope.cancel()
    assert descriptors() == before


# systemd's own client


def varlinkctl(version: str) -> list[str] | None:
    """The command of this version, from the cached root file system of a container, run where we are."""
    for found in sorted(cache_directory().glob(f"{SUITES[version]}-*/usr/bin/varlinkctl")):
        libraries = found.parent.parent / "lib" / f"{os.uname().machine}-linux-gnu"
        for loader in libraries.glob("ld-linux-*.so.*"):
            return [str(loader), "--library-path", f"{libraries}:{libraries / 'systemd'}", str(found)]
    return None


VARLINKCTLS = ["262", "257", *(["host"] if which("varlinkctl") else [])]


@pytest.fixture(params=VARLINKCTLS)
def run_varlinkctl(request: pytest.FixtureRequest) -> Callable[..., Any]:
    command = ["varlinkctl"] if request.param == "host" else varlinkctl(request.param)
    if command is None:
        pytest.skip(f"needs the container of systemd {request.param}")

    async def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return await trio.to_thread.run_sync(
            lambda: subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
        )

    return run


async def test_varlinkctl_introspects_it(backend: Backend, directory: Path, run_varlinkctl: Any) -> None:
    address = str(directory / schema.SOCKET)
    info = await run_varlinkctl("--json=short", "info", address)
    assert json.loads(info.stdout)["interfaces"] == ["org.varlink.service", schema.INTERFACE]
    shown = await run_varlinkctl("introspect", address, schema.INTERFACE)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "method Rollback(" in shown.stdout
    methods = await run_varlinkctl("list-methods", address, schema.INTERFACE)
    assert len(methods.stdout.split()) == 9


async def test_varlinkctl_calls_it(backend: Backend, directory: Path, run_varlinkctl: Any) -> None:
    address = str(directory / schema.SOCKET)
    status = await run_varlinkctl("--json=short", "call", address, "io.confext.Watcher.Status", "{}")
    assert json.loads(status.stdout)["services"][0]["layers"] == schema.to_dict(STATUS.layers)
    absent = await run_varlinkctl(
        "call", address, "io.confext.Watcher.Status", json.dumps({"service": "absent.service"})
    )
    assert absent.returncode != 0
    assert "io.confext.Watcher.ServiceNotFound" in absent.stderr


async def test_varlinkctl_takes_several_replies(
    backend: Backend, directory: Path, run_varlinkctl: Any
) -> None:
    backend.verdict.set()
    parameters = json.dumps({"service": NGINX, "image": "web.raw"})
    told = await run_varlinkctl(
        "--more",
        "--json=short",
        "call",
        str(directory / schema.SOCKET),
        "io.confext.Watcher.Wait",
        parameters,
    )
    lines = told.stdout.strip("\x1e\n").replace("\x1e", "").splitlines()
    assert [json.loads(line)["event"]["outcome"] for line in lines] == ["incomplete", "refused"]


async def test_varlinkctl_finds_nothing_wrong_with_the_interface(tmp_path: Path, run_varlinkctl: Any) -> None:
    (tmp_path / "description").write_text(schema.DESCRIPTION)
    checked = await run_varlinkctl("validate-idl", str(tmp_path / "description"))
    assert (checked.returncode, checked.stderr) == (0, "")
