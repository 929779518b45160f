# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entries: which names count, which directory wins, in which order the layers lie."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.model import Declared, Entry, Kind
from watcher.resolve import sources
from watcher.resolve.sources import Listing
from watcher.resolve.vpick import Dirent

NOTHING = Declared()


def listing(path: str, **types: str) -> Listing:
    return Listing(path, tuple(Dirent(name, kind) for name, kind in types.items()))  # type: ignore[arg-type]


def entries(*listings: Listing, declared: Declared = NOTHING) -> tuple[Entry, ...]:
    return sources.resolve(declared, listings).entries


def only_remark(found: Listing) -> tuple[str, str]:
    resolved = sources.resolve(NOTHING, [found])
    assert resolved.entries == ()
    (remark,) = resolved.remarks
    return remark.level, remark.text


def test_the_four_forms() -> None:
    found = listing("/c", **{"a.raw": "file", "b": "directory", "c.raw.v": "directory", "d.v": "directory"})
    assert [(e.slot, e.path, e.kind) for e in entries(found)] == [
        ("a.raw", "/c/a.raw", Kind.IMAGE),
        ("c.raw", "/c/c.raw.v", Kind.IMAGE),
        ("b", "/c/b", Kind.DIRECTORY),
        ("d", "/c/d.v", Kind.DIRECTORY),
    ]
    assert all(e.optional and not e.declared for e in entries(found))


def test_images_below_directories_and_declared_below_dropped() -> None:
    declared = sources.declare(
        [("/srv/z.raw", "", False), ("/srv/a.raw.v", "ro", True)], [("/srv/zz", False), ("/srv/aa.v", True)]
    )
    found = listing("/c", **{"b": "directory", "a": "directory", "m.raw": "file", "10-x.raw": "block"})
    stack = entries(found, declared=declared)
    assert [e.path for e in stack] == [
        "/srv/z.raw",
        "/srv/a.raw.v",
        "/c/10-x.raw",
        "/c/m.raw",
        "/srv/zz",
        "/srv/aa.v",
        "/c/a",
        "/c/b",
    ]
    assert [(e.optional, e.options) for e in stack[:2]] == [(False, ""), (True, "ro")]


def test_order_is_by_name_and_not_by_suffix() -> None:
    found = listing("/c", **{"10-a-b.raw": "file", "10-a.raw": "file", "10-a.raw.v": "directory"})
    assert [e.path for e in entries(found)] == ["/c/10-a.raw", "/c/10-a.raw.v", "/c/10-a-b.raw"]


def test_a_name_in_an_earlier_directory_wins() -> None:
    first, second = (
        listing("/etc/c", **{"web.raw": "file"}),
        listing("/usr/c", **{"web.raw": "file", "b": "directory"}),
    )
    assert [e.path for e in entries(first, second)] == ["/etc/c/web.raw", "/usr/c/b"]


def test_a_link_to_dev_null_masks() -> None:
    first, second = (
        listing("/etc/c", **{"web.raw": "null"}),
        listing("/usr/c", **{"web.raw": "file", "b": "directory"}),
    )
    assert [e.path for e in entries(first, second)] == ["/usr/c/b"]


def test_a_link_without_its_target_yet_is_an_entry_still() -> None:
    found = listing("/c", **{"web.raw": "missing", "web.raw.v": "missing", "web.v": "missing"})
    assert len(entries(found)) == 3


def test_an_entry_out_of_reach_is_an_entry_still() -> None:
    found = Listing("/c", (Dirent("web.raw", "other", link=True, problem="Permission denied"),))
    assert [e.path for e in entries(found)] == ["/c/web.raw"]


@pytest.mark.parametrize(
    ("name", "kind", "level"),
    [
        ("web.raw", "directory", "warning"),
        ("web.raw", "other", "warning"),
        ("web.raw.v", "file", "warning"),
        ("web.v", "file", "warning"),
        ("web", "missing", "warning"),
        ("web", "file", "debug"),
        ("web", "other", "debug"),
        ("README", "file", "debug"),
        (".web_1.4.raw.Xa81b", "file", "debug"),
        (".git", "directory", "debug"),
        (".raw", "file", "debug"),
        ("web.raw~", "file", "debug"),
        ("web.raw.part", "file", "debug"),
        ("tree~", "directory", "debug"),
        ("tree.dpkg-new", "directory", "debug"),
        ("lost+found", "directory", "debug"),
    ],
)
def test_anything_else_is_ignored_with_one_remark(name: str, kind: str, level: str) -> None:
    said, text = only_remark(listing("/c", **{name: kind}))
    assert said == level
    assert text.startswith("ignored: ")


def test_what_is_ignored_hides_nothing() -> None:
    first, second = listing("/etc/c", **{"web.raw": "directory"}), listing("/usr/c", **{"web.raw": "file"})
    assert [e.path for e in entries(first, second)] == ["/usr/c/web.raw"]


def test_slots_are_unique_and_the_lowest_keeps_its_name() -> None:
    declared = sources.declare([("/a/web.raw", "", False), ("/b/web_2.raw", "", False)], [("/a/web", False)])
    found = listing(
        "/c", **{"web.raw": "file", "web.v": "directory", "web~2": "directory", "stack.json": "directory"}
    )
    assert [e.slot for e in entries(found, declared=declared)] == [
        "web.raw",
        "web~2.raw",
        "web~3.raw",
        "web",
        "stack.json~2",
        "web~2",
        "web~2~2",
    ]


@pytest.mark.parametrize(
    ("path", "kind", "slot"),
    [
        ("/srv/web.raw.v", Kind.IMAGE, "web.raw"),
        ("/srv/web_1.4+3.raw", Kind.IMAGE, "web.raw"),
        ("/srv//x.v/./web___.raw/", Kind.IMAGE, "web.raw"),
        ("/srv/web.confext.raw", Kind.IMAGE, "web.raw"),
        ("/srv/tree", Kind.DIRECTORY, "tree"),
        ("/srv/tree.v.v", Kind.DIRECTORY, "tree_v"),
        ('/srv/100% "it\'s":\n', Kind.DIRECTORY, "100___it_s___"),
        ("/srv/.hidden", Kind.DIRECTORY, "_hidden"),
        ("/", Kind.DIRECTORY, "_"),
    ],
)
def test_the_slot_of_a_declared_path(path: str, kind: Kind, slot: str) -> None:
    found = sources.entry(path, kind, optional=False, declared=True)
    assert found.slot == slot.replace("___", "__-")


odd = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]) | st.just("\udcff"), min_size=1
)


@given(st.lists(odd, unique=True), st.sampled_from(["file", "directory", "missing", "other", "null"]))
def test_any_name_gives_safe_distinct_slots(names: list[str], kind: str) -> None:
    found = entries(listing("/c", **dict.fromkeys(names, kind) | {f"{name}.raw": kind for name in names}))
    slots = [e.slot for e in found]
    assert len(set(slots)) == len(slots)
    for slot in slots:
        assert re.fullmatch(r"[A-Za-z0-9_@~-][A-Za-z0-9._@~-]*", slot)
        assert len(os.fsencode(slot)) <= 255
        assert not slot.endswith(".v") and "___" not in slot


def test_a_long_name_leaves_room_for_its_number() -> None:
    stem = "a" * 251
    found = entries(
        listing("/a", **{f"{stem}.raw": "file", f"{stem[:-2]}é.raw": "file", f"{stem}.raw.v": "directory"})
    )
    assert [len(e.slot) for e in found] == [246, 246, 246]  # with what may lie beside them: 255
