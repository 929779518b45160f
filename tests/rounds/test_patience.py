# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is gone stays for a moment if it was the last, and for as long as an upload into its directory goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inotify_simple import flags

from watcher.model import Kind, Layer
from watcher.resolve.content import MARKER
from watcher.rounds import patience as module
from watcher.rounds.patience import Limits, Removals, limits, marked
from watcher.settings.config import ServiceSettings, Settings
from watcher.watch.uploads import Uploads

LIMITS = Limits(remove_usec=5_000_000, upload_usec=3_000_000)


class Clock:
    """Of `time`, as the module sees it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def layer(directory: Path) -> Layer:
    return Layer("web.raw", "web", "1", "0" * 64, Kind.IMAGE, f"{directory}/web_1.raw")


def test_the_last_one_stays_for_a_moment(tmp_path: Path, clock: Clock) -> None:
    removals, gone = Removals(), layer(tmp_path)
    removals.seen("web", [gone.source])
    assert removals.left("web", gone, LIMITS, last=True) == 5
    assert removals.left("web", gone, LIMITS, last=False) <= 0  # an older one is there: rm undoes at once
    clock.now += 4
    removals.seen("web", [gone.source])
    assert removals.left("web", gone, LIMITS, last=True) == 1
    clock.now += 1
    assert removals.left("web", gone, LIMITS, last=True) <= 0
    removals.seen("web", [])  # it is back
    removals.seen("web", [gone.source])
    assert removals.left("web", gone, LIMITS, last=True) == 5


def test_an_upload_that_events_have_told_of(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads()
    monkeypatch.setattr("watcher.watch.uploads.time", clock)
    removals = Removals(uploads)
    uploads.note(str(tmp_path), ".web_2.raw.Xa81b2", int(flags.CREATE))
    assert removals.left("web", layer(tmp_path), LIMITS, last=False) == 3
    assert removals.left("web", layer(tmp_path / "other"), LIMITS, last=False) <= 0
    (tmp_path / "link").symlink_to(tmp_path)
    assert removals.left("web", layer(tmp_path / "link"), LIMITS, last=False) == 3
    clock.now += 3
    assert removals.left("web", layer(tmp_path), LIMITS, last=False) <= 0


def test_a_temporary_name_that_is_there(tmp_path: Path, clock: Clock) -> None:
    removals = Removals()
    temporary = tmp_path / ".web_2.raw.Xa81b2"
    with temporary.open("w") as upload:
        upload.write("half")
        upload.flush()
        clock.now = temporary.stat().st_ctime + 3600  # it stalls
        assert removals.left("web", layer(tmp_path), LIMITS, last=False) == 3
    assert removals.left("web", layer(tmp_path), LIMITS, last=False) <= 0  # it was given up long ago
    clock.now = temporary.stat().st_ctime + 1
    assert removals.left("web", layer(tmp_path), LIMITS, last=False) == pytest.approx(2)
    (tmp_path / "site_2.part").mkdir()
    os.mkfifo(tmp_path / "fifo.part")
    (tmp_path / "dangling.part").symlink_to("nowhere")
    clock.now = (tmp_path / "dangling.part").lstat().st_ctime + 2
    assert removals.left("web", layer(tmp_path), LIMITS, last=False) == pytest.approx(1)


def test_what_is_no_temporary_name_is_no_upload(tmp_path: Path) -> None:
    (tmp_path / "web_2.raw").write_text("whole")
    assert Removals().left("web", layer(tmp_path), LIMITS, last=False) <= 0


def test_a_clock_that_was_set_back_holds_nothing_up(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "x.part").touch()
    clock.now = 1.0
    assert Removals().left("web", layer(tmp_path), LIMITS, last=False) == 3


def test_limits_of_a_service_are_its_own_or_the_watchers() -> None:
    settings = Settings(settle_tree_usec=1, settle_tree_max_usec=2, remove_usec=3, settle_max_usec=4)
    assert limits(settings, ServiceSettings()) == Limits(1, 2, 3, 4)
    assert limits(settings, ServiceSettings(settle_tree_usec=0, remove_usec=9)) == Limits(0, 2, 9, 4)


def test_whether_the_tree_before_had_the_marker(tmp_path: Path) -> None:
    before = Layer("site", "site", "1", "f" * 64, Kind.DIRECTORY, "/drops/site.v/site_1")
    asked = marked([before], {"/drops/site.v/site_2": "site", "/drops/web": "web"}, str(tmp_path))
    (tmp_path / before.digest).mkdir()
    assert not asked("/drops/site.v/site_2")
    (tmp_path / before.digest / MARKER).touch()
    assert asked("/drops/site.v/site_2")
    assert not asked("/drops/web") and not asked("/elsewhere")
