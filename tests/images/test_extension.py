# SPDX-License-Identifier: LGPL-2.1-or-later
"""Release files are read from trees that may be hostile: bounded, and without following a single link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.images import confext
from watcher.images.extension import read_release
from watcher.model import Refused

HERE = "etc/extension-release.d"


def read(root: Path, flags: int = os.O_PATH) -> tuple[dict[str, str], set[str]]:
    fd = os.open(root, flags | os.O_DIRECTORY)
    try:
        return read_release(fd)
    finally:
        os.close(fd)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return confext(tmp_path / "tree", "web", release="ID=debian\nVERSION_ID=13\n")


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_RDONLY])
def test_the_text_of_each_release_file_by_name(tree: Path, flags: int) -> None:
    (tree / HERE / "extension-release.other").write_bytes(b"ID=\xff\n")
    (tree / HERE / "README").write_text("not one")
    assert read(tree, flags) == (
        {"extension-release.other": "ID=\udcff\n", "extension-release.web": "ID=debian\nVERSION_ID=13\n"},
        set(),
    )


@pytest.mark.parametrize(
    ("value", "relaxed"), [("0", True), ("no", True), ("False", True), ("1", False), ("", False)]
)
def test_strict_false_is_noticed(tree: Path, value: str, relaxed: bool) -> None:
    os.setxattr(tree / HERE / "extension-release.web", "user.extension-release.strict", value.encode())
    assert read(tree)[1] == ({"extension-release.web"} if relaxed else set())


def test_an_empty_directory_has_none(tmp_path: Path) -> None:
    (tmp_path / HERE).mkdir(parents=True)
    assert read(tmp_path) == ({}, set())


@pytest.mark.parametrize("there", ["", "etc", "usr/lib/os-release.d"])
def test_what_is_no_confext(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    with pytest.raises(Refused, match=r"^not a confext: there is no etc/extension-release.d/"):
        read(tmp_path)


def test_a_sysext_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/extension-release.d").mkdir(parents=True)
    with pytest.raises(Refused, match="not a confext but a sysext"):
        read(tmp_path)


def test_a_sysext_that_is_also_a_confext_is_a_confext(tree: Path) -> None:
    (tree / "usr/lib/extension-release.d").mkdir(parents=True)
    assert "extension-release.web" in read(tree)[0]


@pytest.mark.parametrize("place", ["etc", HERE])
def test_a_link_on_the_way_is_not_followed(tree: Path, place: str) -> None:
    (tree / place).rename(tree / "elsewhere")
    (tree / place).symlink_to(tree / "elsewhere")
    with pytest.raises(Refused, match=f"{os.path.basename(place)} in it is a link"):
        read(tree)


@pytest.mark.parametrize("place", ["etc", HERE])
def test_a_file_on_the_way(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    with pytest.raises(Refused, match="is no directory"):
        read(tmp_path)


def test_names_are_not_read_without_end(tree: Path) -> None:
    """However many there are that are no release files."""
    directory = tree / HERE
    for number in range(1024):
        (directory / str(number)).touch()
    with pytest.raises(Refused, match=r"^it has more than 1024 entries in etc/extension-release.d/$"):
        read(tree)


def test_a_link_to_a_secret_is_not_read(tree: Path) -> None:
    (tree / HERE / "extension-release.other").symlink_to("/etc/shadow")
    with pytest.raises(Refused, match=r"extension-release.other in it is a link"):
        read(tree)


def test_a_fifo_does_not_hang(tree: Path) -> None:
    os.mkfifo(tree / HERE / "extension-release.other")
    with pytest.raises(Refused, match="no regular file"):
        read(tree)


def test_too_large(tree: Path) -> None:
    release = tree / HERE / "extension-release.web"
    release.write_bytes(b"#" * 65536)
    assert len(read(tree)[0][release.name]) == 65536
    release.write_bytes(b"#" * 65537)
    with pytest.raises(Refused, match="65537 bytes, 65536 is the limit"):
        read(tree)


def test_too_many(tree: Path) -> None:
    for number in range(64):
        (tree / HERE / f"extension-release.{number}").touch()
    with pytest.raises(Refused, match="more than 64 extension-release files"):
        read(tree)


def test_names_are_shown_on_one_line(tree: Path) -> None:
    (tree / HERE / "extension-release.a\nb").symlink_to("x")
    with pytest.raises(Refused) as refused:
        read(tree)
    assert str(refused.value).isprintable()
