# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first image has in it what the host has, as the kernel shows it, and is not begun where there is no room."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import digest
from support.needs import filesystem, loop, root, tool
from watcher.records.schema import Failed
from watcher.setup import first_image, first_version
from watcher.setup.first_version import Taken


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host's root with a service's files in its /etc. Nothing is left in the directory for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    temporary(monkeypatch, scratch)
    (tmp_path / "host/etc/web/conf.d").mkdir(parents=True)
    (tmp_path / "host/etc/web/web.conf").write_text("port = 80\n")
    (tmp_path / "host/etc/web/web.conf").chmod(0o644)
    (tmp_path / "host/etc/web/key").write_text("key")
    (tmp_path / "host/etc/web/key").chmod(0o640)
    (tmp_path / "host/etc/web/conf.d/on").symlink_to("../web.conf")
    yield tmp_path / "host"
    assert list(scratch.iterdir()) == []


def temporary(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)


def build(host: Path, name: str = "web_0.raw") -> Path:
    path = host.parent / name
    first_image.build(["/etc/web"], lambda path: False, "web", str(path), 1 << 20, str(host))
    return path


def shown(image: Path, *command: str) -> list[str]:
    """What a command prints of /etc in the image, and of the same on the host."""
    mounted = image.parent / "mounted"
    mounted.mkdir(exist_ok=True)
    paths = ["etc", "etc/web", "etc/web/web.conf", "etc/web/key", "etc/web/conf.d", "etc/web/conf.d/on"]
    subprocess.run(["mount", "-o", "ro,loop", image, mounted], check=True)
    try:
        return [
            subprocess.run([*command, *paths], cwd=top, check=True, capture_output=True, text=True).stdout
            for top in (mounted, image.parent / "host")
        ]
    finally:
        subprocess.run(["umount", mounted], check=True)


@root
@loop
@tool("mksquashfs")
@tool("getfattr")
def test_modes_owners_and_attributes_are_in_it(host: Path) -> None:
    os.chown(host / "etc/web/key", 1234, 4321)
    os.setxattr(host / "etc/web/web.conf", "user.origin", b"\0 from")
    os.setxattr(host / "etc/web", "security.confext", b"label")
    os.setxattr(host / "etc/web/conf.d/on", "security.confext", b"link", follow_symlinks=False)
    image = build(host)
    assert image.stat().st_mode & 0o777 == 0o600
    there, here = shown(image, "getfattr", "--no-dereference", "--dump", "--match=-")
    assert there == here and here.count("=") == 3
    there, here = shown(image, "stat", "--format=%n %A %u %g")
    assert there == here and "etc/web/key -rw-r----- 1234 4321" in here


@root
@loop
@filesystem("erofs")
@tool("mkfs.erofs")
@tool("setfacl")
@tool("getfattr")
def test_access_control_lists_are_in_it(host: Path) -> None:
    subprocess.run(["setfacl", "--modify=user:1234:r,group::-", host / "etc/web/key"], check=True)
    subprocess.run(["setfacl", "--modify=default:user:1234:r", host / "etc/web/conf.d"], check=True)
    os.setxattr(host / "etc/web/web.conf", "user.origin", b"x")
    image = build(host)
    there, here = shown(image, "getfacl", "--numeric")
    assert there == here and here.count("user:1234:r--") == 2
    there, here = shown(image, "getfattr", "--no-dereference", "--dump", "--match=-")
    assert there == here and "user.origin" in here
    there, here = shown(image, "stat", "--format=%n %A %u %g")
    assert there == here


@root
@tool("setfacl")
def test_without_the_tool_a_list_is_not_left_out(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["setfacl", "--modify=user:1234:r", host / "etc/web/key"], check=True)
    monkeypatch.setattr("shutil.which", lambda program, path: None)
    with pytest.raises(
        Failed, match=r"^/etc/web/key has an access .* list: mkfs.erofs .*: apt install erofs-utils$"
    ):
        build(host)


@root
@tool("mksquashfs")
@pytest.mark.parametrize("listed", [False, pytest.param(True, marks=[tool("setfacl"), tool("mkfs.erofs")])])
def test_the_same_content_is_the_same_image(host: Path, *, listed: bool) -> None:
    if listed:
        subprocess.run(["setfacl", "--modify=user:1234:r", host / "etc/web/key"], check=True)
    first = digest(build(host))
    for path in (host / "etc", host / "etc/web", host / "etc/web/web.conf"):
        os.utime(path, (5, 5))
    assert digest(build(host, "web_1.raw")) == first


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256K", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def taken(host: Path) -> Taken:
    return first_version.take(["/etc/web"], lambda path: False, 1 << 30, root=str(host))


@root
def test_where_the_copy_has_no_room_nothing_is_begun(
    host: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_image.require_room(taken(host), str(small / "web.service.confext.d"))
    temporary(monkeypatch, small)
    first_image.require_room(taken(host), str(host))
    first_image.require_room(taken(host), str(small))
    os.truncate(host / "etc/web/web.conf", 300_000)
    needed = taken(host).room
    assert 300_000 < needed < 350_000
    with pytest.raises(Failed) as failed:
        first_image.require_room(taken(host), str(host))
    assert str(failed.value) == (
        f"{small} has no room for a first version: {needed} bytes are needed at most, and 262144 are free: make room"
        " there, or name another directory with TMPDIR="
    )


@root
def test_where_the_image_has_no_room_nothing_is_begun(host: Path, small: Path) -> None:
    os.truncate(host / "etc/web/web.conf", 300_000)
    with pytest.raises(Failed, match=rf"^{small} has no room .* and 262144 are free: make room there$"):
        first_image.require_room(taken(host), str(small / "not/yet/there"))


@root
def test_the_copy_and_the_image_need_room_together(
    host: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(host / "etc/web/web.conf", 150_000)
    temporary(monkeypatch, small)
    first_image.require_room(taken(host), str(host))
    with pytest.raises(Failed, match=rf"{2 * taken(host).room} bytes are needed"):
        first_image.require_room(taken(host), str(small))


@root
@tool("mksquashfs")
def test_what_is_said_to_need_room_is_enough(
    host: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that can be compressed, and many files."""
    for number in range(8):
        (host / f"etc/web/{number}").write_bytes(os.urandom(1))
    free = 262144 - 2 * taken(host).room
    (host / "etc/web/large").write_bytes(os.urandom(free // 2 // 4096 * 4096 - 4096))
    temporary(monkeypatch, small)
    first_image.require_room(taken(host), str(small))
    first_image.build(["/etc/web"], lambda path: False, "web", str(small / "web_0.raw"), 1 << 20, str(host))
    assert (small / "web_0.raw").stat().st_size > free // 3
