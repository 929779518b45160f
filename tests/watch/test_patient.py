# SPDX-License-Identifier: LGPL-2.1-or-later
"""A watcher whose paths may hang: on a FUSE file system that does, and with nothing that does.

Nobody waits for the hang itself to be found out: STEP_HANGS_SEC is made short where a test needs it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing
from pathlib import Path

import pytest
import trio
import trio.testing

from support.changes import CHANGES, apply, interests, shows, world
from support.hangs import LOOKUP, OPENDIR, READDIR, READLINK, Hanging, hanging
from support.needs import root
from watcher.model import Interest, Scope
from watcher.watch import patient
from watcher.watch.patient import PatientWatcher

pytestmark = root


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[PatientWatcher]:
    monkeypatch.setattr(patient, "STEP_HANGS_SEC", 0.3)
    monkeypatch.setattr(patient, "LATE_SEC", 0.6)
    with PatientWatcher() as made:
        yield made


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    return tmp_path / "good"


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Hanging]:
    """A directory of a file system that answers, for now: with `a/b/` and a link to it."""
    (tmp_path / "shown/a/b").mkdir(parents=True)
    (tmp_path / "shown/link").symlink_to("a")
    (tmp_path / "dead").mkdir()
    with hanging(tmp_path / "shown", tmp_path / "dead") as mounted:
        yield mounted


async def told(changes: AsyncIterator[frozenset[str]], key: str) -> None:
    with trio.fail_after(30):
        async for keys in changes:
            if key in keys:
                return


async def test_what_happens_in_a_new_directory_is_told_after_watch(
    watcher: PatientWatcher, good: Path
) -> None:
    async with aclosing(watcher.changes()) as changes:
        assert await watcher.watch("good", [Interest(str(good)), Interest(str(good / "new"), Scope.TREE)])
        assert not await watcher.watch("good", [Interest(str(good)), Interest(str(good / "new"), Scope.TREE)])
        (good / "new/deep").mkdir(parents=True)
        await told(changes, "good")
        await trio.testing.wait_all_tasks_blocked()
        assert not await watcher.watch("good", [Interest(str(good)), Interest(str(good / "new"), Scope.TREE)])
        watcher.drop("good")
        (good / "more").touch()
        assert await watcher.watch("fence", [Interest(str(good))])
        (good / "fence").touch()
        with trio.fail_after(30):
            assert await anext(changes) == {"fence"}


STEPS = {
    "look-up": ((LOOKUP,), "a/b", Scope.CHILDREN),
    "link": ((READLINK,), "link/b", Scope.CHILDREN),
    "opening a tree": ((OPENDIR,), "a", Scope.TREE),
    "reading a tree": ((READDIR,), "a", Scope.TREE),
    "everything": ((), "a/b", Scope.TREE),
}


@pytest.mark.parametrize("step", STEPS)
async def test_others_are_told_while_one_hangs_and_it_goes_on_by_itself(
    watcher: PatientWatcher, good: Path, dead: Hanging, step: str
) -> None:
    operations, path, scope = STEPS[step]
    await watcher.watch("good", [Interest(str(good))])
    dead.hang(*operations)
    async with aclosing(watcher.changes()) as changes, trio.open_nursery() as nursery:
        with trio.fail_after(30):
            await watcher.watch("hung", [Interest(str(dead.where / path), scope)])
        for number in range(3):  # while it hangs, while all is watched again, and after
            (good / f"{number}").touch()
            await told(changes, "good")
        with trio.fail_after(30):
            while not watcher.remarks():
                (good / "again").touch()
                await told(changes, "good")
        (good / "sub").mkdir()
        await watcher.watch("more", [Interest(str(good / "sub"))])
        (good / "sub/file").touch()
        await told(changes, "more")
        (remark,) = watcher.remarks()
        assert remark.path == str(dead.where / path) and "does not answer" in remark.text
        dead.answer()
        await told(changes, "hung")
        with trio.fail_after(30):
            while watcher.remarks():
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_one_that_is_unmounted_while_it_hangs_goes_on(
    watcher: PatientWatcher, good: Path, dead: Hanging
) -> None:
    async with aclosing(watcher.changes()) as changes:
        dead.hang()
        await watcher.watch("hung", [Interest(str(dead.where / "a"))])
        await watcher.watch("good", [Interest(str(good))])
        (good / "0").touch()
        await told(changes, "good")
        dead.end()
        await told(changes, "hung")


async def test_fifty_that_hang_on_one_file_system_take_one_thread(
    watcher: PatientWatcher, good: Path, dead: Hanging
) -> None:
    async with aclosing(watcher.changes()) as changes:
        await watcher.watch("good", [Interest(str(good))])
        before = len(os.listdir("/proc/self/task"))
        dead.hang()
        async with trio.open_nursery() as nursery:
            for number in range(50):
                interests = [Interest(str(dead.where / f"{number}"))]
                nursery.start_soon(watcher.watch, f"hung-{number}", interests)
            (good / "0").touch()
            await told(changes, "good")
        for number in range(1, 4):
            (good / f"{number}").touch()
            await told(changes, "good")
        assert len(os.listdir("/proc/self/task")) <= before + 2
        dead.answer()
        await told(changes, "hung-49")


async def test_one_that_answers_slowly_does_not_take_the_others_time(
    watcher: PatientWatcher, good: Path, dead: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "SLOW_SEC", 0.2)
    for number in range(100):
        (dead.shown / f"a/{number}").mkdir()
    dead.slow(0.05)
    async with aclosing(watcher.changes()) as changes:
        await watcher.watch("good", [Interest(str(good))])
        await watcher.watch("slow", [Interest(str(dead.where / "a"), Scope.TREE)])
        while not watcher.remarks():
            (good / "file").touch()
            await told(changes, "good")
        (good / "new").mkdir()
        await watcher.watch("more", [Interest(str(good / "new"))])
        (good / "new/file").touch()
        await told(changes, "more")


async def test_three_that_hang_are_left_alone_one_by_one(
    watcher: PatientWatcher, tmp_path: Path, good: Path
) -> None:
    async with aclosing(watcher.changes()) as changes:
        await watcher.watch("good", [Interest(str(good))])
        with ExitStack() as stack:
            mounts = []
            for number in range(3):
                (tmp_path / f"shown-{number}").mkdir()
                (tmp_path / f"dead-{number}").mkdir()
                mounts.append(
                    stack.enter_context(hanging(tmp_path / f"shown-{number}", tmp_path / f"dead-{number}"))
                )
                mounts[-1].hang()
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    interests = [Interest(str(tmp_path / f"dead-{number}/x"))]
                    nursery.start_soon(watcher.watch, f"hung-{number}", interests)
                while len(watcher.remarks()) < 3:
                    (good / "file").touch()
                    await told(changes, "good")
            for number in range(3):
                mounts[number].answer()
                await told(changes, f"hung-{number}")


async def test_what_hangs_behind_a_watched_tree_is_left_alone(
    watcher: PatientWatcher, tmp_path: Path, good: Path
) -> None:
    (tmp_path / "shown").mkdir()
    (good / "inner").mkdir()
    async with aclosing(watcher.changes()) as changes:
        await watcher.watch("tree", [Interest(str(good), Scope.TREE)])
        with hanging(tmp_path / "shown", good / "inner") as dead:
            dead.hang()
            (good / "file").touch()
            await told(changes, "tree")
            with trio.fail_after(30):
                while not watcher.remarks():
                    (good / "more").mkdir()
                    await told(changes, "tree")
                    shutil.rmtree(good / "more")
            dead.answer()
            await told(changes, "tree")


async def test_more_events_than_are_kept_are_told_in_the_end(
    watcher: PatientWatcher, good: Path, dead: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "EVENTS_MAX", 3)
    monkeypatch.setattr(patient, "STEP_HANGS_SEC", 3600.0)
    async with aclosing(watcher.changes()) as changes:
        await watcher.watch("tree", [Interest(str(good), Scope.TREE)])
        await watcher.watch("hung", [Interest(str(dead.where / "none"))])
        dead.hang()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher.watch, "more", [Interest(str(dead.where / "a"))])
            await trio.testing.wait_all_tasks_blocked()
            for number in range(10):
                (good / f"{number}").mkdir()
            await told(changes, "tree")
            dead.answer()
        for number in range(10):
            while f"{number}" not in (
                node.name for node in watcher._directories.root.below() if node.in_tree
            ):
                (good / "again").touch()
                await told(changes, "tree")
        (good / "9/file").touch()
        await told(changes, "tree")


class Looking:
    """Does what the daemon does: looks at a service again whenever its key is told."""

    def __init__(self, watcher: PatientWatcher, watched: dict[str, Interest], fence: str) -> None:
        self.watcher = watcher
        self._watched = watched
        self._fence = fence
        self._fences = 0
        self._seen: dict[str, object] = {}

    async def begin(self) -> None:
        await self.watcher.watch("fence", [Interest(self._fence)])
        for key, interest in self._watched.items():
            while await self.watcher.watch(key, [interest]):
                self._seen[key] = shows(interest)

    async def listen(self) -> None:
        async for keys in self.watcher.changes():
            self._fences += "fence" in keys
            for key in keys - {"fence"}:
                self._seen[key] = shows(self._watched[key])

    async def until_all_is_followed(self) -> None:
        todo = self.watcher._directories
        for _ in range(2):
            before = self._fences
            Path(self._fence, f"{before}").touch()
            while self._fences == before or self.watcher._run or todo.dirty or todo.relist or todo.changed:
                await trio.sleep(0.001)

    def missed(self) -> list[str]:
        return [key for key, interest in self._watched.items() if self._seen[key] != shows(interest)]


async def test_what_a_path_shows_does_not_change_unseen(good: Path) -> None:
    choose = random.Random(1).choice
    places = ["a", "b", "c", "a/b", "b/a", "b/b", "a/b/c", "b/b/c", "a/c", "c/a"]
    with world() as tree, PatientWatcher() as watcher:
        looking = Looking(watcher, interests(tree), str(good))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(looking.listen)
            await looking.begin()
            for number in range(150):
                for _ in range(number % 7 + 1):
                    apply((choose(CHANGES), choose(places), choose(places)), tree)
                    if number % 2:
                        await trio.sleep(0)  # while a thread follows what the last change has changed
                with trio.fail_after(30):
                    await looking.until_all_is_followed()
                assert not looking.missed()
            nursery.cancel_scope.cancel()
