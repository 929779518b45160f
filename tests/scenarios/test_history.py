# SPDX-License-Identifier: LGPL-2.1-or-later
"""The history that a real daemon keeps: bounded, and never in the way of a service."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import root, tool
from support.place import Place, eventually

pytestmark = [root, tool("mksquashfs")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE history (what TEXT)")
        db.execute("PRAGMA user_version = 99")
    db.close()


def rubbish(path: Path) -> None:
    path.write_bytes(b"not a database at all\n" * 100)


@pytest.mark.parametrize("made", [newer, rubbish])
def test_one_that_cannot_be_read_is_set_aside_and_the_service_goes_on(place: Place, made: object) -> None:
    assert callable(made)
    made(place.state / "ledger.sqlite")
    place.image("1", "one")
    place.start_daemon()
    service = place.start("sleep", "infinity")
    place.until("started well")
    place.image("2", "two")
    place.outcome("applied")
    assert place.shown(service) == "two"
    said = [line for line in place.log if "a new one begun" in line]
    assert len(said) == 1 and "level=warning" in said[0]
    eventually(lambda: place.outcomes() == ["applied"])


def test_it_has_the_last_of_what_happened(place: Place) -> None:
    (place.settings / "watcher.conf").write_text(
        "[Watcher]\nSettleSec=0\nSettleTreeSec=0\nRemoveSec=0\nHistoryMax=3\n"
    )
    place.image("1", "one")
    place.start_daemon()
    place.start("sleep", "infinity")
    place.until("started well")
    for version in ("2", "3", "4", "5", "6"):
        place.image(version, version)
        place.until(f"-> {version} applied")
    eventually(lambda: [event.version for event in place.history()] == ["6", "5", "4"])
