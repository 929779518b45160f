# SPDX-License-Identifier: LGPL-2.1-or-later
"""One look for all that would find the same, and none that is too old or another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from support.images import confext
from watcher.images.admission import Admission
from watcher.images.made_for import host
from watcher.images.store import Store
from watcher.model import Declared, Setting, Stack
from watcher.mounts.workers import MountWorkers
from watcher.records.state import Quarantine, State
from watcher.resolve.trust import Trust
from watcher.rounds import looks
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.looks import Looks, common_key
from watcher.rounds.patience import Limits
from watcher.settings.image_policy import demand

MIB = 1 << 20


class Counted:
    """A look that says how many there were."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_a_look_that_began_after_a_round_did_is_as_good_as_its_own() -> None:
    shared, look = Looks(), Counted()
    first = looks.now()
    assert [shared.shared("web", first, look) for _ in range(3)] == [1, 1, 1]
    assert shared.shared("db", first, look) == 2
    later = looks.now()
    assert [shared.shared("web", since, look) for since in (later, first, later)] == [3, 3, 3]


def test_what_concerns_one_service_alone_is_nobody_elses() -> None:
    shared, look, since = Looks(), Counted(), looks.now()
    assert [shared.shared(None, since, look) for _ in range(2)] == [1, 2]
    assert [shared.shared("web", since, look, lambda found: found > 3) for _ in range(3)] == [3, 4, 4]


def test_a_look_that_fails_is_made_again() -> None:
    shared, since = Looks(), looks.now()

    def fails() -> int:
        raise OSError

    with pytest.raises(OSError):
        shared.shared("web", since, fails)
    assert shared.shared("web", since, Counted()) == 1


def test_nobody_waits_for_a_look_that_hangs() -> None:
    shared, begun, goes_on = Looks(), threading.Event(), threading.Event()
    since = looks.now()

    def hangs() -> int:
        begun.set()
        goes_on.wait()
        return 99

    hung = threading.Thread(target=lambda: shared.shared("web", since, hangs))
    hung.start()
    try:
        begun.wait()
        assert shared.shared("web", since, Counted()) == 1
    finally:
        goes_on.set()
        hung.join()
    assert shared.shared("web", looks.now(), Counted()) == 1  # what it has found at last is older than this


def test_the_latest_are_kept() -> None:
    shared, look, since = Looks(), Counted(), looks.now()
    for number in range(1000):
        shared.shared(number, since, look)
    assert len(shared._found) < 100
    assert shared.shared(999, since, look) == 1000


def test_what_is_used_stays() -> None:
    shared, look, since = Looks(), Counted(), looks.now()
    for number in range(1000):
        assert shared.shared("web", since, look) == 1
        shared.shared(number, since, look)


GIVEN = Given("web@1.service", Declared(confext_dirs=("/srv/web@.service.confext.d",)), None, State())


def test_instances_that_have_the_same_find_the_same() -> None:
    other = replace(GIVEN, slots="web@2.service", state=replace(State(), owed="123", checked="x"))
    assert common_key("/", GIVEN) == common_key("/", other) is not None


@pytest.mark.parametrize(
    "other",
    [
        replace(GIVEN, declared=Declared(confext_dirs=("/srv/db.service.confext.d",))),
        replace(GIVEN, trust=Trust(users=("deploy",))),
        replace(GIVEN, policies=(demand(Setting("ImagePolicy", "signed", "/f:1")),)),
        replace(GIVEN, limits=Limits(remove_usec=5)),
        replace(GIVEN, thorough=True),
        replace(GIVEN, slots="web@1.exec"),  # systemd does not start it
        replace(GIVEN, state=State(accepted=replace(State().accepted, mounted={"/srv/web.raw": "/srv"}))),
    ],
)
def test_what_makes_a_difference_makes_another_look(other: Given) -> None:
    assert common_key("/", GIVEN) != common_key("/", other)
    assert common_key("/", GIVEN) != common_key("/srv/root", GIVEN)


def test_what_only_one_may_go_back_to_is_made_anew_by_its_own_look() -> None:
    assert common_key("/", GIVEN) != common_key("/", GIVEN, frozenset({"a" * 64}))


@pytest.mark.parametrize(
    "one",
    [
        replace(GIVEN, state=State(quarantine=(Quarantine("a" * 64, "its check failed", 1),))),
        replace(GIVEN, state=State(pin=Stack().id)),
        replace(GIVEN, elsewhere={"a" * 64: "it did not do on db.service"}),
    ],
)
def test_what_is_kept_out_of_one_service_concerns_no_other(one: Given) -> None:
    assert common_key("/", one) is None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 3) as store:
        yield store


def test_what_is_gone_or_passed_over_is_for_each_to_find(store: Store, tmp_path: Path) -> None:
    """How long it stays, and what comes instead, depends on what this one had, and since when it is gone."""
    drops = tmp_path / "web.confext.d"

    def found() -> Desired:
        with store.using():
            given = Given(GIVEN.slots, Declared(confext_dirs=(str(drops),)), host(), store.state(GIVEN.slots))
            return find(store, Admission(store, cast(MountWorkers, None)), given)

    tree = confext(drops / "a", "a", {"etc/a": b""})
    first = found()
    assert first.is_common
    with store.using():
        store.accept(GIVEN.slots, first.wanted, first.entries)
    assert found().is_common
    (drops / "b").mkdir()  # a tree that is not complete
    assert not found().is_common
    (drops / "b").rmdir()
    new = confext(drops / "c", "c", {"etc/c": b""})
    assert found().is_common
    whole = store.is_whole
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "is_whole", lambda stack: stack != first.wanted and whole(stack))
        assert not found().is_common  # what the service falls back on is what this one had
    new.rename(drops / ".c")
    tree.rename(drops / ".a")
    gone = found()
    assert not gone.wanted.layers
    assert not gone.is_common
