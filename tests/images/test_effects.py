# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an extension hides, removes or closes is told, and nothing else."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.needs import root
from watcher.images import effects as module
from watcher.images.effects import effects
from watcher.mounts.process import may_mount

of_the_machine = pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
WHITEOUT = ("etc/hostname", "whiteout", b"")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    made = tmp_path / "host"
    for name in ("etc/ssl/private", "etc/web.d"):
        (made / name).mkdir(parents=True)
    for path in (made, *made.rglob("*")):
        path.chmod(0o755)
    (made / "etc/ssl/private").chmod(0o700)
    (made / "etc/hostname").write_text("host\n")
    (made / "etc/os-release").symlink_to("../usr/lib/os-release")
    return made


def told(host: Path, tree: Path) -> tuple[str, ...]:
    fd = os.open(tree, os.O_RDONLY)
    try:
        return effects(fd, str(host))
    finally:
        os.close(fd)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "web"
    for name in ("etc/ssl", "etc/web.d", "etc/new/deep"):
        (made / name).mkdir(parents=True)
    for path in made.rglob("*"):
        path.chmod(0o755)
    (made / "etc/hostname").write_text("other\n")
    (made / "etc/new").chmod(0o700)
    return made


def test_files_and_new_directories_are_what_it_is_for(host: Path, tree: Path) -> None:
    assert told(host, tree) == ()


def replaced(path: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(tree: Path) -> None:
        at = tree / path
        if at.is_dir():
            at.rmdir()
        elif at.exists():
            at.unlink()
        make(at)

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tree: (tree / "etc").chmod(0o700), "makes etc/ 0700 of {me}, and the host's is 0755 of {me}"),
        (
            lambda tree: (tree / "etc/ssl").chmod(0o750),
            "makes etc/ssl/ 0750 of {me}, and the host's is 0755 of",
        ),
        (
            replaced("etc/os-release", os.mkdir),
            "hides the host's etc/os-release, which is a link, with a directory",
        ),
        (
            replaced("etc/hostname", os.mkdir),
            "hides the host's etc/hostname, which is a file, with a directory",
        ),
        (
            replaced("etc/ssl", Path.touch),
            "hides the host's etc/ssl, which is a directory, with what is no dir",
        ),
    ],
)
def test_it_is_told(host: Path, tree: Path, change: Callable[[Path], object], line: str) -> None:
    change(tree)
    (said,) = told(host, tree)
    assert said.startswith(line.format(me=f"{os.getuid()}:{os.getgid()}"))


@root
def test_a_whiteout(host: Path, tree: Path) -> None:
    for name in ("etc/hostname", "etc/nothing"):
        (tree / name).unlink(missing_ok=True)
        os.mknod(tree / name, stat.S_IFCHR, os.makedev(0, 0))
    assert told(host, tree) == ("removes the host's etc/hostname (a whiteout)",)


Marks = list[tuple[str, str, bytes]]
"""Path, the end of the attribute's name, value."""


@root
@of_the_machine
@pytest.mark.parametrize(
    ("marks", "lines"),
    [
        ([("etc/ssl", "opaque", b"y")], ("hides all that the host has in etc/ssl/ (an opaque directory)",)),
        ([("etc", "opaque", b"y")], ()),
        ([("etc/ssl", "opaque", b"x")], ()),
        ([("etc/ssl", "opaque", b"yes")], ()),
        ([("etc/ssl", "opaque", b"n")], ()),
        ([("etc", "opaque", b"x"), WHITEOUT], ("removes the host's etc/hostname (a whiteout)",)),
        ([WHITEOUT], ("removes the host's etc/hostname (a whiteout)",)),
        ([("etc/web.d", "whiteout", b"")], ()),
    ],
    ids=str,
)
def test_what_overlayfs_hides_is_told_and_nothing_else(
    host: Path, tree: Path, tmp_path: Path, marks: Marks, lines: tuple[str, ...]
) -> None:
    (host / "etc/ssl/openssl.cnf").touch()
    (tree / "etc/hostname").write_text("")
    for path, mark, value in marks:
        os.setxattr(tree / path, f"trusted.overlay.{mark}", value)
    assert told(host, tree) == lines
    with mounted(tree / "etc", host / "etc", tmp_path / "seen") as seen:
        hidden = {name for name in ("hostname", "ssl/openssl.cnf") if not (seen / name).exists()}
    assert bool(hidden) == bool(lines)
    assert all(any(f"etc/{name.split('/')[0]}" in line for line in lines) for name in hidden)


@contextlib.contextmanager
def mounted(upper: Path, lower: Path, place: Path) -> Iterator[Path]:
    """What overlayfs itself makes of a layer on the host's `/etc`."""
    place.mkdir()
    options = f"ro,lowerdir={upper}:{lower}"
    subprocess.run(["mount", "-t", "overlay", "overlay", place, "-o", options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_of_many_the_first_are_told(host: Path, tree: Path) -> None:
    for number in range(20):
        (host / f"etc/{number}").mkdir()
        (tree / f"etc/{number}").touch()
    lines = told(host, tree)
    assert len(lines) == module._TOLD_MAX + 1
    assert lines[-1] == f"and does as much to {20 - module._TOLD_MAX} more"


def test_what_cannot_be_compared_is_not_told(tree: Path, tmp_path: Path) -> None:
    assert told(tmp_path / "nowhere", tree) == ()
