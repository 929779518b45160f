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
from watcher.model import Kind, Layer, Stack
from watcher.records.schema import Quarantined
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
    return replace(state, pin=STACK.id, quarantine=(Quarantine("b" * 64, "no", 5, "/srv/web_2.raw"), FOR_NOW))


def files(settings: Settings) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in Path(settings.state_directory).rglob("*")}


def test_what_was_decided_is_read_from_the_record(settings: Settings) -> None:
    stacks = Stacks(settings.state_directory)
    stacks.accept("job.exec", STACK, (), change=decide)
    before = files(settings)
    (found,) = status.without_daemon(settings, "job")
    assert (found.state, found.accepted, found.pinned) == ("stopped", STACK.id, STACK.id)
    assert found.quarantined == (Quarantined("job", "b" * 64, "no", 5, "/srv/web_2.raw"),)
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
