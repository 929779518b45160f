# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a log line looks like in each mode, and what goes over journald's socket (records/backlog.py)."""

from __future__ import annotations

import array
import dataclasses
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from support import CHECKOUT
from watcher.model import Event, Kind, Layer, Outcome, Protection, Trust, Verdict, printable
from watcher.records import backlog, journal

APPLIED = Event(
    service="nginx.service",
    outcome=Outcome.APPLIED,
    message="nginx.service: web 1.3 -> 1.4 applied in 2 ms, reload done in 14 ms",
    when=1_700_000_000_000_000,
    stack="00112233445566aa",
    previous="aabb00112233ccdd",
    image="web",
    version="1.4",
    digest="d" * 64,
    swap_usec=412,
    total_usec=16000,
    verdict=Verdict.GOOD,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    journal.configure("logfmt")
    structlog.reset_defaults()


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        monkeypatch.setattr(journal, "_Journal", lambda real=journal._Journal: real(str(path)))
        yield sock


def parse(entry: bytes) -> dict[str, str]:
    """The native protocol, read the way journald reads it."""
    fields: dict[str, str] = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        if b"=" in line:
            key, _, value = line.partition(b"=")
            entry = rest
        else:
            key, length = line, int.from_bytes(rest[:8], "little")
            value = rest[8 : 8 + length]
            assert rest[8 + length : 9 + length] == b"\n"
            entry = rest[9 + length :]
        fields[key.decode()] = value.decode()
    return fields


def test_an_outcome_is_one_entry_with_every_field(journald: socket.socket) -> None:
    journal.configure("journal")
    journal.record(APPLIED)
    assert parse(journald.recv(65536)) == {
        "MESSAGE": APPLIED.message,
        "MESSAGE_ID": journal.MESSAGE_IDS[Outcome.APPLIED],
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "confext-watcher",
        "OBJECT_SYSTEMD_UNIT": "nginx.service",
        "CONFEXT_SERVICE": "nginx.service",
        "CONFEXT_OUTCOME": "applied",
        "CONFEXT_STACK": "00112233445566aa",
        "CONFEXT_PREVIOUS": "aabb00112233ccdd",
        "CONFEXT_IMAGE": "web",
        "CONFEXT_VERSION": "1.4",
        "CONFEXT_DIGEST": "d" * 64,
        "CONFEXT_SWAP_USEC": "412",
        "CONFEXT_TOTAL_USEC": "16000",
        "CONFEXT_VERDICT": "good",
    }


def test_where_no_stack_was_judged_there_is_no_verdict(journald: socket.socket) -> None:
    journal.configure("journal")
    journal.record(dataclasses.replace(APPLIED, verdict=None))
    assert "CONFEXT_VERDICT" not in parse(journald.recv(65536))


def test_what_was_proved_of_the_image_is_told_and_by_whom_it_is_signed(journald: socket.socket) -> None:
    journal.configure("journal")
    trust = Trust(Protection.SIGNED, "CN=ops", "f" * 64, "e" * 64, "verified")
    other = Layer("a.raw", "a", "1", "a" * 64, Kind.IMAGE, "/a.raw")
    image = Layer("web.raw", "web", "1.4", APPLIED.digest, Kind.IMAGE, "/web.raw", trust)
    journal.record(dataclasses.replace(APPLIED, layers=(other, image)))
    fields = parse(journald.recv(65536))
    told = [fields[f"CONFEXT_{key}"] for key in ("TRUST", "SIGNER", "SIGNER_FINGERPRINT")]
    assert told == ["signed", "CN=ops", "f" * 64]
    journal.record(dataclasses.replace(APPLIED, layers=(other, dataclasses.replace(image, trust=Trust()))))
    fields = parse(journald.recv(65536))
    assert fields["CONFEXT_TRUST"] == "unprotected" and "CONFEXT_SIGNER" not in fields


def test_a_verdict_is_one_word_in_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    for verdict in Verdict:
        journal.configure("logfmt")
        journal.record(Event("a.service", Outcome.ROLLED_BACK, "a.service: text", 0, verdict=verdict))
        assert capsys.readouterr().err.rstrip("\n").endswith(f" verdict={verdict.value}")


@pytest.mark.parametrize(
    ("outcome", "priority"),
    [
        (Outcome.APPLIED, "6"),
        (Outcome.REFUSED, "4"),
        (Outcome.INCOMPLETE, "4"),
        (Outcome.FAILED, "3"),
        (Outcome.ROLLED_BACK, "4"),
        (Outcome.NEEDS_RESTART, "5"),
    ],
)
def test_bad_outcomes_stand_out(outcome: Outcome, priority: str, journald: socket.socket) -> None:
    journal.configure("journal")
    journal.record(Event("a.service", outcome, "a.service: text", 0))
    assert parse(journald.recv(65536))["PRIORITY"] == priority


def test_a_failed_rollback_is_critical(journald: socket.socket) -> None:
    journal.configure("journal")
    journal.record(Event("a.service", Outcome.FAILED, "a.service: text", 0), level="critical")
    assert parse(journald.recv(65536))["PRIORITY"] == "2"


def test_how_a_service_took_the_stack_is_a_field_with_its_value(journald: socket.socket) -> None:
    journal.configure("journal")
    journal.record(Event("a.service", Outcome.APPLIED, "a.service: text", 0, verdict=Verdict.WENT_DOWN))
    fields = parse(journald.recv(65536))
    assert (fields["CONFEXT_VERDICT"], fields["CONFEXT_OUTCOME"]) == ("went-down", "applied")


def test_what_is_of_no_weight_is_for_those_who_ask(journald: socket.socket) -> None:
    event = Event("a.service", Outcome.UNCHANGED, "a.service: nothing to do", 0)
    journal.configure("journal", level="warning")
    journal.record(event)
    with pytest.raises(BlockingIOError):
        journald.recv(1)
    journal.configure("journal")
    journal.record(event)
    assert parse(journald.recv(65536))["PRIORITY"] == "6"


def test_every_outcome_has_its_own_id_in_the_catalog() -> None:
    catalog = CHECKOUT / "units" / "confext-watcher.catalog"
    explained = re.findall(r"^-- ([0-9a-f]{32})$", catalog.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(journal.MESSAGE_IDS.values())
    assert set(journal.MESSAGE_IDS) == set(Outcome)
    assert len(set(explained)) == len(explained)


def test_output_of_several_lines_arrives_whole(journald: socket.socket) -> None:
    output = "nginx: [emerg] no\nCONFEXT_OUTCOME=applied\n"
    journal.configure("journal")
    journal.record(Event("a.service", Outcome.REFUSED, "a.service: refused", 0, output=output))
    fields = parse(journald.recv(65536))
    assert fields["CONFEXT_OUTPUT"] == output
    assert fields["CONFEXT_OUTCOME"] == "refused"


def test_an_entry_too_large_for_a_datagram_comes_as_a_sealed_memfd(journald: socket.socket) -> None:
    output = "x" * (4 << 20)
    journal.configure("journal")
    journal.record(Event("a.service", Outcome.REFUSED, "a.service: refused", 0, output=output))
    data, ancillary, _flags, _address = journald.recvmsg(64, socket.CMSG_SPACE(4))
    assert data == b""
    fd = array.array("i", ancillary[0][2])[0]
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fields = parse(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)
    assert fields["CONFEXT_OUTPUT"] == output


def test_without_journald_an_entry_is_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "_Journal", lambda real=journal._Journal: real(str(tmp_path / "none")))
    journal.configure("journal")
    journal.record(APPLIED)
    assert APPLIED.message in capsys.readouterr().err


def test_a_restart_of_the_journal_socket_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setattr(journal, "_Journal", lambda real=journal._Journal: real(str(path)))
    journal.configure("journal")
    for message in ("first", "second"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
            journal.log.info(message)
            assert parse(sock.recv(65536))["MESSAGE"] == message
        path.unlink()


def received(sock: socket.socket, count: int) -> list[str]:
    sock.settimeout(30)
    return [parse(sock.recv(65536))["MESSAGE"] for _ in range(count)]


def test_a_journald_that_does_not_read_keeps_nobody_waiting(
    journald: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here waits: it would be for ever."""
    monkeypatch.setattr(backlog, "MESSAGES_MAX", 50)
    journal.configure("journal")
    number = 0
    while not (journal._journal and journal._journal._backlog._count == 3):
        journal.log.info(f"{number}")
        number += 1
    messages = received(journald, number - 3)
    assert messages == [f"{one}" for one in range(number - 3)]
    assert received(journald, 1) == ["journald was too slow: 3 entries of confext-watcher are lost"]
    journal.log.info("after")
    assert received(journald, 1) == ["after"]


def test_without_a_thread_what_journald_does_not_take_waits_for_one(
    journald: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    journal.configure("journal")
    assert journal._journal is not None
    number = 0
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        while len(journal._journal._backlog._waiting) < 3:
            journal.log.info(f"{number}")
            number += 1
    journal.log.info(f"{number}")
    assert received(journald, number + 1) == [f"{one}" for one in range(number + 1)]


def test_what_journald_does_not_take_by_the_end_is_on_standard_error(
    journald: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.configure("journal")
    assert journal._journal is not None
    number = 0
    while not journal._journal._backlog._waiting:
        journal.log.info(f"entry {number}")
        number += 1
    journal._journal.close()
    assert f"MESSAGE=entry {number - 1}" in capsys.readouterr().err


def test_an_exception_is_part_of_the_message(journald: socket.socket) -> None:
    journal.configure("journal")
    try:
        raise RuntimeError("no such luck")
    except RuntimeError:
        journal.log.exception("a.service: internal error")
    fields = parse(journald.recv(65536))
    assert fields["MESSAGE"].startswith("a.service: internal error\nTraceback")
    assert fields["MESSAGE"].endswith("RuntimeError: no such luck")
    assert fields["PRIORITY"] == "3"


def test_logfmt_is_one_line_whatever_comes(capsys: pytest.CaptureFixture[str]) -> None:
    journal.configure("logfmt")
    journal.log.warning('say "hi"', path="a\nb=\\", odd="\x1b[31m", raw="\udcff", empty="")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.partition(" ")[2] == (
        'level=warning msg="say \\"hi\\"" path="a\\nb=\\\\" odd="\\\\x1b[31m" raw="\\\\xff" empty=""\n'
    )


def test_on_a_terminal_an_outcome_is_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    journal.configure("console")
    journal.record(APPLIED)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  " + re.escape(APPLIED.message) + "\n", capsys.readouterr().err)


def test_a_file_name_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    journal.configure("console")
    journal.log.info("watching", path="/srv/\x1b]0;pwned\x07", name=b"\xff")
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\x07" not in err
    assert "\\xff" in err


def test_auto_takes_the_journal_only_if_standard_error_leads_there(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream, (tmp_path / "other").open("w") as other:
        stat = os.fstat(stream.fileno())
        ours = f"{stat.st_dev}:{stat.st_ino}"
        assert journal.leads_to_journal(stream, ours)
        assert not journal.leads_to_journal(other, ours)
        assert not journal.leads_to_journal(stream, "")


def test_printable_text_is_left_alone_and_escapes_are_stable() -> None:
    text: Any = "über\tweb\n\x07\udc80"
    once = printable(text, keep="\n\t")
    assert once == "über\tweb\n\\x07\\x80"
    assert printable(once, keep="\n\t") == once
    assert printable(once) == "über\\tweb\\n\\x07\\x80"


def test_tables_and_their_like_are_not_loaded_by_the_daemon_and_can_be_by_others() -> None:
    program = (
        "import sys, watcher.cli.main, watcher.cli.run, watcher.cli.exec; assert 'rich' not in sys.modules;"
        " import rich.table; print(rich.table.Table.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "Table\n"
