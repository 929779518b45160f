# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file lies beside which image, by names; and what a look makes of that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from watcher.model import Declared, Kind, Look
from watcher.resolve import scan, sidecars, sources, vpick
from watcher.resolve.vpick import Dirent

SPEC = vpick.Spec("/srv/web.raw.v", "web", ".raw", Kind.IMAGE)


def look(tmp_path: Path, *names: str) -> Look:
    directory = tmp_path / "web.service.confext.d"
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return scan.look(Declared(confext_dirs=(str(directory),)), "x86-64")


def beside(found: Look) -> dict[str, tuple[str, ...]]:
    return {one.filename: one.sidecars for picks in found.picks for one in picks.candidates}


def told(found: Look, level: str = "warning") -> list[str]:
    return [f"{Path(one.path).name}: {one.text}" for one in found.remarks if one.level == level]


def test_the_names() -> None:
    assert sidecars.names("web_1.4.raw") == ("web_1.4.verity", "web_1.4.roothash", "web_1.4.roothash.p7s")
    assert [sidecars.image_of(name) for name in sidecars.names("web_1.4.raw")] == ["web_1.4.raw"] * 3
    for name in ("web_1.4.raw", "web.p7s", ".roothash", ".verity", "roothash", ""):
        assert (sidecars.suffix(name), sidecars.image_of(name), sidecars.meant(name)) == ("", "", "")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("web_1.4.raw.roothash", "web_1.4.roothash"),
        ("web.raw.roothash.p7s", "web.roothash.p7s"),
        ("web.raw.verity", "web.verity"),
        (".raw.verity", ""),
        ("web.rawverity", ""),
    ],
)
def test_a_name_that_systemd_never_looks_at(name: str, meant: str) -> None:
    assert sidecars.meant(name) == meant


def test_each_version_has_its_own(tmp_path: Path) -> None:
    names = ("web_1.raw", "web_2.raw", "web_2.roothash", "web_2.verity", "web_3.raw", "web_3.roothash.p7s")
    found = look(tmp_path, *(f"web.raw.v/{name}" for name in names))
    assert beside(found) == {
        "web_3.raw": ("web_3.roothash.p7s",),
        "web_2.raw": ("web_2.verity", "web_2.roothash"),
        "web_1.raw": (),
    }
    assert told(found) == []


def test_an_image_that_is_named_directly(tmp_path: Path) -> None:
    found = look(tmp_path, "web.raw", "web.verity", "web.roothash", "other.roothash", "x/etc/web.raw")
    assert beside(found) == {"web.raw": ("web.verity", "web.roothash"), "x": ()}
    assert told(found) == []


def test_what_is_declared_is_watched_with_what_may_come_beside_it(tmp_path: Path) -> None:
    entry = sources.entry(f"{tmp_path}/web.raw", Kind.IMAGE, optional=False, declared=True)
    found = scan.look(Declared(images=(entry,)), "x86-64")
    (pattern,) = [one.pattern for one in found.interests if one.path == str(tmp_path)]
    assert pattern is not None
    for name in ("web.raw", "web.verity", "web.roothash", "web.roothash.p7s"):
        assert re.fullmatch(pattern, name)
    assert not re.fullmatch(pattern, "webXverity")


@pytest.mark.parametrize("name", ["web.raw", "web.raw.v/web_1.raw"])
def test_what_a_link_beside_an_image_leads_to_is_watched(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    look(tmp_path, name)
    path = tmp_path / "web.service.confext.d" / name
    path.with_suffix(".verity").symlink_to("middle")
    path.with_name("middle").symlink_to(tmp_path / "elsewhere/tree")
    found = look(tmp_path, name)
    assert any(
        one.path == str(tmp_path / "elsewhere") and re.fullmatch(one.pattern or "", "tree")
        for one in found.interests
    )


def test_counters_do_not_count(tmp_path: Path) -> None:
    names = ("web_1+2-1.raw", "web_1.roothash", "web_1+3.verity", "web_2.raw", "web_2+3.roothash")
    found = look(tmp_path, *(f"web.raw.v/{name}" for name in names))
    assert beside(found) == {
        "web_2.raw": ("web_2+3.roothash",),
        "web_1+2-1.raw": ("web_1+3.verity", "web_1.roothash"),
    }


@pytest.mark.parametrize(
    ("there", "first"),
    [
        (("web_1+3.roothash", "web_1.roothash", "web_1+9.roothash"), "web_1+3.roothash"),
        (("web_1+9.roothash", "web_1.roothash"), "web_1.roothash"),
    ],
)
def test_the_same_counters_come_first_and_none_second(there: tuple[str, ...], first: str) -> None:
    dirents = [Dirent(name, "file") for name in ("web_1+3.raw", *there)]
    (candidate,) = vpick.pick(SPEC, dirents, "x86-64")
    assert candidate.sidecars == (first,)


def test_thousands_with_counters_cost_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """All services wait while names are sorted out."""
    asked = []
    suffix = sidecars.suffix
    monkeypatch.setattr(sidecars, "suffix", lambda name: asked.append(name) or suffix(name))
    names = [f"web_1+{tries}.{what}" for tries in range(1, 501) for what in ("raw", "verity", "roothash")]
    found = vpick.pick(SPEC, [Dirent(name, "file") for name in names])
    assert {one.filename: one.sidecars for one in found} == {
        f"web_1+{tries}.raw": (f"web_1+{tries}.verity", f"web_1+{tries}.roothash") for tries in range(1, 501)
    }
    assert len(asked) < 10 * len(names)


def test_a_wrong_name_is_pointed_out(tmp_path: Path) -> None:
    found = look(tmp_path, "web.raw.v/web_1.raw", "web.raw.v/web_1.raw.roothash", "app.raw", "app.raw.verity")
    assert told(found) == [
        "app.raw.verity: ignored: a file beside an image is called without .raw: app.verity",
        "web_1.raw.roothash: passed over: never looked at under that name: the root hash of an image is called"
        " web_1.roothash",
    ]
    assert beside(found) == {"app.raw": (), "web_1.raw": ()}


def test_what_has_no_image_yet_is_no_mistake(tmp_path: Path) -> None:
    found = look(tmp_path, "web.raw.v/web_1.raw", "web.raw.v/web_2.roothash", "web.raw.v/web_2.verity")
    assert told(found) == []
    assert told(found, "debug") == [
        "web_2.roothash: passed over: there is no web_2.raw",
        "web_2.verity: passed over: there is no web_2.raw",
    ]


def test_a_tree_has_none_and_its_slot_is_never_taken_for_one() -> None:
    trees = vpick.Spec("/srv/web.v", "web", "", Kind.DIRECTORY)
    dirents = [Dirent(name, "directory") for name in ("web_1", "web_1.roothash")]
    assert [one.sidecars for one in vpick.pick(trees, dirents, "x86-64")] == [(), ()]
    assert sources.slot_name("web.roothash", Kind.DIRECTORY) == "web_roothash"
    assert sources.slot_name("web.roothash", Kind.IMAGE) == "web.roothash.raw"


def test_a_slot_has_room_for_the_names_beside_it() -> None:
    slot = sources.slot_name("x" * 300, Kind.IMAGE)
    assert max(len(name) for name in (slot, *sidecars.names(slot))) == 255
