# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies are what their names say, or they are not used."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from images.test_store import MIB, add, dropped

from support.images import confext
from support.killing import killed_before
from support.needs import root
from watcher.images.store import Store
from watcher.model import Kind, Later, Layer, Stack
from watcher.mounts import syscalls
from watcher.records import durable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


@pytest.fixture
def later(tmp_path: Path, store: Store) -> Iterator[Store]:
    """The same store for another process, which knows nothing yet."""
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"damaged")


def names(tmp_path: Path) -> list[str]:
    return sorted(name for name in os.listdir(tmp_path / "state/store") if name not in (".lock", ".names"))


def test_whole_copies_are_left_alone(store: Store, later: Store, tmp_path: Path) -> None:
    image = add(store, dropped(tmp_path, b"content"))
    tree = add(store, confext(tmp_path / "web", "web", {"etc/web.conf": b"x"}))
    before = names(tmp_path)
    for one in (store, later):
        assert one.verify(image.digest) and one.verify(tree.digest)
    assert names(tmp_path) == before


@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_copy_is_not_used_and_can_be_made_anew(
    store: Store, later: Store, tmp_path: Path, known: bool
) -> None:
    path = dropped(tmp_path, b"the content")
    copy = add(store, path)
    damage(Path(copy.path))
    using = store if known else later
    assert not using.verify(copy.digest)
    assert not using.is_whole(Stack((Layer("web.raw", "web", "1", copy.digest, Kind.IMAGE, ""),)))
    assert Path(copy.path).exists()  # a slot leads to it: else a start would lack a layer
    assert add(using, path) == copy
    assert using.verify(copy.digest) and Path(copy.path).read_bytes() == b"the content"


@pytest.mark.parametrize("kind", [Kind.IMAGE, Kind.DIRECTORY])
def test_its_name_is_never_missing_while_it_is_made_anew(
    store: Store, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_image = kind is Kind.IMAGE
    source = (
        dropped(tmp_path, b"the content")
        if is_image
        else confext(tmp_path / "web", "web", {"etc/web.conf": b"x"})
    )
    copy = add(store, source)
    inode = os.stat(copy.path).st_ino
    damage(Path(copy.path) if is_image else Path(copy.path, "etc/web.conf"))
    store.whole.doubt([copy.digest])
    seen: list[bool] = []
    rename = os.rename

    def watched(*args: object, **kwargs: object) -> None:
        rename(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(os.path.exists(copy.path))

    monkeypatch.setattr(os, "rename", watched)
    add(store, source)
    monkeypatch.undo()
    assert all(seen) and os.stat(copy.path).st_ino != inode
    (away,) = (name for name in names(tmp_path) if name != copy.digest)
    assert copy.digest in away and os.stat(tmp_path / "state/store" / away).st_ino == inode


@pytest.mark.parametrize("kind", [Kind.IMAGE, Kind.DIRECTORY])
def test_it_is_made_anew_where_names_cannot_be_exchanged(
    store: Store, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_image = kind is Kind.IMAGE
    source = (
        dropped(tmp_path, b"the content")
        if is_image
        else confext(tmp_path / "web", "web", {"etc/web.conf": b"x"})
    )
    copy = add(store, source)
    damage(Path(copy.path) if is_image else Path(copy.path, "etc/web.conf"))
    store.whole.doubt([copy.digest])

    def refused(one: str, other: str, dirfd: int) -> None:
        raise OSError(errno.EINVAL, "", other)

    monkeypatch.setattr(syscalls, "rename_exchange", refused)
    add(store, source)
    assert store.verify(copy.digest)
    (away,) = (name for name in names(tmp_path) if name != copy.digest)
    assert copy.digest in away


def test_a_copy_that_is_added_again_is_read(store: Store, later: Store, tmp_path: Path) -> None:
    """By another process, that is: its own knows what it has written, as long as `stat` says the same."""
    path = dropped(tmp_path, b"the content")
    copy = add(store, path)
    damage(Path(copy.path))
    add(later, path)
    assert Path(copy.path).read_bytes() == b"the content"


@pytest.mark.parametrize("left", range(1, 4))
@pytest.mark.parametrize("from_disk", [False, True], ids=["looked at", "scrubbed"])
def test_a_copy_is_not_damaged_because_no_descriptor_is_left(
    store: Store, tmp_path: Path, left: int, from_disk: bool
) -> None:
    copy = add(store, confext(tmp_path / "web", "web", {"etc/a/a.conf": b"x", "etc/b.conf": b"x"}))
    store.whole.doubt([copy.digest])
    with few_descriptors(left), pytest.raises((OSError, Later)) as raised:
        if from_disk:
            store.whole.scrub(copy.digest, lambda: None)
        else:
            store.verify(copy.digest)
    assert "open files" in str(raised.value)
    assert not store.whole.damaged
    assert store.verify(copy.digest)


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """So many are left."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[0]), before[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_missing_copy_is_not_whole(store: Store, tmp_path: Path) -> None:
    copy = add(store, dropped(tmp_path, b"content"))
    os.unlink(copy.path)
    assert not store.verify(copy.digest)


def test_a_damaged_tree_stays_while_something_is_mounted_from_it(
    store: Store, later: Store, tmp_path: Path
) -> None:
    source = confext(tmp_path / "web", "web", {"etc/web.conf": b"x"})
    copy = add(store, source)
    Path(copy.path, "etc/web.conf").unlink()
    assert not later.verify(copy.digest)
    add(later, source)
    assert len(names(tmp_path)) == 2
    store.collect([copy.digest])  # it does not know yet that a service may show the damaged one
    assert store.whole.replaced_since([copy.digest], 0)
    later.collect([copy.digest], worn=[copy.digest])
    assert len(names(tmp_path)) == 2
    later.collect([copy.digest])
    assert names(tmp_path) == [copy.digest]
    later.collect([])
    assert names(tmp_path) == []


def test_many_who_ask_at_once_get_the_same_answer(later: Store, store: Store, tmp_path: Path) -> None:
    copy = add(store, dropped(tmp_path, os.urandom(MIB)))
    damage(Path(copy.path))
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(later.verify(copy.digest))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [False] * 8
    assert names(tmp_path) == [copy.digest]
    shutil.rmtree(tmp_path / "state")


def make_anew(state: Path, source: Path) -> None:
    with Store(str(state), 64 * MIB, 32 * MIB, 2) as store, store.using():
        add(store, source)


def make_anew_in_one_thread(state: Path, source: Path) -> None:
    durable._THREADS = 0
    make_anew(state, source)


@root
@pytest.mark.parametrize("kind", [Kind.IMAGE, Kind.DIRECTORY])
def test_a_kill_at_any_step_leaves_a_copy_by_that_name_and_the_next_process_mends_it(
    tmp_path: Path, kind: Kind
) -> None:
    is_image, store = kind is Kind.IMAGE, tmp_path / "state/store"
    source = (
        dropped(tmp_path, b"the content")
        if is_image
        else confext(tmp_path / "web", "web", {"etc/web.conf": b"x"})
    )
    make_anew(tmp_path / "state", source)
    (digest,) = names(tmp_path)
    number, killed = 1, True
    while killed:
        damage(store / digest if is_image else store / digest / "etc/web.conf")
        killed = killed_before(number, lambda: make_anew_in_one_thread(tmp_path / "state", source))
        assert digest in names(tmp_path)
        make_anew(tmp_path / "state", source)
        with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as later:
            assert later.verify(digest)
            later.collect([digest])
            later.collect([digest])
        assert names(tmp_path) == [digest]
        number += 1
    assert number > 10
