# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a file system took away when it was unmounted is not removed; what somebody removed is."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import root
from watcher.images import unmounted
from watcher.model import Kind, Layer, Stack


def _stack(source: Path) -> Stack:
    return Stack((Layer("web.raw", "web", "1", "0" * 64, Kind.IMAGE, str(source)),))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=False, capture_output=True)


@root
def test_what_was_unmounted_is_told_from_what_was_removed(mounted: Path) -> None:
    source = mounted / "web.raw.v" / "web_1.raw"
    source.parent.mkdir()
    source.touch()
    stack = _stack(source)
    places = unmounted.noted(stack, {})
    assert unmounted.unmounted(stack, places) == {}
    subprocess.run(["umount", mounted], check=True)
    assert unmounted.unmounted(stack, places) == {"web.raw": str(mounted)}
    assert unmounted.noted(stack, places) == places == {str(source): str(mounted)}


def test_what_was_removed_is_removed(tmp_path: Path) -> None:
    source = tmp_path / "web.raw.v" / "web_1.raw"
    source.parent.mkdir()
    source.touch()
    stack = _stack(source)
    places = unmounted.noted(stack, {})
    source.unlink()
    assert unmounted.unmounted(stack, places) == {}
    source.parent.rmdir()
    assert unmounted.unmounted(stack, places) == {}


@root
def test_a_link_that_leads_elsewhere_now_is_not_an_unmount(
    mounted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    links = tmp_path_factory.mktemp("links")
    (mounted / "web_1.raw").touch()
    (links / "web.raw.v").symlink_to(mounted)
    stack = _stack(links / "web.raw.v" / "web_1.raw")
    places = unmounted.noted(stack, {})
    (links / "web.raw.v").unlink()
    subprocess.run(["umount", mounted], check=True)
    assert unmounted.unmounted(stack, places) == {}
    (links / "web.raw.v").symlink_to(links)
    assert unmounted.unmounted(stack, places) == {}
    (links / "web.raw.v").unlink()
    (links / "web.raw.v").symlink_to(mounted)
    assert unmounted.unmounted(stack, places) == {"web.raw": str(mounted)}


@root
def test_what_is_mounted_there_next_counts_as_it_is(mounted: Path) -> None:
    (mounted / "web_1.raw").touch()
    stack = _stack(mounted / "web_1.raw")
    places = unmounted.noted(stack, {})
    subprocess.run(["umount", mounted], check=True)
    assert unmounted.unmounted(stack, places)
    subprocess.run(["mount", "-t", "tmpfs", "other", mounted], check=True)
    assert unmounted.unmounted(stack, places) == {}


@root
def test_a_mount_that_covers_the_directory_is_no_unmount(tmp_path: Path) -> None:
    (tmp_path / "web_1.raw").touch()
    stack = _stack(tmp_path / "web_1.raw")
    places = unmounted.noted(stack, {})
    subprocess.run(["mount", "-t", "tmpfs", "over", tmp_path], check=True)
    try:
        assert unmounted.unmounted(stack, places) == {}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@root
def test_a_bind_mount_is_one_too(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    real = tmp_path_factory.mktemp("real")
    (real / "web_1.raw").touch()
    subprocess.run(["mount", "--bind", real, tmp_path], check=True)
    stack = _stack(tmp_path / "web_1.raw")
    places = unmounted.noted(stack, {})
    subprocess.run(["umount", tmp_path], check=True)
    assert unmounted.unmounted(stack, places) == {"web.raw": str(tmp_path)}


def test_a_file_in_the_place_of_the_directory_has_replaced_it(tmp_path: Path) -> None:
    source = tmp_path / "web.raw.v" / "web_1.raw"
    source.parent.mkdir()
    source.touch()
    stack = _stack(source)
    places = unmounted.noted(stack, {})
    source.unlink()
    source.parent.rmdir()
    source.parent.touch()
    assert unmounted.unmounted(stack, places) == {}
