# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users without rights are told by the control socket, and how little of the daemon they can take.

The server is a real one with real sockets; each stranger is a process with another user's credentials.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import structlog
import trio
import trio.testing

from support import CHECKOUT
from support.needs import root
from support.nobody import NOBODY
from watcher.control import peers, server, transport
from watcher.control.client import Client
from watcher.control.trace_process import Asked
from watcher.images.access import User
from watcher.model import Event, Kind, Layer, Outcome, Remark
from watcher.records import schema
from watcher.records.schema import Answer, Failed, PlannedChange, Quarantined, ServiceStatus, Waited, Which

pytestmark = root

GROUP = 4711

NGINX = "nginx.service"
TOKEN = "api_token=s3cret"
PATH = "/srv/secret/web_1.4.raw"
LAYER = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, PATH)
ANSWER = Answer("misnamed", 1, f"{NGINX}: {PATH} refused: {TOKEN}", f"rm {PATH}")
REFUSED = Event(
    NGINX,
    Outcome.REFUSED,
    f"{NGINX}: {PATH} refused: {TOKEN}",
    when=2,
    image="web",
    version="1.4",
    digest="a" * 64,
    source=PATH,
    reason=TOKEN,
    output=f"{TOKEN}\n",
    layers=(LAYER,),
)
BAD = Quarantined(NGINX, "d" * 64, TOKEN, 5, PATH)


class Backend:
    """One service; `calls` are those that are worked on, `most` is how many there were at a time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.asked: list[Asked] = []
        self.answers: list[BytesIO] = []
        self.piece = b'{"diff":1}'
        self.verdict = trio.Event()
        self.go = trio.Event()
        self.go.set()
        self.at_it = 0
        self.most = 0

    async def _work(self) -> None:
        self.at_it += 1
        self.most = max(self.most, self.at_it)
        try:
            await self.go.wait()
        finally:
            self.at_it -= 1

    async def status(self, service: str | None, *, deep: bool) -> Sequence[ServiceStatus]:
        self.calls.append(("status", service or ""))
        await self._work()
        if service == "broken":
            raise Failed(f"{PATH}: {TOKEN}")
        return [
            ServiceStatus(
                NGINX, "standalone", "running", pid=7, layers=(LAYER,), last=REFUSED, quarantined=(BAD,)
            )
        ]

    async def history(self, service: str | None, limit: int, which: Which) -> Sequence[Event]:
        return [REFUSED] * 3

    async def plan(self, service: str | None, *, debug: bool, check: bool) -> Sequence[PlannedChange]:
        if service == "mistake":
            raise ZeroDivisionError(TOKEN)
        remarks, report = (Remark("info", PATH, TOKEN),), f"{PATH} {TOKEN}" if debug else None
        return [PlannedChange(NGINX, True, layers=(LAYER,), remarks=remarks, report=report)]

    async def wait(
        self, service: str, image: str, tell: server.TellWaited, waits: Callable[[], None]
    ) -> Waited:
        self.calls.append(("wait", image))
        waits()
        await tell(Waited(REFUSED, ANSWER))
        await self.verdict.wait()
        return Waited(REFUSED, ANSWER)

    async def rollback(self, service: str, to: str | None, by: str, tell: server.Tell) -> Event:
        raise AssertionError

    async def forget(self, service: str, digest: str | None, by: str) -> Sequence[Quarantined]:
        raise AssertionError

    async def trace(self, asked: Asked) -> BinaryIO:
        self.asked.append(asked)
        self.answers.append(BytesIO((b"+%s\n" % self.piece if asked.more else b"") + b'.{"diff":2}\n'))
        return self.answers[-1]

    async def reload(self) -> None:
        raise AssertionError


@pytest.fixture
def directory() -> Iterator[Path]:
    """A runtime directory that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def backend(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Backend]:
    """A server with this backend, which knows the group."""
    monkeypatch.setattr(peers, "_gid", lambda: GROUP)
    made, readers = Backend(), peers.Readers()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, made, str(directory), readers)
        while readers.gid is None:
            await trio.testing.wait_all_tasks_blocked(0.01)
        yield made
        nursery.cancel_scope.cancel()


PREAMBLE = """
import json, os, socket, sys
from pathlib import Path
from watcher.records import schema
from watcher.control.client import Client
from watcher.control.trace_process import Asked
from watcher.images.access import User
from watcher.model import Event
from watcher.records.schema import CallError
uid, gid, groups, directory = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
def connected():
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(f"{directory}/{schema.SOCKET}")
    return stream
def call(method, parameters=None, **flags):
    name = method if "." in method else f"{schema.INTERFACE}.{method}"
    return json.dumps({"method": name, "parameters": parameters or {}, **flags}).encode() + b"\\0"
def answer(stream):
    received = b""
    while not received.endswith(b"\\0"):
        more = stream.recv(1 << 20)
        if not more:
            return None
        received += more
    return json.loads(received.split(b"\\0")[-2])
def say(value):
    print(value, flush=True)
"""


@contextlib.contextmanager
def stranger(
    directory: Path, code: str, uid: int = NOBODY, gid: int = NOBODY, groups: Sequence[int] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A program of another user's, which may say lines and be told lines."""
    who = json.dumps([uid, gid, list(groups), str(directory)])
    words = [sys.executable, "-c", PREAMBLE + code, who]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = await trio.to_thread.run_sync(process.stdout.readline)
    assert said, "it ended"
    return said.rstrip("\n")


async def told(directory: Path, code: str, **who: Any) -> str:
    with stranger(directory, code, **who) as process:
        assert process.stdout is not None
        return await trio.to_thread.run_sync(process.stdout.read)


ASK_EVERYTHING = """
with Client(directory, timeout=60) as client:
    for method in ("Status", "History", "Plan"):
        say(json.dumps(client.call(method)))
        assert client.redacted is {redacted}
    report = client.call("Plan", service="nginx.service", debug=True)["changes"][0]["report"]
    say(report)
    assert (report is None) is {redacted}
    for answer in client.stream("Wait", service="nginx.service", image="/srv/secret/web_1.4.raw"):
        say(json.dumps(answer))
        assert client.redacted is {redacted}
    for method, service in (("Status", "broken"), ("Plan", "mistake")):
        try:
            client.call(method, service=service)
        except CallError as error:
            say(error)
"""


# What they are told


async def test_strangers_are_told_no_output_no_reason_and_no_path(backend: Backend, directory: Path) -> None:
    backend.verdict.set()
    with structlog.testing.capture_logs():
        said = await told(directory, ASK_EVERYTHING.format(redacted=True))
    assert len(said.splitlines()) == 8
    for secret in ("s3cret", "/srv", "mistake in the program", "misnamed", "rm "):
        assert secret not in said
    for public in (
        '"status": 1',
        "web",
        "1.4",
        "a" * 64,
        "d" * 64,
        "refused",
        "nginx.service: web 1.4 refused",
    ):
        assert public in said
    # Whether something lies at that very path is not found out either.
    assert backend.calls[1] == ("wait", "web_1.4.raw")


@pytest.mark.parametrize("who", [{"gid": GROUP}, {"groups": [*range(100, 130), GROUP]}])
async def test_members_of_the_group_are_told_everything(
    backend: Backend, directory: Path, who: dict[str, Any]
) -> None:
    backend.verdict.set()
    with structlog.testing.capture_logs():
        said = await told(directory, ASK_EVERYTHING.format(redacted=False), **who)
    assert said.count(TOKEN) > 8 and PATH in said
    assert backend.calls[1] == ("wait", PATH)


async def test_members_of_the_group_may_change_nothing(backend: Backend, directory: Path) -> None:
    code = """
with Client(directory, timeout=60) as client:
    reload = lambda: client.call("Reload")
    for change in (lambda: list(client.rollback("nginx.service")), lambda: client.forget("nginx.service"), reload):
        try:
            change()
        except CallError as error:
            say(error)
"""
    said = await told(directory, code, gid=GROUP)
    assert said.count("is for root and the watcher's own user only") == 3


async def test_who_is_in_too_many_groups_to_be_told_is_in_none(backend: Backend, directory: Path) -> None:
    code = """
with Client(directory, timeout=60) as client:
    client.status()
    say(client.redacted)
"""
    assert await told(directory, code, groups=[GROUP, *range(5000, 5300)]) == "True\n"
    assert await told(directory, code, groups=[GROUP, *range(5000, 5300)], gid=GROUP) == "False\n"


COMPARE = """
for more in (False, True):
    stream = connected()
    stream.sendall(call("Compare", {"service": "nginx.service", "before": "1"}, more=more) + call("Reload"))
    received = b""
    while received.count(b"\\0") < (3 if more else 2):
        received += stream.recv(1 << 20)
    for reply in received.split(b"\\0")[:-2]:
        say(reply.decode())
"""


async def test_contents_are_looked_at_for_members_in_their_name(backend: Backend, directory: Path) -> None:
    """On real services: tests/scenarios/test_members.py."""
    with structlog.testing.capture_logs():
        said = await told(directory, COMPARE, uid=NOBODY, gid=NOBODY, groups=[GROUP])
    last = '{"parameters":{"diff":2}}'
    assert said.splitlines() == [last, '{"parameters":{"diff":1},"continues":true}', last]
    user = User(NOBODY, frozenset({NOBODY, GROUP}))
    assert backend.asked == [
        Asked("Compare", "nginx.service", more, user, before="1") for more in (False, True)
    ]


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ({}, '"error": "io.confext.Watcher.MembersOnly"'),
        # A group may also be what keeps somebody out.
        ({"gid": GROUP, "groups": [*range(5000, 5300)]}, "too many groups"),
    ],
)
async def test_others_and_who_is_not_known_are_refused(
    backend: Backend, directory: Path, who: dict[str, Any], said: str
) -> None:
    code = """
for method in ("Trace", "Compare"):
    stream = connected()
    stream.sendall(call(method, {"service": "nginx.service"}))
    say(json.dumps(answer(stream)))
"""
    assert (await told(directory, code, **who)).count(said) == 2
    assert backend.asked == []


async def test_the_group_is_looked_up_when_settings_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int | None] = [None, GROUP]
    monkeypatch.setattr(peers, "_gid", lambda: numbers.pop(0))
    readers = peers.Readers()
    member = peers.Peer(1, NOBODY, frozenset({GROUP}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.follow)
        while len(numbers) > 1:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert not readers.include(member)
        assert readers.include(peers.Peer(1, 0))
        readers.look_up()
        while readers.gid is None:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert readers.include(member)
        assert not readers.include(peers.Peer(1, NOBODY, frozenset({GROUP + 1})))
        nursery.cancel_scope.cancel()


# How much they may take


WAIT = """
def waiting():
    stream = connected()
    stream.sendall(call("Wait", {"service": "nginx.service", "image": "web.raw"}))
    return stream
"""


async def test_a_user_has_so_many_waits_and_is_told_when_there_are_too_many(
    backend: Backend, directory: Path
) -> None:
    code = f"""{WAIT}
streams = [waiting() for _ in range({peers.WAITS_PER_USER})]
say("waiting"); sys.stdin.readline()
try:
    with Client(directory, timeout=60) as client:
        list(client.wait("nginx.service", "web.raw"))
except CallError as error:
    say(f"{{error.exit_code}} {{error}}")
streams.pop().close()
sys.stdin.readline()
streams.append(waiting())
say("again"); sys.stdin.readline()
"""
    with stranger(directory, code) as process:
        assert process.stdin is not None
        assert await line(process) == "waiting"
        while len(backend.calls) < peers.WAITS_PER_USER:
            await trio.testing.wait_all_tasks_blocked(0.01)
        process.stdin.write("\n")
        process.stdin.flush()
        limit = peers.WAITS_PER_USER
        assert (
            await line(process)
            == f"6 too many calls of uid {NOBODY} wait already ({limit} may); try again when one has ended"
        )
        assert len(backend.calls) == limit
        # Root and other users have their own.
        async with await trio.open_unix_socket(str(directory / schema.SOCKET)) as mine:
            await mine.send_all(call("Wait", {"service": NGINX, "image": "web.raw"}))
            while len(backend.calls) == limit:
                await trio.testing.wait_all_tasks_blocked(0.01)
        process.stdin.write("\n")
        process.stdin.flush()
        assert await line(process) == "again"
        while len(backend.calls) == limit + 1:
            await trio.testing.wait_all_tasks_blocked(0.01)


def call(method: str, parameters: object = None) -> bytes:
    return json.dumps({"method": f"{schema.INTERFACE}.{method}", "parameters": parameters}).encode() + b"\0"


async def test_of_one_user_one_call_is_worked_on_and_others_get_their_turn(
    backend: Backend, directory: Path
) -> None:
    backend.go = trio.Event()
    code = f"""
streams = [connected() for _ in range({peers.CONNECTIONS_PER_USER})]
for stream in streams:
    stream.sendall(call("Status") * 50)
say("sent"); sys.stdin.readline()
"""
    with stranger(directory, code) as greedy:
        await line(greedy)
        while not backend.calls:
            await trio.testing.wait_all_tasks_blocked(0.01)
        with stranger(
            directory, "with Client(directory, timeout=60) as client: client.status(); say('told')", 1234
        ) as other:
            while len(backend.calls) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert backend.most == 2
            backend.go.set()
            assert await line(other) == "told"
        assert backend.most == 2


async def test_a_user_pauses_for_longer_than_his_calls_take(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = peers.Turns()
    peer, other = peers.Peer(1, 1000), peers.Peer(2, 1001)
    worked = 0.0

    async def asks(peer: peers.Peer, seconds: float) -> None:
        nonlocal worked
        while True:
            async with turns.one_for(peer):
                await trio.sleep(seconds)
                worked += seconds

    with trio.move_on_after(1000):
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(asks, peer, 0.1)
    assert worked <= 1000 / (1 + peers.PAUSE) + 0.2
    # The first call of another one begins at once, as does one after a pause.
    for one in (other, peer):
        await trio.sleep(peers.PAUSE_MAX_SEC)
        before = trio.current_time()
        async with turns.one_for(one):
            assert trio.current_time() == before


async def test_a_call_that_only_waits_takes_nobodys_turn() -> None:
    turns = peers.Turns()
    peer = peers.Peer(1, 1000)
    async with turns.one_for(peer) as turn:
        turn.close()
        async with turns.one_for(peer):
            pass
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    async with turns.one_for(peer):
                        await trio.sleep_forever()

            nursery.start_soon(cancelled)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        async with turns.one_for(peer):
            pass


async def test_calls_without_an_answer_do_not_keep_the_event_loop(
    backend: Backend, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer full of them is hundreds of calls, of which none would wait for anything."""
    parsed = 0
    parse = transport.Request.parse

    def counted(raw: bytes) -> transport.Request:
        nonlocal parsed
        parsed += 1
        return parse(raw)

    monkeypatch.setattr(transport.Request, "parse", staticmethod(counted))
    code = "stream = connected(); stream.sendall(call('Nonsense', oneway=True) * 600)"
    code += "; say('sent'); sys.stdin.readline()"
    for uid in (0, NOBODY):
        parsed = 0
        with stranger(directory, code, uid) as process:
            await line(process)
            while parsed < 100:
                before = parsed
                await trio.lowlevel.checkpoint()
                assert parsed - before <= 2


HOSTILE = r"""[
    b"",
    b"{",
    b"\0" * 1000,
    b"[" * 65_000 + b"\0",
    b'{"method":"io.confext.Watcher.Status","parameters":' + b'{"a":' * 10_000 + b"\0",
    b'{"method":"io.confext.Watcher.History","parameters":{"limit":' + b"9" * 60_000 + b"}}\0",
    b'{"method":"a.b","method":"io.confext.Watcher.Status"}\0',
    b'{"method":"io.confext.Watcher.Status","parameters":{"service":"a","service":"b"}}\0',
    b'{"method":"io.confext.Watcher.Status","parameters":{"service":"\xff"}}\0',
    b'{"method":"io.confext.Watcher.Status\xed\xa0\x80"}\0',
    '{"method":"io.confext.Watcher.Status"}'.encode("utf-16") + b"\0",
]"""
ODD = [
    {"service": "\0\0"},
    {"service": "\ud800"},
    {"service": "x" * 60_000},
    {"service": "\x1b[2J\n"},
    {"service": {"a": [[[]]]}},
    {"limit": -(10**30)},
    {"limit": 1e308},
    {"limit": True},
    {"limit": 5.5},
    {"limit": []},
    {"__class__": "x"},
]


async def test_hostile_bytes_end_their_connection_and_odd_values_are_answered(
    backend: Backend, directory: Path
) -> None:
    code = f"""
for rubbish in {HOSTILE}:
    stream = connected()
    stream.sendall(rubbish)
    stream.shutdown(socket.SHUT_WR)
    try:
        assert stream.recv(1) == b"", rubbish[:60]
    except ConnectionResetError:
        pass
stream = connected()
for parameters in json.loads({json.dumps(json.dumps(ODD))}):
    for method in ("Status", "History", "Plan", "org.varlink.service.GetInterfaceDescription", "Rollback", "a\\x00b"):
        stream.sendall(call(method, parameters))
        assert answer(stream) is not None, (method, parameters)
say("alive")
"""
    with structlog.testing.capture_logs() as logs:
        assert await told(directory, code) == "alive\n"
    # And none of it is written to the log, which would be a way to fill it.
    assert [entry for entry in logs if entry["log_level"] != "debug"] == []


async def test_users_without_rights_do_not_lock_out_root(backend: Backend, directory: Path) -> None:
    """Each has connected as often as he may and takes no answer, or sends half a call."""
    code = """
streams = []
for number in range(30):
    stream = connected()
    try:
        stream.sendall(call("History") * 100 if number % 2 else b"{")
    except OSError:
        pass
    streams.append(stream)
say("full"); sys.stdin.readline()
"""
    with contextlib.ExitStack() as stack:
        for uid in range(20_000, 20_000 + peers.CONNECTIONS // peers.CONNECTIONS_PER_USER + 1):
            assert await line(stack.enter_context(stranger(directory, code, uid))) == "full"
        with await trio.to_thread.run_sync(lambda: Client(str(directory), timeout=60)) as client:
            (status,) = await trio.to_thread.run_sync(client.status)
    assert status.last is not None and TOKEN in status.last.reason


async def test_of_answers_that_nobody_takes_the_oldest_goes_and_a_user_has_one(
    backend: Backend, directory: Path
) -> None:
    """The answers are in memory, and whoever comes next does not wait for those who take nothing."""
    backend.piece = b'{"diff":"%s"}' % (b"x" * (4 << 20))
    code = """
streams = [connected() for _ in range(2 if uid == 20_000 else 1)]
for stream in streams:
    stream.sendall(call("Compare", {"service": "nginx.service"}, more=True))
say(streams[0].recv(1).decode()); sys.stdin.readline()
"""
    with contextlib.ExitStack() as held:
        for uid in range(20_000, 20_000 + peers.UNTAKEN + 1):
            assert not any(answer.closed for answer in backend.answers)
            assert await line(held.enter_context(stranger(directory, code, uid, groups=[GROUP]))) == "{"
        while not backend.answers[0].closed:
            await trio.sleep(0.01)
        # The first user's second call has its turn now, and the next one's answer goes for it.
        while not backend.answers[1].closed:
            await trio.sleep(0.01)
        assert [answer.closed for answer in backend.answers] == [True, True, *[False] * peers.UNTAKEN]
        assert [asked.user and asked.user.uid for asked in backend.asked][-1] == 20_000
    while not all(answer.closed for answer in backend.answers):
        await trio.sleep(0.01)


async def test_strangers_are_taken_in_one_after_another_and_root_as_fast_as_he_comes(
    directory: Path, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids: list[int] = []
    of = peers.Peer.of

    def counted(stream: trio.SocketStream) -> peers.Peer:
        peer = of(stream)
        uids.append(peer.uid)
        return peer

    monkeypatch.setattr(peers.Peer, "of", staticmethod(counted))
    code = "streams = [connected() for _ in range(20)]; say('connected'); sys.stdin.readline()"
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, Backend(), str(directory), peers.Readers())
        with stranger(directory, code, 0) as process:
            await line(process)
            await trio.testing.wait_all_tasks_blocked(0.05)
        with stranger(directory, code) as process:
            await line(process)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert uids == [0] * 20 + [NOBODY]
            mock_clock.jump(1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert uids == [0] * 20 + [NOBODY] * 2
        nursery.cancel_scope.cancel()


async def test_the_kernel_says_who_connects() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        peer = peers.Peer.of(stream)
        assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
        assert peer.groups == {os.getgid(), *os.getgroups()}
