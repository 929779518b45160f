# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one promise of watching: who looks again whenever it is told has seen, in the end, what is there.

Not by examples: any sequence of changes, and a change between any two steps on a path. What is followed is kept in
watch/watched_directories.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from support.apart import apart
from support.changes import (
    CHANGES,
    MODES,
    MOUNTS,
    Step,
    apply,
    bind,
    deep,
    exchange,
    interests,
    link,
    make,
    make_deep,
    mount_empty,
    move,
    remove,
    retarget,
    shows,
    unmount,
    world,
    write,
)
from support.needs import root, tool
from watcher.model import Interest, Scope
from watcher.watch import follow_links, watched_directories, watched_trees
from watcher.watch.watcher import Watcher

own_mounts = apart("unshare", "--mount", "--propagation", "private")
unprivileged = apart(*(("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()))


names = st.sampled_from("abc")
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


def steps(changes: list[Callable[[str, str], None]]) -> st.SearchStrategy[list[list[Step]]]:
    """Bursts of changes."""
    step = st.tuples(st.sampled_from(changes), paths, paths)
    return st.lists(st.lists(step, min_size=1, max_size=6), min_size=1, max_size=8)


class Daemon:
    """Does what the daemon does: looks at a service again whenever its key is told."""

    def __init__(self, watcher: Watcher, watched: dict[str, Interest]) -> None:
        self.watcher = watcher
        self._watched = watched
        self.seen = {}
        for key, interest in watched.items():
            self.look(key)
            while watcher.set(key, [interest]):
                self.look(key)

    def look(self, key: str) -> None:
        self.seen[key] = shows(self._watched[key])

    def listen(self) -> frozenset[str]:
        """Until nothing more is told (a clock that jumps when all wait says when); the keys that were."""
        told: set[str] = set()

        async def follow() -> None:
            with trio.move_on_after(1):
                async for keys in self.watcher.changes():
                    told.update(keys)
                    for key in keys:
                        self.look(key)

        trio.run(follow, clock=trio.testing.MockClock(autojump_threshold=0))
        return frozenset(told)

    def followed(self) -> Daemon:
        self.listen()
        return self

    def missed(self) -> list[str]:
        return [key for key, interest in self._watched.items() if self.seen[key] != shows(interest)]


def check(bursts: list[list[Step]]) -> None:
    with world() as root, Watcher() as watcher:
        daemon = Daemon(watcher, interests(root))
        daemon.listen()
        for burst in bursts:
            for step in burst:
                apply(step, root)
            daemon.listen()
            assert not daemon.missed()
            assert not daemon.listen(), "told without a change"


@settings(max_examples=60)
@given(steps(CHANGES))
def test_what_a_path_shows_does_not_change_unseen(bursts: list[list[Step]]) -> None:
    check(bursts)


@unprivileged
@tool("setpriv")
async def test_nor_where_permissions_change() -> None:
    await trio.to_thread.run_sync(settings(max_examples=60)(given(steps([*CHANGES, *MODES, *MODES]))(check)))


@root
@own_mounts
async def test_nor_where_mounts_change() -> None:
    await trio.to_thread.run_sync(
        settings(max_examples=60)(given(steps([*CHANGES, *MOUNTS, *MOUNTS]))(check))
    )


REPLACED: dict[str, list[Step]] = {
    "exchanged": [(exchange, "b", "c")],
    "moved away, another moved there": [(move, "b", "a"), (move, "c", "b")],
    "removed and made anew": [(remove, "b", ""), (make_deep, "b", "")],
}


@pytest.mark.parametrize("way", REPLACED)
def test_a_tree_in_place_of_another_is_watched_all_the_way_down(way: str) -> None:
    check([[(make_deep, "b", ""), (make_deep, "c", "")], REPLACED[way], [(write, "b/a/b/c/a", "")]])


@root
@own_mounts
async def test_a_tree_that_shows_again_is_watched_all_the_way_down() -> None:
    hidden: list[Step] = [(make_deep, "b", ""), (mount_empty, "b", "")]
    shown = partial(check, [hidden, [(unmount, "b", "")], [(write, "b/a/b/c/a", "")]])
    await trio.to_thread.run_sync(shown)


# Short of descriptors, and a directory that fails


@contextmanager
def descriptors(number: int) -> Iterator[None]:
    """No more than so many are left."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_PATH)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("number", range(10))
def test_without_descriptors_it_goes_on_when_there_are_some(number: int) -> None:
    with world() as root, Watcher() as watcher:
        make_deep(f"{root}/b", "")
        daemon = Daemon(watcher, interests(root)).followed()
        remove(f"{root}/b", "")
        make_deep(f"{root}/a", "")
        make_deep(f"{root}/b", "")
        with descriptors(number):
            watcher._collect()
        for key in interests(root):
            daemon.look(key)
        watcher.retry()
        assert_still_watching(daemon, root)
        assert not watcher.remarks()


@pytest.mark.parametrize("scope", Scope)
def test_a_directory_that_cannot_be_listed_for_a_while(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with world() as root, Watcher() as watcher:
        make_deep(f"{root}/b", "")
        daemon = Daemon(watcher, {"it": Interest(f"{root}/b", scope)}).followed()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", fails)
            make(f"{root}/b/new", "")
            assert watcher._collect() == {"it"}
        assert bool(watcher.remarks()) == (scope is Scope.TREE)
        daemon.look("it")
        watcher.retry()
        daemon.listen()
        write(f"{root}/b/new/file", "")
        daemon.listen()
        assert not daemon.missed()
        assert not watcher.remarks()


# A change between any two steps

OURS = {module.__file__ for module in (follow_links, watched_directories, watched_trees)}


class Between:
    """Makes changes before the system calls of these numbers, of those that watching makes; as a context manager."""

    def __init__(self, changes: dict[int, Callable[[], None]]) -> None:
        self._changes = changes
        self.calls = 0

    def __enter__(self) -> Between:
        sys.setprofile(self._step)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    @property
    def over(self) -> bool:
        """There were not that many."""
        return self.calls < max(self._changes)

    def _step(self, frame: FrameType, event: str, what: Any) -> None:
        ours = event == "c_call" and frame.f_code.co_filename in OURS
        if not (
            (ours and what.__module__ == "posix") or (event == "call" and frame.f_code.co_name == "add_watch")
        ):
            return
        self.calls += 1
        if self.calls not in self._changes:
            return
        sys.setprofile(None)
        try:
            self._changes[self.calls]()
        except OSError as error:  # or the code that is interrupted would take it for its own
            pytest.fail(f"the test's own change failed: {error}")
        sys.setprofile(self._step)


HERE = [(deep, "a/b/c", "")]
THERE = [*HERE, (deep, "x/b/c", "")]
TREE = [(deep, "a/b/c/d/e/f", ""), (make, "a/b/c/g", "")]
LINKS = [(deep, "y/b/c", ""), (deep, "z/b/c", ""), (link, "a", "y")]
NEW = (write, "a/b/c/1", "")

RACES: dict[str, tuple[list[Step], list[Step]]] = {
    "appears": ([], [*HERE, NEW]),
    "appears bit by bit": ([(make, "a", "")], [*TREE, NEW]),
    "goes": (HERE, [(remove, "a", "")]),
    "replaced": (HERE, [(remove, "a", ""), *HERE, NEW]),
    "ancestor replaced": (THERE, [(move, "a", "y"), (move, "x", "a")]),
    "ancestor exchanged": (THERE, [(exchange, "a", "x"), NEW]),
    "exchanged and back": (THERE, [(exchange, "a", "x"), NEW, (exchange, "a", "x")]),
    "link retargeted": (LINKS, [(retarget, "a", "z")]),
    "link becomes directory": (LINKS, [(remove, "a", ""), *HERE, NEW]),
    "directory becomes link": (HERE, [(move, "a", "y"), (link, "a", "y"), NEW]),
    "subdirectories appear": (HERE, [*TREE, (write, "a/b/c/d/e/f/1", "")]),
    "subdirectories move": (TREE, [(move, "a/b/c/d/e", "a/b/c/g/e"), (write, "a/b/c/g/e/f/1", "")]),
}


def carry_out(script: list[Step], root: str) -> None:
    for change, path, other in script:
        change(f"{root}/{path}", f"{root}/{other}")


@pytest.mark.parametrize("race", RACES)
def test_a_change_between_any_two_steps_of_the_first_chase_is_seen(race: str) -> None:
    before, change = RACES[race]

    def prepare(root: str, watcher: Watcher) -> Callable[[], Daemon]:
        carry_out(before, root)
        return lambda: Daemon(watcher, {"web": Interest(f"{root}/a/b/c", Scope.TREE)})

    at_every_step(prepare, change)


@pytest.mark.parametrize("race", RACES)
def test_a_change_between_any_two_steps_of_a_later_chase_is_seen(race: str) -> None:
    before, change = RACES[race]

    def prepare(root: str, watcher: Watcher) -> Callable[[], Daemon]:
        carry_out(before or [(make, "a", "")], root)
        daemon = Daemon(watcher, {"web": Interest(f"{root}/a/b/c", Scope.TREE)})
        carry_out([(move, "a", "old"), *(step for step in before if step[1].startswith("a"))], root)
        return daemon.followed

    at_every_step(prepare, change)


@root
@own_mounts
@pytest.mark.parametrize("length", [10, 40, 80])
@pytest.mark.parametrize("place", ["a", "a/b/c/d"])
async def test_what_is_mounted_only_between_two_steps_does_not_matter(place: str, length: int) -> None:
    def prepare(root: str, watcher: Watcher) -> Callable[[], Daemon]:
        carry_out([*TREE, (deep, "x/b/c/d/e/f", "")], root)
        return lambda: Daemon(watcher, {"web": Interest(f"{root}/a/b/c", Scope.TREE)})

    mount: list[Step] = [(bind, place, f"x{place[1:]}")]
    # In the mount table that is read next, only something else is new.
    unmount_again: list[Step] = [(unmount, place, ""), (mount_empty, "x", "")]
    await trio.to_thread.run_sync(at_every_step, prepare, mount, unmount_again, length)


def at_every_step(
    prepare: Callable[[str, Watcher], Callable[[], Daemon]],
    change: list[Step],
    undo: list[Step] | None = None,
    length: int = 1,
) -> None:
    """Carry out `change` before the first, second, ... last system call of what `prepare` returns.

    `undo` is carried out `length` system calls later.
    """
    for number in itertools.count(1):
        with world() as root, Watcher() as watcher:
            follow = prepare(root, watcher)
            changes = {number: partial(carry_out, change, root)}
            if undo:
                changes[number + length] = partial(carry_out, undo, root)
            with Between(changes) as between:
                daemon = follow()
            if undo and between.calls < number + length:
                return
            daemon.listen()
            assert not daemon.missed()
            assert_still_watching(daemon, root)
            if between.over:
                assert number > 10
                return


def assert_still_watching(daemon: Daemon, root: str) -> None:
    os.makedirs(f"{root}/a/b/c/new/directory", exist_ok=True)
    daemon.listen()
    write(f"{root}/a/b/c/new/directory/probe", "")
    daemon.listen()
    assert not daemon.missed()


def test_changes_without_pause_are_seen_in_the_end() -> None:
    with world() as root, Watcher() as watcher:
        daemon = Daemon(watcher, interests(root))
        choose = random.Random(1).choice
        places = ["a", "b", "c", "a/b", "b/a", "b/b", "a/b/c", "b/b/c", "a/c", "c/a"]
        bursts = [[(choose(CHANGES), choose(places), choose(places)) for _ in range(50)] for _ in range(100)]

        def rage() -> None:
            for burst in bursts:
                for step in burst:
                    apply(step, root)

        thread = threading.Thread(target=rage)
        thread.start()
        while thread.is_alive():
            daemon.listen()
        thread.join()
        daemon.listen()
        assert not daemon.missed()
