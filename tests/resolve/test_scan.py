# SPDX-License-Identifier: LGPL-2.1-or-later
"""A look at real directories: what is found, what must be watched, and that nothing odd makes it fail."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.needs import root
from watcher.model import Declared, Look, Scope
from watcher.resolve import scan, sources
from watcher.resolve.strict_modes import StrictModes


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    directory = tmp_path / "web.service.confext.d"
    directory.mkdir()
    return directory


def look(*directories: Path, declared: Declared | None = None) -> Look:
    paths = tuple(str(directory) for directory in directories)
    return scan.look(declared or Declared(confext_dirs=paths), "x86-64")


def found(result: Look) -> list[list[str]]:
    return [[c.filename for c in picks.candidates] for picks in result.picks]


def told(result: Look, level: str) -> list[str]:
    return [remark.text for remark in result.remarks if remark.level == level]


def watched(result: Look, path: Path, name: str, scope: Scope = Scope.CHILDREN) -> bool:
    return any(
        interest.path == str(path)
        and interest.scope is scope
        and (interest.pattern is None or re.fullmatch(interest.pattern, name) is not None)
        for interest in result.interests
    )


def versions(parent: Path, *names: str) -> Path:
    parent.mkdir()
    for name in names:
        (parent / name).touch()
    return parent


def test_a_versioned_directory_gives_all_its_images_newest_first(drop: Path) -> None:
    inner = versions(drop / "web.raw.v", "web_1.raw", "web_2.raw", ".web_3.raw.Xa81b", "web_3.raw.part")
    result = look(drop)
    assert found(result) == [["web_2.raw", "web_1.raw"]]
    assert [c.path for c in result.picks[0].candidates] == [f"{inner}/web_2.raw", f"{inner}/web_1.raw"]
    assert result.remarks == ()
    assert watched(result, drop, "other.raw")
    assert watched(result, inner, "web_3.raw")
    assert not watched(result, inner, ".web_3.raw.Xa81b")
    assert not watched(result, drop, ".web.raw.Xa81b")


def test_an_image_of_another_name_is_pointed_out_where_it_can_only_be_meant_for_this_one(drop: Path) -> None:
    inner = versions(drop / "app.raw.v", "app_1.raw", "web_8.raw", "README", ".x.raw")
    result = look(drop)
    assert found(result) == [["app_1.raw"]]
    assert told(result, "warning") == ["passed over: not called app_VERSION.raw"]
    assert watched(result, inner, "web_8.raw")


def test_a_directory_that_does_not_exist_is_watched_for(tmp_path: Path) -> None:
    declared = sources.declare([(f"{tmp_path}/no/web.raw.v", "", True)], [], [f"{tmp_path}/none.confext.d"])
    result = look(declared=declared)
    assert found(result) == [[]]
    assert result.remarks == ()
    assert not result.unknown and not result.picks[0].unknown
    assert watched(result, tmp_path / "none.confext.d", "web.raw")
    assert watched(result, tmp_path / "no/web.raw.v", "web_1.raw")


def test_a_declared_source_that_is_missing_is_told_unless_optional(tmp_path: Path) -> None:
    declared = sources.declare([(f"{tmp_path}/a.raw", "", False), (f"{tmp_path}/b.raw", "", True)], [])
    result = look(declared=declared)
    assert found(result) == [[], []]
    assert [(r.path, r.text) for r in result.remarks] == [(f"{tmp_path}/a.raw", "does not exist")]
    assert watched(result, tmp_path, "a.raw") and watched(result, tmp_path, "b.raw")
    assert not watched(result, tmp_path, "c.raw")


def test_an_empty_versioned_directory_is_told(drop: Path) -> None:
    versions(drop / "web.raw.v")
    result = look(drop)
    assert found(result) == [[]]
    assert told(result, "info") == ["nothing in it yet that is called web_VERSION.raw and fits"]


def test_a_tree_is_watched_below_itself(drop: Path) -> None:
    (drop / "tree/etc").mkdir(parents=True)
    (drop / "trees.v/trees_1/etc").mkdir(parents=True)
    result = look(drop)
    assert found(result) == [["tree"], ["trees_1"]]
    assert watched(result, drop / "tree/etc", "anything", Scope.TREE)
    assert watched(result, drop / "trees.v/trees_1/etc", "anything", Scope.TREE)
    for name in ("etc", "usr", ".confext-complete"):
        assert watched(result, drop / "tree", name)
    assert not watched(result, drop / "tree", ".git")
    assert watched(result, drop / "trees.v", "trees_2")


def test_links_are_followed_and_each_step_is_watched(drop: Path, tmp_path: Path) -> None:
    releases = tmp_path / "releases"
    versions(tmp_path / "releases").joinpath("3").mkdir()
    (releases / "3/web_1.4.raw").touch()
    (releases / "current").symlink_to("3")
    (drop / "web.raw").symlink_to("../releases/current/web_1.4.raw")
    result = look(drop)
    (candidate,) = result.picks[0].candidates
    assert (candidate.path, candidate.filename) == (f"{drop}/web.raw", "web.raw")
    assert (candidate.name, candidate.version) == ("web", "1.4")
    assert watched(result, drop, "web.raw")
    assert watched(result, releases, "current") and not watched(result, releases, "other")
    assert watched(result, releases / "3", "web_1.4.raw")


def test_a_link_to_a_versioned_directory(drop: Path, tmp_path: Path) -> None:
    target = versions(tmp_path / "images", "web_1.raw", "web_2.raw")
    (drop / "web.raw.v").symlink_to(target)
    result = look(drop)
    assert found(result) == [["web_2.raw", "web_1.raw"]]
    assert watched(result, drop / "web.raw.v", "web_3.raw")
    assert watched(result, drop, "web.raw.v")
    assert watched(result, tmp_path, "images")


def test_a_link_among_versions_is_watched_where_it_leads(drop: Path, tmp_path: Path) -> None:
    image = versions(tmp_path / "images", "real.raw") / "real.raw"
    (versions(drop / "web.raw.v") / "web_1.raw").symlink_to(image)
    result = look(drop)
    assert found(result) == [["web_1.raw"]]
    assert watched(result, image.parent, "real.raw")


def test_a_linked_tree_is_watched_where_it_is(drop: Path, tmp_path: Path) -> None:
    (tmp_path / "real/etc").mkdir(parents=True)
    (drop / "tree").symlink_to("../real")
    (drop / "trees.v").mkdir()
    (drop / "trees.v/trees_1").symlink_to("../../real")
    result = look(drop)
    assert found(result) == [["tree"], ["trees_1"]]
    assert watched(result, tmp_path / "real/etc", "x", Scope.TREE)


def test_dangling_links_are_passed_over_and_watched_until_they_lead_somewhere(
    drop: Path, tmp_path: Path
) -> None:
    (drop / "a.raw").symlink_to("../images/a.raw")
    (drop / "b.raw.v").symlink_to("../b")
    (versions(drop / "web.raw.v", "web_1.raw") / "web_2.raw").symlink_to("nothing")
    result = look(drop)
    assert found(result) == [[], [], ["web_1.raw"]]
    assert told(result, "warning") == ["passed over: the link leads nowhere"] * 3
    assert watched(result, tmp_path / "images", "a.raw")
    assert watched(result, tmp_path, "b")
    assert watched(result, drop / "web.raw.v", "nothing")
    assert not any(picks.unknown for picks in result.picks)


def test_a_loop_of_links_is_told(drop: Path) -> None:
    (drop / "a.raw").symlink_to("b.raw")
    (drop / "b.raw").symlink_to("a.raw")
    (versions(drop / "web.raw.v", "web_1.raw") / "web_2.raw").symlink_to("web_2.raw")
    result = look(drop)
    assert found(result) == [[], [], ["web_1.raw"]]
    assert told(result, "warning") == [
        "passed over: Too many levels of symbolic links",
        "passed over: Too many levels of symbolic links",
        "passed over: the link leads in a circle",
    ]
    assert watched(result, drop, "a.raw")


def test_wrong_types_are_told(drop: Path, tmp_path: Path) -> None:
    os.mkfifo(drop / "fifo.raw")
    (drop / "dir.raw").mkdir()
    (drop / "file.v").touch()
    inner = versions(drop / "web.raw.v", "web_1.raw")
    (inner / "web_2.raw").mkdir()
    os.mkfifo(inner / "web_3.raw")
    result = look(drop, tmp_path / "none")
    assert found(result) == [["web_1.raw"]]
    assert len(told(result, "warning")) == 5


def test_a_mask_hides_the_same_name_further_on(drop: Path, tmp_path: Path) -> None:
    later = versions(tmp_path / "later", "web.raw", "b.raw")
    (drop / "web.raw").symlink_to("/dev/null")
    assert found(look(drop, later)) == [["b.raw"]]


@pytest.mark.parametrize("instead", ["file", "loop", "null"])
def test_a_drop_directory_that_is_none(tmp_path: Path, instead: str) -> None:
    path = tmp_path / "web.service.confext.d"
    if instead == "file":
        path.touch()
    else:
        path.symlink_to(path if instead == "loop" else "/dev/null")
    result = look(path)
    assert result.picks == () and not result.unknown
    assert len(told(result, "warning")) == (0 if instead == "null" else 1)


@pytest.mark.parametrize(
    "name", [b"a b", b"new\nline", b"\"quoted'", b"\xff\xfe", b"co:lon", b"back\\slash", b"%n"]
)
def test_odd_names_work(drop: Path, name: bytes) -> None:
    directory = os.fsencode(drop)
    os.mkdir(directory + b"/" + name)
    Path(os.fsdecode(directory + b"/" + name + b".raw")).touch()
    versions(Path(os.fsdecode(directory + b"/" + name + b".raw.v")), os.fsdecode(name + b"_1.raw"))
    result = look(drop)
    text = os.fsdecode(name)
    assert found(result) == [[f"{text}.raw"], [f"{text}_1.raw"], [text]]
    assert watched(result, drop, f"{text}.raw")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the power to read everything, should the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that nobody can get to, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_cannot_be_read_is_unknown_and_not_removed(public: Path) -> None:
    locked = versions(public / "locked", "web_1.raw")
    dropped = versions(public / "c")
    (dropped / "web.raw.v").symlink_to(locked)
    (dropped / "a.raw").symlink_to(locked / "web_1.raw")
    (versions(dropped / "b.raw.v", "b_1.raw") / "b_2.raw").symlink_to(locked / "web_1.raw")
    locked.chmod(0)
    with as_nobody():
        result = look(dropped, locked)
    locked.chmod(0o755)
    assert result.unknown
    assert found(result) == [[], ["b_1.raw"], []]
    assert [picks.unknown for picks in result.picks] == [True, True, True]
    assert len(told(result, "warning")) == 4
    assert all(text.endswith("Permission denied") for text in told(result, "warning"))
    assert all("what was accepted stays" in text or "as it is" in text for text in told(result, "warning"))


def test_names_that_can_be_listed_but_not_looked_at_are_unknown(public: Path) -> None:
    dropped = versions(public / "c", "web.raw")
    dropped.chmod(0o444)
    with as_nobody():
        result = look(dropped)
    dropped.chmod(0o755)
    assert found(result) == [[]]
    assert result.picks[0].unknown


def test_versions_that_can_be_listed_but_not_looked_at_are_unknown(public: Path) -> None:
    directory = versions(versions(public / "c") / "web.raw.v", "web_1.raw", "web_2.raw")
    directory.chmod(0o444)
    with as_nobody():
        result = look(public / "c")
    directory.chmod(0o755)
    assert found(result) == [[]]
    assert result.picks[0].unknown
    assert len(told(result, "warning")) == 2


def test_a_newest_version_that_a_failing_disk_hides_is_unknown(
    drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(drop / "web.raw.v", "web_1.raw", "web_2.raw")
    stat = os.stat

    def fail(path: object, **options: Any) -> os.stat_result:
        if path == "web_2.raw":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        result = look(drop)
    assert found(result) == [["web_1.raw"]]
    assert result.picks[0].unknown and result.failed
    assert told(result, "warning") == [
        "cannot be read, what was accepted stays until something newer comes: Input/output error"
    ]


@pytest.mark.parametrize(
    ("number", "failed"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False), (errno.ENOENT, False)],
)
def test_it_is_known_of_what_no_event_tells_when_it_can_be_read(
    drop: Path, monkeypatch: pytest.MonkeyPatch, number: int, failed: bool
) -> None:
    versions(drop / "web.raw.v", "web_1.raw")
    assert not look(drop).failed
    scandir, left = os.scandir, iter([number])

    def fail(where: int) -> Any:
        if (number := next(left, 0)) != 0:
            raise OSError(number, os.strerror(number))
        return scandir(where)

    monkeypatch.setattr(os, "scandir", fail)
    assert look(drop).failed == failed


@pytest.mark.parametrize("instead", [os.mkdir, os.mkfifo, functools.partial(os.symlink, "/nowhere")])
def test_a_name_that_is_something_else_now(drop: Path, instead: Callable[[Path], None]) -> None:
    newest = versions(drop / "web.raw.v", "web_1.raw", "web_2.raw") / "web_2.raw"
    assert found(look(drop)) == [["web_2.raw", "web_1.raw"]]
    newest.unlink()
    assert found(look(drop)) == [["web_1.raw"]]
    instead(newest)
    result = look(drop)
    assert found(result) == [["web_1.raw"]]
    assert len(told(result, "warning")) == 1


@pytest.mark.parametrize("which", ["the drop directory", "a directory of versions"])
def test_a_directory_with_names_without_end_is_unknown_and_told(
    drop: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    directory = versions(drop / "web.raw.v", "web_1.raw")
    monkeypatch.setattr(scan, "_NAMES_MAX", 6)
    for number in range(6):
        ((drop if which == "the drop directory" else directory) / f".{number}").touch()
    result = look(drop)
    assert result.unknown or result.picks[0].unknown
    (text,) = told(result, "warning")
    assert re.fullmatch(
        r"cannot be read, (all|what was accepted) stays( as it is)?: more than 6 names in it, remove some",
        text,
    )


def test_two_looks_at_the_same_are_the_same(drop: Path, tmp_path: Path) -> None:
    inner = versions(drop / "web.raw.v", *(f"web_{number}.raw" for number in range(20)))
    for number in range(20):
        (inner / f"web_{number}a.raw").symlink_to(tmp_path / f"{number}")
    first, second = look(drop), look(drop)
    assert first == second
    assert len(set(first.interests)) == len(first.interests)


def test_a_file_named_wrong_is_told(drop: Path) -> None:
    versions(drop / "web.raw.v", "web_1.4 final.raw", "web_1.img", "web_1.raw", "README")
    result = look(drop)
    assert found(result) == [["web_1.raw"]]
    assert [r.path.rpartition("/")[2] for r in result.remarks if r.level == "warning"] == [
        "web_1.4 final.raw",
        "web_1.img",
    ]


@pytest.mark.parametrize(
    "module",
    [
        "generator",
        "resolve.scan",
        "resolve.sources",
        "settings.unit_names",
        "settings.syntax",
        "settings.config",
        "resolve.release",
        "resolve.version",
    ],
)
def test_what_the_generator_needs_is_in_the_standard_library(module: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(scan.__file__).parents[2])!r}); import watcher.{module}"
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True)


@root
class TestWhatIsUnsafe:
    """The rules are in test_strict_modes.py; here is what a look makes of them."""

    @pytest.fixture
    def secret(self, public: Path) -> Path:
        path = public / "secret"
        (path / "web_9").mkdir(parents=True)
        (path / "web_9.raw").touch()
        path.chmod(0o700)
        return path

    def test_a_directory_that_others_can_write_to_is_refused_as_a_whole(self, public: Path) -> None:
        dropped = versions(public / "c")
        inner = versions(dropped / "web.raw.v", "web_1.raw", "web_2.raw")
        dropped.chmod(0o777)
        result = look(dropped)
        assert found(result) == [["web_2.raw", "web_1.raw"]]
        assert result.unsafe and "writable by everybody" in str(result.picks[0].unsafe)
        assert watched(result, public, "c")  # where a chmod is seen
        dropped.chmod(0o755)
        inner.chmod(0o777)
        result = look(dropped)
        assert not result.unsafe and "writable by everybody" in str(result.picks[0].unsafe)
        assert watched(result, dropped, "web.raw.v")

    def test_what_a_strangers_link_leads_to_is_neither_read_nor_watched(
        self, public: Path, secret: Path
    ) -> None:
        dropped = versions(public / "c")
        (dropped / "a.raw").symlink_to(secret / "web_9.raw")
        (dropped / "b").symlink_to(secret / "web_9")
        (dropped / "web.raw.v").symlink_to(secret)
        (dropped / "web.v").mkdir()
        (dropped / "web.v/web_3").symlink_to("/")
        for link in dropped.rglob("*"):
            if link.is_symlink():
                os.lchown(link, 65534, 65534)
        result = look(dropped)
        assert found(result) == [["a.raw"], ["web.raw.v"], ["b"], ["web_3"]]
        assert not [one for one in result.interests if "secret" in one.path or one.scope is Scope.TREE]
        assert not [one for one in result.remarks if "secret" in one.path or "secret" in one.text]
        assert watched(result, dropped, "b") and watched(result, dropped / "web.v", "web_3")

    def test_a_confext_dir_that_a_stranger_sends_elsewhere(self, public: Path, secret: Path) -> None:
        (public / "c").symlink_to(secret)
        os.lchown(public / "c", 65534, 65534)
        result = look(public / "c")
        assert result.unknown and found(result) == []
        assert [text.partition(": ")[0] for text in told(result, "warning")] == [
            "not looked at, all stays as it is"
        ]
        assert watched(result, public, "c")


@pytest.mark.parametrize(
    ("filename", "called"),
    [
        ("web_1.5_amd64.raw", "x86-64"),
        ("web_1.5_aarch64.raw", "arm64"),
        ("web_1.5_amd64+3.raw", "x86-64"),
        ("web_1.5_ppc64le.raw", "ppc64-le"),
        ("web_1.5_x86-64.raw", ""),
        ("web_1.5_rc.raw", ""),
        ("web_amd64.raw", ""),  # a version
    ],
)
def test_an_architecture_that_systemd_does_not_know_is_told(drop: Path, filename: str, called: str) -> None:
    versions(drop / "web.raw.v", filename)
    said = [text for text in told(look(drop), "warning") if "architecture" in text]
    assert bool(said) is bool(called) and all(text.endswith(f"calls it {called}") for text in said)


def test_a_look_without_what_is_not_there_finds_and_watches_the_same(tmp_path: Path) -> None:
    """Services that differ in it alone share a look."""
    versions(tmp_path / "web.raw.v", "web_1.raw")
    (tmp_path / "is there").mkdir()
    (tmp_path / "is there/web.raw.v").symlink_to(tmp_path / "web.raw.v")
    (tmp_path / "a file").touch()
    (tmp_path / "nowhere").symlink_to("/nothing/there")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "circle").symlink_to("circle")
    names = (
        "is there",
        "not there",
        "deep/down/not there",
        "a file",
        "nowhere",
        "null",
        "circle",
        "a file/x",
    )
    declared = Declared(confext_dirs=tuple(str(tmp_path / name) for name in names))
    with StrictModes() as modes:
        present, absent = scan.present(declared, modes)
    whole, part = scan.look(declared), scan.look(present)
    assert len(present.confext_dirs) < len(names) - 2
    assert {*part.interests, *absent} == {*whole.interests}
    assert replace(part, interests=()) == replace(whole, interests=())
    other = replace(declared, confext_dirs=(*declared.confext_dirs, str(tmp_path / "another's")))
    with StrictModes() as modes:
        assert scan.present(other, modes)[0] == present
