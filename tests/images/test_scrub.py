# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store's copies are read again when they are due, from the disk, and nothing wakes up before."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from images.test_store import MIB, add, dropped

from support.images import confext
from support.needs import loop, root, tool, which
from watcher.images import files, scrub
from watcher.images.scrub import Checked, Ended, Scrub, begun, plan
from watcher.images.store import Store
from watcher.settings.values import INFINITY

DAY = 86_400_000_000
NOW = 1_000 * DAY
WEEK = 7 * DAY
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


class TestPlan:
    """Pure."""

    @pytest.mark.parametrize(
        ("checked", "due"),
        [
            (Checked(), NOW + 6 * DAY),
            (Checked(times={ONE: NOW}), NOW + WEEK),
            (Checked(times={ONE: NOW - 30 * DAY}), NOW - 23 * DAY),
            (Checked(doubted=NOW, times={ONE: NOW - 2}), NOW - 2),
            (Checked(doubted=NOW), NOW - DAY),
            (Checked(doubted=NOW - 2 * DAY), NOW + 6 * DAY),
            (Checked(doubted=NOW - 2, times={ONE: NOW - 1}), NOW - 1 + WEEK),
            (Checked(times={ONE: NOW + 1}), NOW),
        ],
        ids=[
            "never read since it was made",
            "just read",
            "long ago",
            "read before the host went down",
            "made before the host went down",
            "made after the host went down",
            "read after the host went down",
            "the clock was set back",
        ],
    )
    def test_when_a_copy_is_due(self, checked: Checked, due: int) -> None:
        assert plan({ONE: NOW - DAY}, checked, WEEK, NOW) == [(due, ONE)]

    def test_the_most_urgent_is_first(self) -> None:
        checked = Checked(times={ONE: NOW - DAY, TWO: NOW - 2 * DAY})
        assert [digest for _, digest in plan({ONE: 0, TWO: 0}, checked, WEEK, NOW)] == [TWO, ONE]

    def test_what_is_gone_is_not_due(self) -> None:
        assert plan({}, Checked(times={ONE: 0}), WEEK, NOW) == []

    @pytest.mark.parametrize(
        ("last", "doubted"),
        [
            (Checked(), 0),
            (Checked(doubted=1), 1),
            (Checked("this", doubted=1), 1),
            (Checked("another", doubted=1), NOW),
            (None, NOW),
        ],
        ids=["the first, or after a clean end", "after that, again", "killed", "power cut", "unreadable"],
    )
    def test_what_a_daemon_begins_with(self, last: Checked | None, doubted: int) -> None:
        checked = begun(last, "this", NOW)
        assert (checked.boot, checked.doubted) == ("this", doubted)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads: trio's clock of the tests does not wait for them."""

    async def run(self: Scrub, function: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return function()

    monkeypatch.setattr(Scrub, "_in_thread", run)


class Clock:
    """The wall clock, which goes with trio's."""

    def __call__(self) -> int:
        return NOW + round(trio.current_time() * 1_000_000)


def started(*args: Any) -> Scrub:
    made = Scrub(*args)
    made.begin()
    return made


def read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of what is read from the disk."""
    seen: list[str] = []
    before = store.whole.scrub

    def noted(digest: str, pace: Callable[[], object]) -> bool:
        seen.append(digest)
        return before(digest, pace)

    monkeypatch.setattr(store.whole, "scrub", noted)
    return seen


def made_at(digest: str, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    monkeypatch.setattr(Scrub, "_made", lambda self: {digest: when})


@pytest.mark.usefixtures("inline")
async def test_it_sleeps_until_the_next_copy_is_due(
    store: Store, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    seen = read_again(store, monkeypatch)
    made_at(copy.digest, monkeypatch, NOW)
    scrubbing = started(store, lambda: WEEK, lambda: pytest.fail("whole"), Clock())
    days = []
    with trio.move_on_after(30 * 86400):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubbing.run)
            while True:
                await trio.sleep(86400 - 3600)
                days.append(len(seen))
                await trio.sleep(3600)
    assert days[:22] == [0] * 7 + [1] * 7 + [2] * 7 + [3]


@pytest.mark.parametrize("every", [0, INFINITY])
@pytest.mark.usefixtures("inline")
async def test_it_is_switched_off_and_on(
    store: Store,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    seen = read_again(store, monkeypatch)
    made_at(copy.digest, monkeypatch, 0)
    setting = [every]
    scrubbing = started(store, lambda: setting[0], lambda: None, Clock())
    with trio.move_on_after(10 * 86400):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubbing.run)
            await trio.sleep(86400)
            assert not seen
            setting[0] = WEEK
            scrubbing.wake()
            await trio.sleep(86400)
            assert seen == [copy.digest]


@pytest.mark.usefixtures("inline")
async def test_a_damaged_copy_is_told_of_and_not_read_again_and_again(
    store: Store, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    Path(copy.path).write_bytes(b"CONTENT")
    seen, told = read_again(store, monkeypatch), []
    made_at(copy.digest, monkeypatch, 0)
    scrubbing = started(store, lambda: WEEK, lambda: told.append(True), Clock())
    with trio.move_on_after(86400):
        await scrubbing.run()
    assert (seen, told) == ([copy.digest], [True])
    assert not store.verify(copy.digest) and os.path.exists(copy.path)


@pytest.mark.usefixtures("inline")
async def test_what_was_read_is_known_after_a_restart(
    store: Store, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    seen = read_again(store, monkeypatch)
    made_at(copy.digest, monkeypatch, 0)
    for _ in range(2):  # the second one after a kill
        with trio.move_on_after(86400):
            await started(store, lambda: WEEK, lambda: None, Clock()).run()
    assert seen == [copy.digest]


@pytest.mark.usefixtures("inline")
async def test_the_next_daemon_reads_what_was_damaged_at_once(
    store: Store, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    Path(copy.path).write_bytes(b"CONTENT")
    made_at(copy.digest, monkeypatch, 0)
    for _ in range(2):
        with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as again:
            seen = read_again(again, monkeypatch)
            scrubbing = started(again, lambda: WEEK, lambda: None, Clock())
            with trio.move_on_after(3600):
                await scrubbing.run()
            scrubbing.close()
        assert seen == [copy.digest]


def test_after_an_unclean_shutdown_all_is_due(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(boot: str) -> Scrub:
        monkeypatch.setattr(scrub, "_boot_id", lambda: boot)
        return started(store, lambda: WEEK, lambda: None, lambda: NOW)

    def doubted() -> int:
        found: int = json.loads((tmp_path / "state/checked").read_text())["doubted"]
        return found

    start("first").close()
    start("second")
    start("second")  # it was killed, and the host went on
    assert doubted() == 0 and "went down" not in capsys.readouterr().out
    start("third").close()
    assert doubted() == NOW and "went down" in capsys.readouterr().out
    start("fourth").close()
    assert doubted() == NOW and "went down" not in capsys.readouterr().out
    (tmp_path / "state/checked").write_text("{")
    start("fifth").close()
    assert "cannot be read" in capsys.readouterr().out


def test_what_a_thread_still_writes_when_the_daemon_ends_does_not_mix_with_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_to_write, go_on = threading.Event(), threading.Event()
    one = started(store, lambda: WEEK, lambda: None)

    def dump(value: object, file: Any) -> None:
        text = json.dumps(value)
        file.write(text[:9])
        if not begun_to_write.is_set():
            begun_to_write.set()
            go_on.wait()
        file.write(text[9:])

    monkeypatch.setattr("watcher.images.scrub.json.dump", dump)
    threads = [threading.Thread(target=one._write), threading.Thread(target=one.close)]
    threads[0].start()
    begun_to_write.wait()
    threads[1].start()
    threads[1].join(0.5)
    go_on.set()
    for thread in threads:
        thread.join()
    assert scrub._read(one._path) == Checked()


def test_a_full_disk_is_said_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state/checked.new").mkdir()
    started(store, lambda: WEEK, lambda: None, lambda: NOW).close()
    assert capsys.readouterr().out.count("may be read again sooner") == 1


@pytest.mark.usefixtures("inline")
async def test_a_store_that_cannot_be_looked_into_ends_nothing(
    store: Store,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(store, dropped(tmp_path, b"content"))
    (tmp_path / "state/store").rename(tmp_path / "state/away")
    scrubbing = started(store, lambda: WEEK, lambda: None, Clock())
    with trio.move_on_after(86400):
        await scrubbing.run()
    assert capsys.readouterr().out.count("cannot be read again now") == 1
    (tmp_path / "state/away").rename(tmp_path / "state/store")
    seen = read_again(store, monkeypatch)
    monkeypatch.setattr(scrub, "plan", lambda made, *_: [(0, digest) for digest in made])
    with trio.move_on_after(10):
        await started(store, lambda: WEEK, lambda: None, Clock()).run()
    assert seen


def test_a_copy_that_is_gone_is_not_damaged(store: Store, tmp_path: Path) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    os.unlink(copy.path)
    assert store.whole.scrub(copy.digest, lambda: None)


def test_a_copy_that_is_collected_meanwhile_is_not_damaged(store: Store, tmp_path: Path) -> None:
    copy = add(store, confext(tmp_path / "web", "web", {"etc/a.conf": b"x", "etc/b.conf": b"x"}))
    assert store.whole.scrub(copy.digest, lambda: shutil.rmtree(copy.path, ignore_errors=True))


def test_reading_ends_with_the_watcher(store: Store, tmp_path: Path) -> None:
    copy = add(store, dropped(tmp_path, os.urandom(4 * files.CHUNK)))

    def end() -> None:
        raise Ended

    with pytest.raises(Ended):
        store.whole.scrub(copy.digest, end)
    assert store.verify(copy.digest)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, files.CHUNK - 1, files.CHUNK, files.CHUNK + 4097])
def test_all_sizes_are_read_past_the_cache(store: Store, tmp_path: Path, size: int) -> None:
    image = add(store, dropped(tmp_path, os.urandom(size)))
    sparse = dropped(tmp_path, os.urandom(size), "sparse.raw")
    os.truncate(sparse, size + 3 * files.CHUNK + 1)
    for copy in (image, add(store, sparse)):
        assert store.whole.scrub(copy.digest, lambda: None)


@contextlib.contextmanager
def ext4(disk: Path, place: Path) -> Iterator[Path]:
    """A new file system in a file, mounted."""
    mkfs = which("mkfs.ext4")
    assert mkfs is not None
    disk.touch()
    os.truncate(disk, 16 * MIB)
    place.mkdir()
    subprocess.run([mkfs, "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def flip_on_the_disk(device: Path, content: bytes) -> None:
    """One bit of what the disk has at the place of this content. The kernel's memory of a file keeps it."""
    os.sync()
    with device.open("r+b") as disk, mmap.mmap(disk.fileno(), 0) as view:
        at = view.find(content)
        assert at >= 0 and view.find(content, at + 1) < 0
        view[at + 100] ^= 1
        view.flush()


@root
@loop
@tool("mkfs.ext4")
@pytest.mark.parametrize("is_tree", [False, True], ids=["image", "tree"])
def test_a_bit_that_flips_on_the_disk_is_found_though_the_kernel_remembers_the_file(
    tmp_path: Path, is_tree: bool
) -> None:
    disk, content = tmp_path / "disk", os.urandom(8192)
    with (
        ext4(disk, tmp_path / "mounted") as mounted,
        Store(str(mounted / "state"), 8 * MIB, 8 * MIB, 2) as store,
    ):
        source = dropped(tmp_path, content)
        if is_tree:
            source = confext(tmp_path / "web", "web", {"etc/web.conf": content})
        copy = add(store, source)
        file = Path(copy.path, "etc/web.conf") if is_tree else Path(copy.path)
        assert store.whole.scrub(copy.digest, lambda: None)
        flip_on_the_disk(disk, content)
        assert file.read_bytes() == content
        assert store.verify(copy.digest)
        assert not store.whole.scrub(copy.digest, lambda: None)
        assert not store.verify(copy.digest)
        store.whole.doubt([copy.digest])
        assert not store.verify(copy.digest), "what the kernel remembers is not what the next boot reads"
        add(store, source)
        assert store.verify(copy.digest) and store.whole.scrub(copy.digest, lambda: None)
