# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each part of the bench has an ext4 of its own, of which nothing is left, whatever happens to the part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import filesystem
from bench.report import Failed
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mkfs.ext4")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filesystem, "SIZE", 16 << 20)
    yield
    os.close(filesystem._file())
    filesystem._file.cache_clear()


def mounts(where: Path) -> list[str]:
    rows = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [row[2] for row in rows if row[1] == str(where)]


def test_it_is_a_new_ext4_every_time(tmp_path: Path) -> None:
    for _ in range(2):
        with filesystem.mounted(tmp_path):
            assert mounts(tmp_path) == ["ext4"]
            assert [path.name for path in tmp_path.iterdir()] == ["lost+found"]
            (tmp_path / "file").touch()
        assert mounts(tmp_path) == []
        assert list(tmp_path.iterdir()) == []


def test_it_is_unmounted_when_the_part_fails(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no drop was delivered"), filesystem.mounted(tmp_path):
        device = os.stat(tmp_path).st_dev
        raise Failed("no drop was delivered")
    assert mounts(tmp_path) == []
    assert not Path(f"/sys/block/loop{os.minor(device)}/loop").exists()


def test_who_still_uses_it_is_an_error_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part would have to share the machine with what that one goes on doing."""
    monkeypatch.setattr(filesystem, "SECONDS", 0.0)
    with pytest.raises(Failed, match=r"^/dev/loop\d+ is still in use$"), filesystem.mounted(tmp_path):
        held = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    os.close(held)
