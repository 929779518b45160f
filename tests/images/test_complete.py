# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree is complete when it has been quiet, or at once where its end is exact."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.images import confext
from watcher.images import complete as module
from watcher.images import tree
from watcher.images.complete import Complete, Rule, Seen, seconds_left
from watcher.images.tree import Signature
from watcher.model import Incomplete, Settling
from watcher.resolve.content import MARKER

SEC = 10**9
NOW = 1000 * SEC
RULE = Rule(2_000_000, 10_000_000)


def seen(changed: float, *, root: float = 0, linked: float = 0, marked: float = 0) -> Seen:
    """A tree by its times, in seconds before now; 0: it has no such time."""

    def at(before: float) -> int:
        return NOW - round(before * SEC) if before else 0

    status = os.stat_result((0o40755, 1, 1, 2, 0, 0, 0, 0, 0, 0), {"st_ctime_ns": at(root)})
    signature = Signature(b"", 0, 0, at(changed), at(changed), at(marked))
    return Seen("/drops/site", status, "/drops/site", at(linked), signature)


@pytest.mark.parametrize(
    ("found", "moved_in", "left"),
    [
        (seen(5), 0, -3),
        (seen(2), 0, 0),
        (seen(0.5), 0, 1.5),
        (seen(0.5, root=0.4), 0.4, 0),  # renamed
        (seen(0.4, root=0.5), 0.5, 1.6),  # changed since
        (seen(0.5, root=7), 0.4, 1.5),  # the file system does not know of a rename
        (seen(0.5, root=0.4), 0, 1.5),  # only its mode was changed: no rename was seen
        (seen(0.5, linked=0.4), 0, 0),
        (seen(0.5, linked=0.6), 0, 1.5),
        (seen(0.5, marked=0.4), 0, 0),
        (seen(0.5, marked=0.5), 0, 1.5),  # in the same tick of the clock
        (seen(0.5, linked=0.5), 0, 1.5),
        (seen(0.5, root=0.5), 0.4, -0.48),  # but a rename is often as quick as that
        (seen(0.015, root=0.015), 0.01, 0.005),
        (seen(0.5, marked=0.6), 0, 1.5),  # the marker came before the rest
        (seen(-3600), 0, 3602),  # the clock was set back: SettleTreeMaxSec= ends that
    ],
)
def test_the_rule(found: Seen, moved_in: float, left: float) -> None:
    moved_in_ns = NOW - round(moved_in * SEC) if moved_in else 0
    assert seconds_left(found, RULE, moved_in_ns, NOW) == pytest.approx(left)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return confext(tmp_path / "site", "site", {"etc/site.conf": b"1", "etc/site.d/a/b.conf": b"2"})


def look(path: Path) -> Seen:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Seen(str(path), os.fstat(fd), str(path), 0, tree.signature(fd))
    finally:
        os.close(fd)


def test_a_change_far_below_counts_and_one_beside_etc_does_not(site: Path) -> None:
    before = look(site).signature
    (site / "README").write_text("more")
    assert look(site).signature == before
    (site / "etc/site.d/a/b.conf").write_text("3")
    assert look(site).signature.changed_ns > before.changed_ns


def test_a_tree_that_never_ends_is_taken_in_the_end(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    judge, rule = Complete(), Rule(3_600_000_000, 10_000_000)
    for now, left in ((100.0, 10.0), (107.0, 3.0)):
        clock[0] = now
        with pytest.raises(Settling) as settling:
            judge.require(look(site), rule)
        assert settling.value.seconds == pytest.approx(left, abs=0.01)
        (site / "etc/site.conf").write_text(str(now))
    clock[0] = 110.0
    judge.require(look(site), rule)
    with pytest.raises(Settling):  # and from then on it is counted anew
        judge.require(look(site), rule)


def test_who_uses_markers_is_waited_for(site: Path) -> None:
    judge, rule = Complete(), Rule(3_600_000_000, 3_600_000_000, lambda path: path == str(site))
    with pytest.raises(
        Incomplete, match=r"the tree before it has a \.confext-complete, and this one has none"
    ):
        judge.require(look(site), rule)
    while not (marked := look(site).signature).marked_ns > marked.changed_ns:
        (site / MARKER).touch()
    judge.require(look(site), rule)


def test_zero_waits_for_nothing(site: Path) -> None:
    Complete().require(look(site), Rule())
    assert seconds_left(seen(-1, root=-1), Rule(), NOW + 10 * SEC, NOW) == 0
