# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Rollout=rolling`: who may have new content, and who waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from support.hangs import hanging
from support.needs import root
from watcher.managers.base import Service
from watcher.model import Declared, Kind, Layer, Stack
from watcher.rounds.rollout import Bid, Rollout, Sibling, may_go
from watcher.settings.config import ServiceSettings
from watcher.watch.offload import Offload

NEW = frozenset({"a"})


def go(
    *siblings: Sibling,
    running: bool = True,
    fresh: bool = False,
    parallel: int = 1,
    at_it: set[str] | None = None,
) -> bool:
    return may_go(Bid(NEW, parallel, running, fresh, siblings), at_it or set())


def test_the_first_goes_and_the_others_wait_for_its_verdict() -> None:
    assert go(Sibling("b", running=True, offered=True))
    assert not go(Sibling("b", running=True, offered=True), at_it={"b"})
    assert not go(
        Sibling("b", running=True, accepted=True, on_trial=True)
    )  # the watcher was killed in between
    assert go(Sibling("b", running=True, accepted=True))


def test_then_so_many_at_a_time() -> None:
    good, busy = (
        Sibling("b", running=True, accepted=True),
        Sibling("c", running=True, accepted=True, on_trial=True),
    )
    assert not go(good, busy, at_it={"c"})
    assert go(good, busy, at_it={"c"}, parallel=2)


def test_one_that_runs_does_not_wait_for_one_that_does_not() -> None:
    assert go(Sibling("b", running=False, accepted=True, on_trial=True))


def test_one_that_does_not_run_leaves_the_first_turn_to_those_that_do() -> None:
    assert not go(Sibling("b", running=True, offered=True), running=False)
    assert go(Sibling("b", running=True, offered=False), running=False)
    assert go(Sibling("b", running=True, offered=True), running=False, fresh=True)
    assert not go(Sibling("b", running=False, accepted=True, on_trial=True), running=False)


@given(st.integers(2, 6), st.integers(1, 3), st.data())
def test_never_more_than_one_has_what_nobody_has_proved_good(
    count: int, parallel: int, data: st.DataObject
) -> None:
    asked: list[str] = []
    rollout = Rollout(asked.append, cast(Any, None))
    names = [f"s{number}" for number in range(count)]
    accepted: set[str] = set()
    proved: set[str] = set()
    active: set[str] = set()
    for _ in range(data.draw(st.integers(1, 20))):
        name = data.draw(st.sampled_from(names))
        if name in active:
            active.remove(name)
            proved.add(name)
            rollout.end(name, rolling=True)
        elif name not in accepted:
            siblings = [
                Sibling(other, True, True, other in accepted, other not in proved)
                for other in names
                if other != name
            ]
            rollout.begin(name)
            if rollout.claim(name, Bid(NEW, parallel, running=True, fresh=False, siblings=siblings)):
                rollout.end(name, rolling=True)
                asked.clear()
            else:
                active.add(name)
                accepted.add(name)
        assert len(active) <= (parallel if proved else 1)


def test_who_waits_is_asked_again_when_a_round_of_another_is_over() -> None:
    asked: list[str] = []
    rollout = Rollout(asked.append, cast(Any, None))
    rollout.begin("a")
    own = Bid(NEW, 1, running=True, fresh=False, siblings=[Sibling("b", True)])
    assert rollout.claim("a", own) == "" == rollout.claim("a", own)  # it stays its turn for the whole round
    rollout.begin("b")
    other = Bid(NEW, 1, running=True, fresh=False, siblings=[Sibling("a", True)])
    assert rollout.claim("b", other) == rollout.waits("b", other) == "it waits for its turn (Rollout=rolling)"
    rollout.end("b", rolling=True)
    assert asked == []
    rollout.end("a", rolling=True)
    assert asked == ["b"]


def drops(name: str, directory: Path, main: Any = None) -> Service:
    settings = ServiceSettings(rollout="rolling")
    return Service(name, Declared(confext_dirs=(str(directory),)), settings, main=main)


@root
async def test_one_whose_files_do_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """A service that does not run leaves the first turn to those that do, and can have it."""
    for name in ("shown", "hung", "good.d/web.raw.v"):
        (tmp_path / name).mkdir(parents=True)
    image = tmp_path / "good.d/web.raw.v/web_1.raw"
    image.touch()
    running = cast(Any, object())
    asks = drops("asks.service", tmp_path / "good.d")
    others = [
        drops("good.service", tmp_path / "good.d", running),
        drops("other.service", tmp_path / "none", running),
        drops("hung.service", tmp_path / "hung", running),
    ]
    layer = Layer("web.raw", "web", "1", "d" * 64, Kind.IMAGE, str(image))
    with hanging(tmp_path / "shown", tmp_path / "hung") as dead:
        dead.hang()
        rollout = Rollout(lambda name: None, cast(Any, SimpleNamespace(offload=Offload())))
        assert await rollout._offered(asks, Stack((layer,)), frozenset({layer.digest}), others) == {
            "good.service"
        }
