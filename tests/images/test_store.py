# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies in the store are whole, bounded, and there as long as they are needed; whatever happens to the rest.

With images/store_names.py and images/errors.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.images import confext, program
from support.killing import killed_before
from support.needs import root, tool
from watcher.images import tree
from watcher.images.errors import StoreFull
from watcher.images.formats.image import Image
from watcher.images.formats.squashfs import SQUASHFS
from watcher.images.integrity import Whole
from watcher.images.stacks import Stacks
from watcher.images.store import Store
from watcher.model import Busy, Copy, Kind, Later, Layer, Refused, Stack
from watcher.records import durable
from watcher.records.state import State
from watcher.records.together import Gathering
from watcher.watch.lease import Lease

UNIT = "web.service"
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def add(store: Store, path: Path) -> Copy:
    with opened(path) as fd:
        if path.is_dir():
            return store.add_tree(fd, tree.signature(fd))
        with Lease(fd) as lease:
            return store.add_image(fd, Image(SQUASHFS, 0), lease)


def dropped(tmp_path: Path, content: bytes, name: str = "web.raw") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def layer(copy: Copy, slot: str = "web.raw") -> Layer:
    return Layer(slot, "web", "1", copy.digest, copy.kind, "/srv/web.raw")


def inside(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "state/store")) - {".lock", ".names"}


class TestImages:
    @pytest.mark.parametrize("size", [1, 4096, MIB - 1, MIB, MIB + 1, 5 * MIB + 77])
    def test_a_copy_is_what_its_name_says(self, store: Store, tmp_path: Path, size: int) -> None:
        content = os.urandom(size)
        copy = add(store, dropped(tmp_path, content))
        assert copy.digest == hashlib.sha256(content).hexdigest()
        assert (copy.size, copy.kind, copy.format) == (size, Kind.IMAGE, Image(SQUASHFS, 0))
        path = Path(copy.path)
        assert path == tmp_path / "state/store" / copy.digest
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        assert inside(tmp_path) == {copy.digest}

    @pytest.mark.parametrize("umask", [0o000, 0o777])
    def test_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        path = dropped(tmp_path, b"x")
        before = os.umask(umask)
        try:
            with Store(str(tmp_path / "state"), MIB, MIB, 2) as store:
                copy = add(store, path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(Path(copy.path).stat().st_mode) == 0o400
        assert stat.S_IMODE((tmp_path / "state/store").stat().st_mode) == 0o700

    def test_the_dropped_file_may_then_be_overwritten_or_deleted(self, store: Store, tmp_path: Path) -> None:
        path = dropped(tmp_path, b"first")
        copy = add(store, path)
        path.write_bytes(b"other")
        path.unlink()
        assert Path(copy.path).read_bytes() == b"first"

    def test_the_same_content_is_one_copy(self, store: Store, tmp_path: Path) -> None:
        first = add(store, dropped(tmp_path, b"same", "a.raw"))
        inode = Path(first.path).stat().st_ino
        assert add(store, dropped(tmp_path, b"same", "b.raw")) == first
        assert Path(first.path).stat().st_ino == inode

    def test_the_same_content_copied_at_once_is_one_copy(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A drop for many services: nothing takes the place of a copy that is mounted already."""
        paths = [dropped(tmp_path, b"same", name) for name in ("a.raw", "b.raw")]
        both_miss_it = threading.Barrier(2)
        verify, place = Whole.verify, Whole.place
        inodes = []

        def verify_slowly(whole: Whole, digest: str) -> bool:
            found = verify(whole, digest)
            if not found:
                with contextlib.suppress(threading.BrokenBarrierError):
                    both_miss_it.wait(1)
            return found

        def note_inode(whole: Whole, made: str, digest: str) -> None:
            place(whole, made, digest)
            inodes.append(os.stat(tmp_path / "state/store" / digest).st_ino)

        monkeypatch.setattr(Whole, "verify", verify_slowly)
        monkeypatch.setattr(Whole, "place", note_inode)
        threads = [threading.Thread(target=add, args=(store, path)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(inodes) == 2 and len(set(inodes)) == 1
        assert inside(tmp_path) == {hashlib.sha256(b"same").hexdigest()}

    def test_a_damaged_copy_is_replaced(self, store: Store, tmp_path: Path) -> None:
        path = dropped(tmp_path, b"same")
        copy = add(store, path)
        os.truncate(copy.path, 1)
        assert not store.verify(copy.digest)
        assert add(store, path) == copy
        assert Path(copy.path).read_bytes() == b"same"
        assert store.verify(copy.digest)

    def test_holes_are_not_filled(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "web.raw"
        with path.open("wb") as file:
            file.write(b"x")
            file.truncate(20 * MIB)
        copy = add(store, path)
        assert Path(copy.path).read_bytes() == path.read_bytes()
        assert Path(copy.path).stat().st_blocks < 100
        assert copy.digest == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_a_writer_during_the_copy_has_its_way_and_nothing_is_left(
        self, store: Store, tmp_path: Path
    ) -> None:
        path = dropped(tmp_path, os.urandom(20 * MIB))
        source = "import sys; file = open(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
        with opened(path) as fd, Lease(fd) as lease:
            writer = subprocess.Popen(
                [sys.executable, "-S", "-c", source, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            with writer:
                while lease.held():
                    pass
                with pytest.raises(Busy):
                    store.add_image(fd, Image(SQUASHFS, 0), lease)
                lease.release()
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"open\n"
                writer.communicate()
        assert inside(tmp_path) == set()

    def test_writers_are_let_go_before_the_disk_has_everything(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = dropped(tmp_path, os.urandom(2 * MIB))
        held = []
        with opened(path) as fd, Lease(fd) as lease:
            sync = os.fdatasync

            def fdatasync(target: int) -> None:
                held.append(lease.held())
                sync(target)

            monkeypatch.setattr(os, "fdatasync", fdatasync)
            store.add_image(fd, Image(SQUASHFS, 0), lease)
        assert held == [False]


class TestTrees:
    def test_a_copy_of_a_tree(self, store: Store, tmp_path: Path) -> None:
        source = confext(tmp_path / "web", "web", {"etc/web.conf": b"x = 1\n"})
        copy = add(store, source)
        assert (copy.kind, copy.format, copy.size) == (Kind.DIRECTORY, None, 5 * 4096)
        assert Path(copy.path, "etc/web.conf").read_bytes() == b"x = 1\n"
        with opened(source) as fd:
            assert tree.digest(fd) == copy.digest
        assert add(store, source) == copy
        assert inside(tmp_path) == {copy.digest}

    def test_a_change_during_the_copy_is_never_admitted(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = confext(tmp_path / "web", "web", {"etc/web.conf": b"x = 1\n", "etc/zz": b""})
        copy = tree.copy

        def changed(*arguments: int) -> str:
            copied = copy(*arguments)
            (source / "etc/web.conf").write_bytes(b"x = 2\n")  # already copied, same size
            return copied

        monkeypatch.setattr(tree, "copy", changed)
        with pytest.raises(Busy, match="changed while it was read"):
            add(store, source)
        assert inside(tmp_path) == set()

    def test_nor_when_there_is_no_room_and_only_its_digest_is_asked_for(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = confext(tmp_path / "web", "web", {"etc/web.conf": b"x = 1\n"})
        add(store, source)
        store.configure(5 * 4096, 5 * 4096, 2)
        digest = tree.digest

        def changed(root: int) -> str:
            found = digest(root)
            (source / "etc/web.conf").write_bytes(b"x = 2\n")
            return found

        monkeypatch.setattr(tree, "digest", changed)
        with pytest.raises(Busy, match="changed while it was read"):
            add(store, source)

    def test_a_copy_waits_until_a_change_could_be_told_by_its_time(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = confext(tmp_path / "web", "web")
        with opened(source) as fd:
            signature = tree.signature(fd)
            times = [signature.youngest_ns, signature.youngest_ns - 1, signature.youngest_ns + 1]
            copy = tree.copy

            def checked(*arguments: int) -> str:
                assert not times
                return copy(*arguments)

            monkeypatch.setattr(tree, "coarse_now_ns", lambda: times.pop(0))
            monkeypatch.setattr(tree, "copy", checked)
            store.add_tree(fd, signature)

    def test_all_of_it_is_on_the_disk_before_it_has_its_name(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(inside(tmp_path)))
        copy = add(store, confext(tmp_path / "web", "web"))
        assert len(synced) == 4
        assert all(copy.digest not in names for names in synced)

    def test_nothing_of_a_refused_tree_is_left(self, store: Store, tmp_path: Path) -> None:
        source = confext(tmp_path / "web", "web")
        with opened(source) as fd:
            before = tree.signature(fd)
            os.mkfifo(source / "etc/zz")
            with pytest.raises(Refused, match="FIFO"):
                store.add_tree(fd, before)
        assert inside(tmp_path) == set()

    def test_copies_survive_modes_that_forbid_everything(self, store: Store, tmp_path: Path) -> None:
        source = confext(tmp_path / "web", "web", {"etc/secret": b"x"})
        (source / "etc/secret").chmod(0o400)
        (source / "etc").chmod(0o500)
        copy = add(store, source)
        assert stat.S_IMODE(Path(copy.path, "etc").stat().st_mode) == 0o500
        (source / "etc").chmod(0o700)
        assert store.collect(()) == (copy.digest,)
        assert inside(tmp_path) == set()


def many(path: Path, files: int = 0, directories: int = 0, links: int = 0) -> Path:
    """A confext with so many of these, all empty."""
    source = confext(path, "web")
    for number in range(files):
        (source / f"etc/{number}").touch()
    for number in range(directories):
        (source / f"etc/d{number}").mkdir()
    for number in range(links):
        (source / f"etc/l{number}").symlink_to("x")
    return source


# Of a confext without a file: its root, etc/, extension-release.d/ and the file in that.
BARE = 4 * 4096


class TestRoom:
    """What a copy counts for: whole blocks, and one for each inode, or the disk is full long before `StoreMax=`."""

    @pytest.mark.parametrize("what", ["files", "directories", "links"])
    def test_what_has_no_content_takes_room(self, tmp_path: Path, what: str) -> None:
        source = many(tmp_path / "web", **{what: 1000})
        with Store(str(tmp_path / "state"), 64 * MIB, MIB, 2) as store:
            with pytest.raises(Refused, match=rf"too large: {BARE + 1000 * 4096} bytes, {MIB} are allowed"):
                add(store, source)
            store.configure(64 * MIB, 64 * MIB, 2)
            copy = add(store, source)
            assert store.usage() == copy.size == BARE + 1000 * 4096
        with Store(str(tmp_path / "state"), 64 * MIB, MIB, 2) as store:
            assert store.usage() == copy.size  # looked into anew

    def test_many_small_images_take_a_block_each(self, tmp_path: Path) -> None:
        with Store(str(tmp_path / "state"), 10 * 4096, MIB, 2) as store:
            for number in range(10):
                add(store, dropped(tmp_path, b"%d" % number))
            with pytest.raises(StoreFull, match=r"40960 of 40960 bytes .* 4096 more"):
                add(store, dropped(tmp_path, b"x"))

    def test_holes_count(self, tmp_path: Path) -> None:
        """They are read and hashed, and what is in a file may have no hole in the next version."""
        source = confext(tmp_path / "web", "web")
        with open(source / "etc/sparse", "wb") as file:
            file.truncate(2 * MIB)
        with (
            Store(str(tmp_path / "state"), 64 * MIB, MIB, 2) as store,
            pytest.raises(Refused, match="too large"),
        ):
            add(store, source)


@root
@pytest.mark.parametrize("where", ["etc/web.conf", "etc/extension-release.d/extension-release.web"])
def test_attributes_of_a_file_are_bounded(tmp_path: Path, where: str) -> None:
    """They are not in its size; elsewhere than on ext4, each of any number may have 64 KiB."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        source = confext(Path(memory) / "web", "web", {"etc/web.conf": b"x"})
        for count, largest in ((1, 3584 - 29), (100, 0)):
            for number in range(count):
                os.setxattr(source / where, f"trusted.{number}", bytes(largest))
            with Store(str(tmp_path / "state"), 64 * MIB, 64 * MIB, 2) as store:
                copy = add(store, source)
                assert store.verify(copy.digest)
            with Store(str(tmp_path / "state"), 64 * MIB, 64 * MIB, 2) as store:
                assert store.verify(copy.digest)  # with what a copy has besides
                os.setxattr(source / where, "trusted.more", bytes(3584 - 100))
                with pytest.raises(
                    Refused, match=rf"^{where} in it has too many extended attributes: remove some"
                ):
                    add(store, source)
            for name in os.listxattr(source / where):
                os.removexattr(source / where, name)


class TestLimits:
    def test_one_image_too_large(self, tmp_path: Path) -> None:
        with Store(str(tmp_path / "state"), 10_000, 1000, 2) as store:
            add(store, dropped(tmp_path, bytes(1000)))
            with pytest.raises(Refused, match=r"^too large: 1001 bytes, 1000 are allowed \(ImageMax=\)$"):
                add(store, dropped(tmp_path, bytes(1001)))

    def test_one_tree_too_large(self, tmp_path: Path) -> None:
        source = confext(tmp_path / "web", "web", {"etc/a": bytes(600), "etc/b": bytes(600)})
        with (
            Store(str(tmp_path / "state"), 10_000, 1000, 2) as store,
            pytest.raises(Refused, match="too large"),
        ):
            add(store, source)

    def test_larger_than_the_whole_store(self, tmp_path: Path) -> None:
        with (
            Store(str(tmp_path / "state"), 1000, 10_000, 2) as store,
            pytest.raises(Refused, match="StoreMax="),
        ):
            add(store, dropped(tmp_path, bytes(1001)))

    def test_a_full_store_says_so_and_can_be_emptied(self, tmp_path: Path) -> None:
        with Store(str(tmp_path / "state"), 25_000, 25_000, 2) as store:
            first = add(store, dropped(tmp_path, bytes(1000)))
            add(store, confext(tmp_path / "web", "web", {"etc/a": bytes(900)}))
            text = r"the store is full: 24576 of 25000 bytes \(StoreMax=\) are in use, 4096 more are needed"
            with pytest.raises(StoreFull, match=text):
                add(store, dropped(tmp_path, bytes(999)))
            assert add(store, dropped(tmp_path, bytes(1000))) == first  # what is there needs no room
            with pytest.raises(StoreFull):
                add(store, confext(tmp_path / "other", "other", {"etc/a": bytes(900)}))
            add(store, tmp_path / "web")
            store.collect(())
            assert store.usage() == 0
            add(store, dropped(tmp_path, bytes(999)))

    def test_full_is_something_to_try_again(self) -> None:
        assert issubclass(StoreFull, Later)

    def test_room_is_set_aside_while_a_copy_is_made(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used = []
        sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", lambda fd: (used.append(store.usage()), sync(fd)))
        add(store, dropped(tmp_path, bytes(3000)))
        assert used == [4096]

    def test_two_at_once_do_not_take_the_same_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = [dropped(tmp_path, b"%d" % number * 800, f"{number}.raw") for number in range(2)]
        both = threading.Barrier(2)
        results: list[object] = []
        with Store(str(tmp_path / "state"), 5000, 5000, 2) as store:
            usage = store.usage

            def measured() -> int:
                used = usage()
                try:
                    both.wait(0.3)  # only without the lock do both come so far
                except threading.BrokenBarrierError:
                    pass
                return used

            def work(path: Path) -> None:
                try:
                    results.append(add(store, path).size)
                except StoreFull:
                    results.append("full")

            monkeypatch.setattr(store, "usage", measured)
            threads = [threading.Thread(target=work, args=(path,)) for path in paths]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(map(str, results)) == ["800", "full"]

    def test_room_found_by_another_process(self, store: Store, tmp_path: Path) -> None:
        add(store, dropped(tmp_path, bytes(3000)))
        source = confext(tmp_path / "web", "web", {"etc/a": bytes(900)})
        add(store, source)
        with Store(str(tmp_path / "state"), MIB, MIB, 2) as other:
            assert other.usage() == store.usage() == 4096 + BARE + 4096

    def test_other_limits_while_running(self, store: Store, tmp_path: Path) -> None:
        path = dropped(tmp_path, bytes(1000))
        store.configure(500, 500, 1)
        with pytest.raises(Refused):
            add(store, path)
        store.configure(5000, 5000, 1)
        add(store, path)


@root
@tool("unshare")
class TestNoSpace:
    """In a small tmpfs of a private mount namespace."""

    PROGRAM = """
import os, resource, subprocess, sys
sys.path[:0] = {path!r}
from pathlib import Path
import images.test_store as t
work = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", work], check=True)
store = t.Store(str(work / "state"), 1 << 40, 1 << 40, 2)
outside = Path(sys.argv[2])
def left(): return [name for name in os.listdir(work / "state/store") if name not in (".lock", ".names")]
{body}
"""

    def run(self, tmp_path: Path, body: str) -> None:
        (tmp_path / "small").mkdir()
        program = self.PROGRAM.format(path=sys.path, body=body)
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", program]
        done = subprocess.run(
            [*command, tmp_path / "small", tmp_path],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.stdout.decode() == "fine\n"

    def test_for_an_image(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            """
small = t.add(store, t.dropped(outside, os.urandom(1 << 20)))
try:
    t.add(store, t.dropped(outside, os.urandom(5 << 20)))
except t.StoreFull as error:
    assert "no room: No space left on device" in str(error), error
    assert left() == [small.digest]
    t.add(store, t.dropped(outside, os.urandom(1 << 20)))
    print("fine")
""",
        )

    def test_for_a_tree(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            """
source = t.confext(outside / "web", "web", {f"etc/{n}": os.urandom(100_000) for n in range(50)})
try:
    t.add(store, source)
except t.StoreFull as error:
    assert "No space left on device" in str(error), error
    assert left() == []
    print("fine")
""",
        )

    def test_is_no_matter_when_the_content_is_there(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            """
path = t.dropped(outside, os.urandom(1 << 20))
source = t.confext(outside / "web", "web", {"etc/web": os.urandom(500_000)})
copies = [t.add(store, path), t.add(store, source)]
(work / "filler").write_bytes(bytes(1 << 20))
assert [t.add(store, path), t.add(store, source)] == copies
print("fine")
""",
        )

    def test_for_the_record_of_a_stack(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            """
copy = t.add(store, t.dropped(outside, b"x"))
old = t.Stack((t.layer(copy),))
store.accept(t.UNIT, old, ())
with open(work / "filler", "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)): pass
    except OSError: pass
try:
    store.accept(t.UNIT, t.Stack((t.layer(copy, "other.raw"),)), ())
except t.StoreFull as error:
    assert "stack of web.service cannot be recorded" in str(error), error
    assert store.accepted(t.UNIT) == old
    os.unlink(work / "filler")
    store.accept(t.UNIT, t.Stack(), ())
    print("fine")
""",
        )


class TestStacks:
    def test_accepted_with_its_slots(self, store: Store, tmp_path: Path) -> None:
        copy = add(store, dropped(tmp_path, b"content"))
        wanted = Stack((layer(copy),))
        assert store.accepted(UNIT) is None
        assert store.accept(UNIT, wanted, ()).accepted.stack == wanted
        store.accept(UNIT, wanted, ())
        assert store.accepted(UNIT) == wanted
        assert store.stacks(UNIT) == (wanted,)
        assert os.listdir(tmp_path / "state/units") == [UNIT]
        assert (tmp_path / "state/units" / UNIT / "web.raw").read_bytes() == b"content"
        store.accept(UNIT, Stack(), ())
        assert store.without_layers() == (UNIT,)
        store.forget(UNIT)
        assert store.accepted(UNIT) is None

    def test_nothing_is_collected_while_a_stack_is_recorded(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = add(store, dropped(tmp_path, b"content"))
        accepting, tried = Stacks.accepting, []

        def interrupted(*arguments: Any) -> Gathering[State]:
            with pytest.raises(Busy):
                store.collect(())
            tried.append(arguments)
            return accepting(*arguments)

        monkeypatch.setattr(Stacks, "accepting", interrupted)
        store.accept(UNIT, Stack((layer(copy),)), ())
        assert tried

    def test_a_layer_without_a_copy_is_not_accepted(self, store: Store, tmp_path: Path) -> None:
        copy = add(store, dropped(tmp_path, b"content"))
        store.collect(())
        with pytest.raises(Later, match="web 1 is gone from the store"):
            store.accept(UNIT, Stack((layer(copy),)), ())
        assert store.accepted(UNIT) is None

    def test_the_copy_of_a_layer(self, store: Store, tmp_path: Path) -> None:
        image, source = add(store, dropped(tmp_path, b"x")), add(store, confext(tmp_path / "web", "web"))
        assert store.copy(layer(image)) == image
        with Store(str(tmp_path / "state"), MIB, MIB, 2) as other:
            assert other.copy(layer(source)) == source
            with pytest.raises(Later, match=r"web 1 .* is damaged"):
                other.copy(layer(image))  # "x" is no image: this store did not put it there
        store.collect(())
        with pytest.raises(Later, match=r"web 1 .* is gone"):
            store.copy(layer(image))


class TestCollect:
    def test_keeps_slots_history_and_what_is_mounted(self, store: Store, tmp_path: Path) -> None:
        copies = [add(store, dropped(tmp_path, b"%d" % number)) for number in range(6)]
        for copy in copies[:4]:
            store.accept(UNIT, Stack((layer(copy),)), ())
        store.accept("other.service", Stack((layer(copies[0]),)), ())
        removed = store.collect([copies[5].digest])
        assert set(removed) == {copies[1].digest, copies[4].digest}
        assert inside(tmp_path) == {copies[number].digest for number in (0, 2, 3, 5)}

    def test_removes_what_dead_processes_left(self, store: Store, tmp_path: Path) -> None:
        left = tmp_path / "state/store/.tmp-5-0123456789abcdef"
        left.write_bytes(b"half")
        confext(tmp_path / "state/store/.tmp-0-fedcba9876543210", "web")
        assert store.collect(()) == ()
        assert inside(tmp_path) == set()

    def test_leaves_alone_what_is_not_the_stores(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "state/store/README").touch()
        (tmp_path / "state/store/lost+found").mkdir()
        store.collect(())
        assert inside(tmp_path) == {"README", "lost+found"}
        assert store.usage() == 0

    def test_waits_for_nobody(self, store: Store, tmp_path: Path) -> None:
        copy = add(store, dropped(tmp_path, b"x"))
        with store.using(), store.using(), pytest.raises(Busy):
            store.collect(())
        assert store.verify(copy.digest)
        assert store.collect(()) == (copy.digest,)
        assert not store.verify(copy.digest)

    def test_not_while_another_process_uses_the_store(self, store: Store, tmp_path: Path) -> None:
        add(store, dropped(tmp_path, b"x"))
        command = program("images.test_store", "use", tmp_path / "state")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"using\n"
            with pytest.raises(Busy):
                store.collect(())
            other.kill()
        assert len(store.collect(())) == 1

    def test_one_that_never_comes_to_an_end_keeps_only_what_is_new(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What hangs (a drop directory on a dead file system) must not fill the store for all others."""
        old, slot = add(store, dropped(tmp_path, b"old")), add(store, dropped(tmp_path, b"slot"))
        store.accept(UNIT, Stack((layer(slot),)), ())
        with store.using():
            with pytest.raises(Busy):
                store.collect(())
            monkeypatch.setattr("watcher.images.store_names._LEFT_SEC", 0)
            assert store.collect(()) == (old.digest,)
        assert inside(tmp_path) == {slot.digest}
        lost = Stack((layer(old),))
        with pytest.raises(Later, match="is gone from the store"):
            store.accept(UNIT, lost, ())

    def test_what_the_dead_left_goes_beside_one_that_hangs(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "state/store/.tmp-5-0123456789abcdef").write_bytes(b"half")
        with store.using():
            assert store.collect(()) == ()
        assert inside(tmp_path) == set()

    @pytest.mark.parametrize("kind", Kind)
    def test_what_is_being_written_is_left_alone(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
    ) -> None:
        monkeypatch.setattr("watcher.images.store_names._LEFT_SEC", 0)
        sync = {Kind.IMAGE: "fdatasync", Kind.DIRECTORY: "fsync"}[kind]
        real = getattr(os, sync)
        seen = []

        def slow(fd: int) -> None:
            monkeypatch.setattr(os, sync, real)
            with store.using(), contextlib.suppress(Busy):
                store.collect(())
            seen.append([name for name in inside(tmp_path) if name.startswith(".tmp")])
            real(fd)

        monkeypatch.setattr(os, sync, slow)
        image = kind is Kind.IMAGE
        copy = add(store, dropped(tmp_path, b"x") if image else confext(tmp_path / "web", "web"))
        assert len(seen) == 1 and len(seen[0]) == 1
        intact(tmp_path / "state/store")
        assert inside(tmp_path) == {copy.digest}

    def test_content_used_again_after_it_was_collected(self, store: Store, tmp_path: Path) -> None:
        path = dropped(tmp_path, b"x")
        copy = add(store, path)
        store.collect(())
        assert add(store, path) == copy
        assert store.verify(copy.digest)


def use(state: str) -> None:
    with Store(state, MIB, MIB, 2) as store, store.using():
        print("using", flush=True)
        signal.pause()


def add_accept_and_collect(state: Path, image: Path, directory: Path) -> None:
    """All that a store does to the disk, in one thread."""
    durable._THREADS = 0
    state.mkdir()
    with Store(str(state), 1 << 40, 1 << 40, 2) as store:
        with store.using():
            copies = [add(store, image), add(store, directory)]
            for layers in (copies, copies[:1]):
                stack = Stack(tuple(layer(copy, str(number)) for number, copy in enumerate(layers)))
                store.accept(UNIT, stack, ())
        store.keep_stacks = 1
        store.collect(())


@root
@pytest.mark.limit(600)
def test_killed_before_any_call_the_store_is_whole_and_cleans_up(tmp_path: Path) -> None:
    """`kill -9` before each system call in turn: what has a digest for its name is what the digest says."""
    image = dropped(tmp_path, os.urandom(MIB + 5))
    source = confext(tmp_path / "web", "web", {"etc/a": b"1"})
    (source / "etc/link").symlink_to("a")
    (source / "etc/twin").hardlink_to(source / "etc/a")
    state = tmp_path / "state"
    stacks = []
    for number in itertools.count(1):
        shutil.rmtree(state, ignore_errors=True)
        killed = killed_before(number, lambda: add_accept_and_collect(state, image, source))
        if not killed:
            break
        if not state.exists():
            continue
        with Store(str(state), MIB * 9, MIB * 9, 2) as store:
            stacks.append(store.accepted(UNIT))
            intact(state / "store", stacks[-1])
            store.collect(())
            intact(state / "store", stacks[-1])
            assert not [name for name in inside(tmp_path) if name.startswith(".tmp")], number
            kept = state / "stacks" / UNIT
            assert not kept.exists() or not [name for name in os.listdir(kept) if name.startswith(".")]
    assert len(stacks) > 100
    seen = [None if stack is None else len(stack.layers) for stack in stacks]
    assert [count for count, _ in itertools.groupby(seen)] == [None, 2, 1]  # in this order, and nothing else


def intact(directory: Path, stack: Stack | None = None) -> None:
    """Whatever has a digest for its name is what the digest says, and what the stack needs is among it."""
    digests = {path.name for path in directory.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)}
    assert stack is None or digests >= set(stack.digests)
    for path in (directory / digest for digest in digests):
        if path.is_dir():
            with opened(path) as fd:
                assert tree.digest(fd) == path.name
        else:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def churn(state: str, work: str, seed: str) -> None:
    """Adds, accepts, and collects for as long as it takes; a copy must never vanish from under an accepted stack."""
    path = Path(work) / f"{seed}.raw"
    with Store(state, 64 * MIB, MIB, 1) as store:
        for number in range(60):
            path.write_bytes(b"%d" % (number % 7) * 1000)
            with store.using():
                copy = add(store, path)
                wanted = Stack((layer(copy),))
                store.accept(f"{seed}.service", wanted, ())
            assert Path(state, f"units/{seed}.service/web.raw").read_bytes() == path.read_bytes()
            try:
                store.collect(())
            except Busy:
                pass


def test_processes_that_add_and_collect_at_once_never_lose_a_copy(store: Store, tmp_path: Path) -> None:
    commands = [
        program("images.test_store", "churn", tmp_path / "state", tmp_path, seed) for seed in range(3)
    ]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0, 0, 0]
    intact(tmp_path / "state/store")


def test_threads_that_add_the_same_at_once(store: Store, tmp_path: Path) -> None:
    path = dropped(tmp_path, os.urandom(3 * MIB))
    source = confext(tmp_path / "web", "web", {"etc/a": os.urandom(MIB)})
    found: list[Copy] = []
    threads = [
        threading.Thread(target=lambda what=what: found.append(add(store, what)))
        for what in (path, source) * 6
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert inside(tmp_path) == {copy.digest for copy in found}
    assert len(inside(tmp_path)) == 2


def test_no_space_at_the_very_end_is_said_as_such(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where space is only found when the data goes to the disk (NFS, quotas), the lease has been given back by then."""

    def full(fd: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(StoreFull, match="Disk quota exceeded"):
        add(store, dropped(tmp_path, b"x"))
    assert inside(tmp_path) == set()


def test_no_memory_for_a_copy(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("watcher.images.store.copy_file", no_memory)
    with pytest.raises(StoreFull, match="no memory"):
        add(store, dropped(tmp_path, b"x"))
    assert inside(tmp_path) == set()


def test_an_error_of_the_disk_is_no_verdict(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(Later, match="Input/output error"):
        add(store, dropped(tmp_path, b"x"))
    assert inside(tmp_path) == set()
