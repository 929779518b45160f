# SPDX-License-Identifier: LGPL-2.1-or-later
"""What lies at a path, or by a name, for a service: by looks that were made up, in directories that are there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from support.facts import layer
from watcher.model import Candidate, Declared, Entry, Kind, Look, Picks, Refused, Remark, Stack, Unsafe
from watcher.rounds import answer
from watcher.rounds.choose import Passed
from watcher.rounds.desired import Desired
from watcher.rounds.dropped import dropped


@pytest.fixture
def drops(tmp_path: Path) -> Path:
    (tmp_path / "web.confext.d/web.raw.v").mkdir(parents=True)
    return tmp_path / "web.confext.d"


def look(drops: Path, *names: str, **changes: object) -> Desired:
    """With these candidates, best first; the first is wanted."""
    directory = f"{drops}/web.raw.v"
    files = tuple(Candidate(f"{directory}/{name}", name, "web", name[4:5], Kind.IMAGE) for name in names)
    pick = Picks(Entry("web.raw", directory, Kind.IMAGE), files, **changes)  # type: ignore[arg-type]
    wanted = Stack(tuple(replace(layer(f"web{one.version}"), source=one.path) for one in files[:1]))
    return Desired(
        Look((pick,), ()), (), wanted, Stack(), digests={one.source: one.digest for one in wanted.layers}
    )


def found(drops: Path, asked: object, desired: Desired) -> answer.Dropped:
    return dropped(str(asked), desired, Declared(confext_dirs=(str(drops),)))


def test_a_file_is_found_by_its_path_its_name_and_other_ways_to_it(drops: Path) -> None:
    desired = look(drops, "web_2+2-1.raw", "web_1.raw")
    link = drops.parent / "link"
    link.symlink_to(drops)
    real = os.path.realpath(drops)
    for asked in (
        "web_2.raw",
        "web_2+3.raw",
        drops / "web.raw.v/web_2.raw",
        f"{real}/web.raw.v/web_2+2-1.raw",
    ):
        one = found(drops, asked, desired)
        assert (one.path, one.digest) == (f"{drops}/web.raw.v/web_2+2-1.raw", layer("web2").digest)
        assert one.chosen is not None and one.chosen.source == one.path
    one = found(drops, "web_1.raw", desired)
    assert (one.digest, one.passed, one.problem) == ("", None, None)
    assert one.chosen is not None and one.chosen.version == "2"
    # Links are followed by who asks: what a stranger has linked to is not looked into.
    assert found(drops, link / "web.raw.v/web_2.raw", desired).problem is not None


def test_why_it_was_passed_over_is_that_of_its_entry(drops: Path) -> None:
    desired = look(drops, "web_2.raw", "web_1.raw")
    path = f"{drops}/web.raw.v/web_1.raw"
    reason = Refused("no")
    candidate = desired.look.picks[0].candidates[1]
    assert (
        found(drops, path, replace(desired, passed=(Passed("web.raw", candidate, reason),))).passed is reason
    )
    assert found(drops, path, replace(desired, passed=(Passed("db.raw", candidate, reason),))).passed is None
    unsafe = Unsafe("writable by everybody")
    assert found(drops, path, look(drops, "web_2.raw", "web_1.raw", unsafe=unsafe)).passed is unsafe


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("passed over: not called web_VERSION.raw", answer.Kind.MISNAMED),
        ("ignored: neither NAME.raw nor a directory", answer.Kind.MISNAMED),
        ("passed over: the link leads nowhere", answer.Kind.DANGLING),
        ("passed over: the link leads in a circle", answer.Kind.DANGLING),
        ("ignored: a dangling link", answer.Kind.DANGLING),
        ("overridden by /run/web.confext.d/x", answer.Kind.ELSEWHERE),
        ("hides the host's etc/os-release", answer.Kind.NOT_THERE),
    ],
)
def test_what_a_look_has_said_of_a_name(drops: Path, text: str, kind: answer.Kind) -> None:
    desired = look(drops, "web_1.raw")
    path = f"{drops}/web.raw.v/x"
    desired = replace(desired, look=replace(desired.look, remarks=(Remark("debug", path, text),)))
    for asked in (path, "x"):
        problem = found(drops, asked, desired).problem
        assert problem is not None and problem[0] is kind
    problem = found(drops, "y", desired).problem
    assert problem is not None and problem[0] is answer.Kind.NOT_THERE


def test_what_cannot_be_seen_is_not_said_to_be_absent(drops: Path) -> None:
    path = f"{drops}/web.raw.v/web_1.raw"
    unsafe = Unsafe("ask its owner", hidden=True)
    entry = Entry("web.raw", f"{drops}/web.raw.v", Kind.IMAGE)
    hidden = Picks(entry, (Candidate(entry.path, "web.raw.v", "web", "", Kind.IMAGE),), unsafe=unsafe)
    said = Remark("warning", str(drops), "cannot be read, all stays as it is: Permission denied")
    looks = (
        Look((Picks(entry, (), unknown=True),), ()),
        Look((hidden,), ()),
        Look((), (), (said,), unknown=True),
        replace(look(drops, "web_1.raw").look, remarks=(said,), unknown=True),
    )
    for one in looks:
        for asked in (path, "web_1.raw"):
            problem = found(drops, asked, replace(look(drops), look=one)).problem
            assert problem is not None and problem[0] is answer.Kind.STUCK, one
    problem = found(drops, path, replace(look(drops), look=looks[3])).problem
    assert problem is not None and "Permission denied" in problem[1]


def test_only_directories_of_the_service_are_looked_into(drops: Path, tmp_path: Path) -> None:
    """Whether anything is there elsewhere is not told."""
    (tmp_path / "web_1.raw").touch()
    kinds = {
        problem[0]
        for asked in (tmp_path / "web_1.raw", tmp_path / "none", "/etc/shadow", "/none/web_1.raw")
        if (problem := found(drops, asked, look(drops)).problem)
    }
    assert kinds == {answer.Kind.ELSEWHERE}
    (drops / "web.raw.v/.web_1.raw.Xa81b").touch()
    problem = found(drops, "web_1.raw", look(drops)).problem
    assert problem is not None and problem[0] is answer.Kind.UPLOADING
    for part in (
        "",
        ".",
        "w",
        "web_1",
        ".web_1.r",
        "b_1.raw",
    ):  # names of others cannot be found out bit by bit
        problem = found(drops, part, look(drops)).problem
        assert problem is not None and problem[0] is not answer.Kind.UPLOADING
    problem = found(drops, ".web_1.raw.Xa81b", look(drops)).problem
    assert problem is not None and problem[0] is answer.Kind.MISNAMED
