# SPDX-License-Identifier: LGPL-2.1-or-later
"""Extended attributes by which overlayfs shows something else are found, wherever they are in a tree or an image."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.images import confext
from support.needs import root
from watcher import model
from watcher.images import tree, walk
from watcher.images.readable import require_readable
from watcher.model import Refused
from watcher.mounts.process import may_mount

MARKS = (
    "redirect",
    "metacopy",
    "origin",
    "impure",
    "nlink",
    "upper",
    "uuid",
    "verity",
    "protattr",
    "what comes next",
)
of_the_machine = pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
SPACES = [pytest.param("trusted", marks=[root, of_the_machine]), "user"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files = {"etc/web.conf": b"1", "etc/web.d/sp ecial\n/more.conf": b"2"}
    return confext(tmp_path / "web", "web", files)


def image_walk(source: Path) -> None:
    """As for the root of a mounted image."""
    fd = os.open(source, os.O_RDONLY)
    try:
        require_readable(fd, 1 << 30)
    finally:
        os.close(fd)


def tree_walk(source: Path) -> None:
    fd = os.open(source, os.O_RDONLY)
    try:
        tree.digest(fd)
    finally:
        os.close(fd)


both = pytest.mark.parametrize("walk", [image_walk, tree_walk])
Walk = Callable[[Path], None]


@both
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_refused_with_its_name_and_place(source: Path, walk: Walk, space: str, mark: str) -> None:
    place = source / "etc/web.d/sp ecial\n/more.conf"
    os.setxattr(place, f"{space}.overlay.{mark}", b"/app")
    named = rf"etc/web.d/sp ecial\n/more.conf in it has the extended attribute {space}.overlay.{mark}, "
    with pytest.raises(Refused, match=f"^{re.escape(named)}[^\n]*$"):
        walk(source)


@both
@pytest.mark.parametrize("place", ["etc", "etc/web.d", "etc/web.conf"])
def test_wherever_it_is(source: Path, walk: Walk, place: str) -> None:
    os.setxattr(source / place, "user.overlay.redirect", b"/app")
    with pytest.raises(Refused, match=f"^{place} in it has the extended attribute user.overlay.redirect, "):
        walk(source)


@root
@of_the_machine
@both
def test_also_on_a_link(source: Path, walk: Walk) -> None:
    (source / "etc/link").symlink_to("/nowhere")
    os.setxattr(source / "etc/link", "trusted.overlay.origin", b"x", follow_symlinks=False)
    with pytest.raises(Refused, match=r"^etc/link in it has the extended attribute trusted.overlay.origin, "):
        walk(source)


@root
@of_the_machine
@both
def test_what_only_hides_may_stay(source: Path, walk: Walk) -> None:
    os.setxattr(source / "etc/web.d", "trusted.overlay.opaque", b"x")
    os.setxattr(source / "etc/web.conf", "trusted.overlay.whiteout", b"")
    os.setxattr(source / "etc/web.conf", "user.note", b"mine")
    walk(source)


@both
@pytest.mark.parametrize("mark", ["opaque", "whiteout"])
def test_but_not_where_it_hides_for_some_only(source: Path, walk: Walk, mark: str) -> None:
    """systemd, and we as root, mount a stack where this is an attribute like any other."""
    os.setxattr(source / "etc/web.d", f"user.overlay.{mark}", b"y")
    why = f"hides something in a user namespace alone: remove it, or have root set trusted.overlay.{mark}"
    with pytest.raises(Refused, match=f"^etc/web.d in it has .* user.overlay.{mark}, which {why}$"):
        walk(source)


def test_links_are_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.setxattr(tmp_path / "outside", "user.overlay.redirect", b"/app")
    (source / "etc/link").symlink_to(tmp_path / "outside")
    image_walk(source)


def test_an_image_that_is_nested_too_deeply(source: Path) -> None:
    directory = os.open(source / "etc/web.d", os.O_RDONLY)
    try:
        for depth in range(3, 200):
            if depth == model.DEPTH_MAX:
                image_walk(source)
            os.mkdir("d", dir_fd=directory)
            parent, directory = directory, os.open("d", os.O_RDONLY, dir_fd=directory)
            os.close(parent)
        with pytest.raises(Refused, match=f"^etc/web.d/d.* is nested too deeply: {model.DEPTH_MAX} levels"):
            image_walk(source)
    finally:
        os.close(directory)
        subprocess.run(["rm", "-r", source / "etc/web.d"], check=True)


def test_an_image_with_too_much_in_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(walk, "ENTRIES_MAX", 6)
    image_walk(source)
    (source / "etc/one.more").touch()
    with pytest.raises(Refused, match=r"^more than 6 entries in it$"):
        image_walk(source)
    assert len(os.listdir("/proc/self/fd")) == before
