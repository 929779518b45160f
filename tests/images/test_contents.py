# SPDX-License-Identifier: LGPL-2.1-or-later
"""What files have in them (images/contents.py), and whether two are the same (images/changes.py): whatever they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.needs import root
from watcher.images import changes as module
from watcher.images import contents
from watcher.images.changes import Change, Comparison, Side, changes
from watcher.images.contents import TEXT_MAX, Reader, xattrs
from watcher.images.layers import Layers
from watcher.model import Busy
from watcher.mounts.descriptors import Descriptors

SPARSE = 10 << 30


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "sparse": sparse,
    "link": lambda path: path.symlink_to(path.name),
    "binary": lambda path: path.write_bytes(b"\0\x1b[31m"),
    "large": lambda path: path.write_bytes(b"x" * (TEXT_MAX + 1)),
    "text": lambda path: path.write_bytes(b"\xff\n\x1b[m"),
    "a\n\x1b[31m\udcff": lambda path: path.write_text("name"),
}


def both(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    return tmp_path / "0", tmp_path / "1"


def looked(fds: Descriptors, *places: Path) -> Layers:
    return Layers([fds.add(os.open(place, os.O_PATH)) for place in places])


def test_nothing_is_waited_for_and_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    upper, lower = both(tmp_path)
    for name, make in HOSTILE.items():
        make(upper / name)
        make(lower / name)
    reader, comparison = Reader(), Comparison()
    found, same = {}, {}
    with Descriptors() as fds:
        for change in changes(looked(fds, upper, lower), [1], [0, 1]):
            if change.path:
                assert change.after is not None and xattrs(change.after, change.path) == {}
                same[change.path[0]] = comparison.same(change)
                found[change.path[0]] = reader.read(change.after, change.path)
    assert found["text"].text == b"\xff\n\x1b[m"
    assert found["binary"].text is None and len(found["binary"].sha256) == 64
    assert found["large"].text is None and len(found["large"].sha256) == 64
    assert found["sparse"].sha256 == "" and found["fifo"].sha256 == ""
    assert found["link"].target == "link"
    # What could not be compared counts as different.
    assert {name for name in same if not same[name]} == {"sparse"}


@root
def test_devices_are_not_opened(tmp_path: Path) -> None:
    upper, lower = both(tmp_path)
    for place, number in ((upper, 3), (lower, 5)):
        os.mknod(place / "device", 0o020644, os.makedev(1, number))
    with Descriptors() as fds:
        _, change = changes(looked(fds, upper, lower), [1], [0, 1])
        assert not Comparison().same(change)
        assert change.before is not None and Reader().read(change.before, change.path).sha256 == ""


def changed(tmp_path: Path, fds: Descriptors) -> tuple[Path, Change]:
    upper, lower = both(tmp_path)
    (upper / "file").write_text("one")
    (lower / "file").write_text("two")
    _, change = changes(looked(fds, upper, lower), [1], [0, 1])
    return upper / "file", change


@pytest.mark.parametrize(
    "instead", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/etc/passwd"), lambda path: None]
)
def test_what_is_another_thing_by_now_is_not_read(tmp_path: Path, instead: Callable[[Path], object]) -> None:
    with Descriptors() as fds:
        upper, lower = both(tmp_path)
        (upper / "file").write_text("one")
        (lower / "file").write_text("two")
        walk = changes(looked(fds, upper, lower), [1], [0, 1])
        next(walk)
        change = next(walk)
        (upper / "file").unlink()
        instead(upper / "file")
        assert change.after is not None
        for ask in (lambda: Reader().read(change.after, change.path), lambda: Comparison().same(change)):
            with pytest.raises(Busy, match="/etc/file changed while it was looked at"):
                ask()
        walk.close()


def test_a_file_that_grows_is_read_as_far_as_it_was(tmp_path: Path) -> None:
    upper, lower = both(tmp_path)
    (upper / "file").write_text("one")
    with Descriptors() as fds:
        walk = changes(looked(fds, upper, lower), [1], [0, 1])
        next(walk)
        change = next(walk)
        with (upper / "file").open("a") as file:
            file.write("more" * 1_000_000)
        assert change.after is not None
        assert Reader().read(change.after, change.path).text == b"one"
        walk.close()


def test_a_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    upper, lower = both(tmp_path)
    (upper / "a/b").mkdir(parents=True)
    with Descriptors() as fds:
        walk = changes(looked(fds, upper, lower), [1], [0, 1])
        next(walk)
        next(walk)
        (upper / "a/b").rmdir()
        (upper / "a").rmdir()
        with pytest.raises(Busy, match="/etc/a changed while it was looked at: try again"):
            next(walk)


def test_attributes_are_those_that_the_author_gave(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.setxattr(path, "user.x", b"1")
    os.setxattr(path, contents.STRICT_XATTR, b"0")
    os.setxattr(path, contents.KEPT_STRICT_XATTR, b"")
    with Descriptors() as fds:
        place = fds.add(os.open(tmp_path, os.O_PATH))
        node = Layers([place]).look_up(0, place, "file")
        assert node is not None
        assert xattrs(Side(node, place), ("file",)) == {"user.x": b"1"}
    assert module.BYTES_MAX < SPARSE


@root
@pytest.mark.parametrize("what", ["mode", "owner", "another", "directory"])
def test_what_may_be_read_by_others_meanwhile_is_not_read(tmp_path: Path, what: str) -> None:
    """A look waits for its client, for as long as that likes; whose file it is was looked at before."""
    upper, lower = both(tmp_path)
    for place in (upper, lower):
        (place / "a").mkdir()
        (place / "a" / "b").mkdir()
        (place / "a" / "file").write_text("for all")
    changed = {
        "mode": lambda: (lower / "a" / "file").chmod(0o600),
        "owner": lambda: os.chown(lower / "a" / "file", 0, 1),
        "another": lambda: (lower / "new").rename(lower / "a" / "file"),
        "directory": lambda: (lower / "a" / "b").chmod(0o700),
    }
    (lower / "new").write_text("secret!")
    with Descriptors() as fds, pytest.raises(Busy, match="changed"):
        for change in changes(looked(fds, upper, lower), [1], [0]):
            if change.path == ("a", "b"):  # the directory above it has been read by now
                changed[what]()
            if change.path == ("a", "file"):
                assert change.before is not None
                Reader().read(change.before, change.path)
