# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Rollout=rolling` of services without systemd that share a directory; their tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import root, tool
from support.place import Place, eventually

pytestmark = [root, tool("mksquashfs")]

NAMES = ("a.service", "b.service", "c.service")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


def start(place: Place, *more: str, names: tuple[str, ...] = NAMES, reload: str = "") -> None:
    place.image("1", "one")
    place.start_daemon()
    reload = reload or f"sh -c 'echo $NAME >>{place.scratch}/told; ! grep -q broken /etc/web.conf'"
    for name in names:
        place.environment["NAME"] = name
        place.start("sleep", "infinity", name=name, options=("--reload-command", reload, *more))
    for _ in names:
        place.until("started well")


def told(place: Place) -> list[str]:
    return (place.scratch / "told").read_text().split()


def test_where_the_first_takes_it_badly_none_of_the_others_is_touched(place: Place) -> None:
    start(place, "--set", "Rollout=rolling")
    place.image("2", "broken")
    line = place.until("outcome=rolled-back")
    first = next(name for name in NAMES if f"service={name}" in line)
    for _ in NAMES[1:]:
        assert f"it did not do on {first}" in place.until("outcome=refused")
    place.stop_daemon()
    place.start_daemon()
    place.image("0", "old")
    assert told(place) == [first, first]
    place.image("3", "three")
    for _ in NAMES:
        place.until("outcome=applied")
    assert sorted(told(place)[2:]) == sorted(NAMES)


def test_where_it_proves_good_the_rest_follow_so_many_at_a_time(place: Place) -> None:
    names = (*NAMES, "d.service", "e.service")
    note = f"echo {{}} $NAME >>{place.scratch}/told"
    # Long enough for a third to show itself, if it were let.
    reload = f"sh -c '{note.format('begins')}; sleep 0.3; {note.format('ends')}'"
    start(place, "--set", "Rollout=rolling", "--set", "RolloutParallel=2", names=names, reload=reload)
    place.image("2", "two")
    for _ in names:
        place.until("web 1 -> 2 applied")
    words = told(place)
    first = words[1]
    assert words[:4] == ["begins", first, "ends", first]
    at_it: set[str] = set()
    most = 0
    for word, name in zip(words[4::2], words[5::2], strict=True):
        at_it ^= {name}
        assert (word == "begins") == (name in at_it)
        most = max(most, len(at_it))
    assert most == 2 and not at_it
    assert {name for name in words if name.endswith(".service")} == set(names)


def test_where_the_first_keeps_what_it_took_badly_none_of_the_others_follows(place: Place) -> None:
    start(place, "--set", "Rollout=rolling", "--set", "Rollback=no")
    place.image("2", "broken")
    place.until("outcome=failed")
    plan = place.command("plan").stdout
    assert plan.count("waits for its turn") == len(NAMES) - 1
    place.stop_daemon()
    place.start_daemon()
    assert place.command("plan").stdout.count("waits for its turn") == len(NAMES) - 1
    assert len(told(place)) == 1
    place.image("3", "three")
    for _ in NAMES:
        place.until("outcome=applied")
    assert len(told(place)) == 1 + len(NAMES)


def test_an_image_with_tries_is_counted_and_freed_of_them(place: Place) -> None:
    start(place)
    place.image("2+3", "broken")
    for _ in NAMES:
        place.until("outcome=rolled-back")
    eventually(lambda: place.dropped() == ["web_1.raw", "web_2+0-3.raw"])
    place.image("3+5", "fine")
    for _ in NAMES:
        place.until("outcome=applied")
    eventually(lambda: "web_3.raw" in place.dropped())
