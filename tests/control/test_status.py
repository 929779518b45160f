# SPDX-License-Identifier: LGPL-2.1-or-later
"""Without the daemon, `status` reads the records, and writes nothing. What it reads from the kernel: scenarios."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from watcher.control import status
from watcher.images.stacks import Stacks
from watcher.managers import registration
from watcher.model import Event, Kind, Layer, Outcome, Stack
from watcher.records.schema import Quarantined, ServiceStatus
from watcher.records.state import Quarantine, State
from watcher.settings.config import Settings

STACK = Stack((Layer("web.raw", "web", "1", "a" * 64, Kind.IMAGE, "/srv/web_1.raw"),))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(state_directory=str(tmp_path / "state"), runtime_directory=str(tmp_path / "run"))
    registration.services_directory(made.runtime_directory)
    registration.register(
        made.runtime_directory,
        registration.Registration(name="job", pid=os.getpid(), started=1, namespace=(1, 1)),
    )
    return made


FOR_NOW = Quarantine("c" * 64, "it has tries left", 5, for_now=True)


def decide(state: State) -> State:
    return replace(state, pin=STACK.id, quarantine=(Quarantine("b" * 64, "no", 5, __file__), FOR_NOW))


def files(settings: Settings) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in Path(settings.state_directory).rglob("*")}


def test_what_was_decided_is_read_from_the_record(settings: Settings) -> None:
    stacks = Stacks(settings.state_directory)
    stacks.accept("job.exec", STACK, (), change=decide)
    before = files(settings)
    (found,) = status.without_daemon(settings, "job")
    assert (found.state, found.accepted, found.pinned) == ("stopped", STACK.id, STACK.id)
    assert found.quarantined == (Quarantined("job", "b" * 64, "no", 5, __file__),)
    assert files(settings) == before


def test_a_record_without_a_stack(settings: Settings) -> None:
    Stacks(settings.state_directory).change("job.exec", decide)
    (found,) = status.without_daemon(settings)
    assert (found.accepted, found.pinned, len(found.quarantined)) == ("", STACK.id, 1)


def test_a_damaged_record_is_said_and_left_to_the_daemon(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    Stacks(settings.state_directory).accept("job.exec", STACK, (), change=decide)
    Path(settings.state_directory, "units/job.exec/.state.json").write_text("{")
    before = files(settings)
    (found,) = status.without_daemon(settings)
    assert (found.accepted, found.pinned, found.quarantined) == ("", None, ())
    assert files(settings) == before
    assert "".join(capsys.readouterr()).count("cannot be read") == 1


def test_nothing_was_ever_accepted(settings: Settings) -> None:
    (found,) = status.without_daemon(settings)
    assert (found.state, found.accepted) == ("stopped", "")
    assert not os.path.lexists(settings.state_directory)


def test_nothing_is_said_of_files_that_are_not_there_any_more(tmp_path: Path) -> None:
    there, gone = str(tmp_path), str(tmp_path / "gone.raw")

    def event(outcome: Outcome, source: str) -> Event:
        return Event("job", outcome, "", 1, source=source)

    applied, refused = event(Outcome.APPLIED, gone), event(Outcome.REFUSED, gone)
    kept = tuple(
        Quarantined("job", digest, "no", 1, source) for digest, source in (("a", there), ("b", gone))
    )
    found = ServiceStatus("job", "standalone", "running", last=refused, quarantined=kept)
    now = status.without_gone(found, lambda: [refused, event(Outcome.INCOMPLETE, gone), applied])
    assert (now.last, now.quarantined) == (applied, kept[:1])
    stays = ServiceStatus(
        "job", "standalone", "running", last=event(Outcome.REFUSED, there), quarantined=kept[:1]
    )
    assert status.without_gone(stays, list) == stays
    # What was applied stays so, though its file is gone.
    assert (
        status.without_gone(ServiceStatus("job", "standalone", "running", last=applied), list).last == applied
    )
