# SPDX-License-Identifier: LGPL-2.1-or-later
"""What events tell of uploads: a rename into place, and temporary names."""

from __future__ import annotations

import time
from pathlib import Path

from inotify_simple import flags

from watcher.model import Interest
from watcher.watch import uploads as module
from watcher.watch.uploads import Uploads
from watcher.watch.watcher import Watcher


def events(watcher: Watcher) -> None:
    watcher._collect()


def test_a_directory_that_was_renamed_into_place(tmp_path: Path) -> None:
    drops = tmp_path / "drops"
    for path in (drops, tmp_path / "made/etc", drops / "site_2.part"):
        path.mkdir(parents=True)
    with Watcher() as watcher:
        watcher.set("web", [Interest(str(drops), pattern="site_.*")])
        before = time.time_ns()
        (tmp_path / "made").rename(drops / "site_1")
        (drops / "site_2.part").rename(drops / "site_2")
        (drops / "site_3").mkdir()
        (drops / "site_4.raw").touch()
        events(watcher)
        for name in ("site_1", "site_2"):
            assert before <= watcher.uploads.moved_in_ns(f"{drops}/{name}") <= time.time_ns()
        for name in ("site_3", "site_4.raw", "site_2.part"):
            assert not watcher.uploads.moved_in_ns(f"{drops}/{name}")
        watcher.set("web", [Interest(str(drops), pattern="site_.*"), Interest(str(drops / "site_1"))])
        (drops / "site_1").rename(drops / "site_1.part")
        (drops / "site_1.part").rename(drops / "site_1")
        events(watcher)  # of the directory itself, too
        assert watcher.uploads.moved_in_ns(f"{drops}/site_1")
        (drops / "site_1").rename(tmp_path / "away")
        events(watcher)
        assert not watcher.uploads.moved_in_ns(f"{drops}/site_1")


def test_temporary_names(tmp_path: Path) -> None:
    with Watcher() as watcher:
        watcher.set("web", [Interest(str(tmp_path), pattern="web_.*[.]raw")])
        (tmp_path / "web_1.raw").touch()
        events(watcher)
        assert watcher.uploads.temporary_at(str(tmp_path)) is None
        before = time.monotonic()
        (tmp_path / ".web_2.raw.Xa81b2").touch()
        events(watcher)
        came = watcher.uploads.temporary_at(str(tmp_path))
        assert came is not None and came >= before
        (tmp_path / ".web_2.raw.Xa81b2").rename(tmp_path / "web_2.raw")
        events(watcher)
        gone = watcher.uploads.temporary_at(str(tmp_path))
        assert gone is not None and gone > came


def test_what_was_in_a_directory_goes_with_it(tmp_path: Path) -> None:
    drops = tmp_path / "drops"
    (drops / "web.raw.v").mkdir(parents=True)
    with Watcher() as watcher:
        watcher.set("web", [Interest(str(drops)), Interest(str(drops / "web.raw.v"))])
        (tmp_path / "made").mkdir()
        (tmp_path / "made").rename(drops / "site")
        (drops / "web.raw.v/.web_2.raw.Xa81b2").touch()
        events(watcher)
        assert watcher.uploads.moved_in_ns(f"{drops}/site")
        assert watcher.uploads.temporary_at(f"{drops}/web.raw.v") is not None
        drops.rename(tmp_path / "away")
        events(watcher)
        assert not watcher.uploads.moved_in_ns(f"{drops}/site")
        assert watcher.uploads.temporary_at(f"{drops}/web.raw.v") is None


def test_a_million_names_are_not_kept() -> None:
    uploads = Uploads()
    moved = int(flags.MOVED_TO | flags.ISDIR)
    for number in range(module._KEPT_MAX + 5):
        uploads.note("/drops", str(number), moved)
    assert len(uploads._moved_in) == module._KEPT_MAX
    assert not uploads.moved_in_ns("/drops/0") and uploads.moved_in_ns(f"/drops/{module._KEPT_MAX}")
