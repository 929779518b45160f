# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pick follows systemd.v(7); `test_oracle.py` holds it against `systemd-vpick` in thousands of cases.

Covers settings/architectures.py.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.model import Candidate, Kind
from watcher.resolve import version, vpick
from watcher.resolve.vpick import Dirent, NotPicked, Spec
from watcher.settings import architectures

IMAGES = Spec("/srv/web.raw.v", "web", ".raw", Kind.IMAGE)
TREES = Spec("/srv/web.v", "web", "", Kind.DIRECTORY)


def picked(*names: str, spec: Spec = IMAGES) -> list[str]:
    kind: vpick.Type = "file" if spec.kind is Kind.IMAGE else "directory"
    return [c.filename for c in vpick.pick(spec, [Dirent(name, kind) for name in names], "x86-64")]


@pytest.mark.parametrize(
    ("path", "kind", "spec"),
    [
        ("/srv/web.raw.v", Kind.IMAGE, IMAGES),
        ("/srv/web.raw.v/", Kind.IMAGE, IMAGES),
        ("/srv/web.v", Kind.IMAGE, Spec("/srv/web.v", "web", ".raw", Kind.IMAGE)),
        ("/srv/web.v", Kind.DIRECTORY, TREES),
        ("/srv/web.raw.v", Kind.DIRECTORY, Spec("/srv/web.raw.v", "web.raw", "", Kind.DIRECTORY)),
        ("/srv/x.v/web___.raw", Kind.IMAGE, Spec("/srv/x.v", "web", ".raw", Kind.IMAGE)),
        ("/srv/x.v/web___.img", Kind.IMAGE, Spec("/srv/x.v", "web", ".img", Kind.IMAGE)),
        ("/srv/x.v/web___", Kind.DIRECTORY, Spec("/srv/x.v", "web", "", Kind.DIRECTORY)),
        ("/srv/x.v/a___b____.raw", Kind.IMAGE, Spec("/srv/x.v", "a___b_", ".raw", Kind.IMAGE)),
        ("/srv/web.raw", Kind.IMAGE, None),
        ("/srv/x/web___.raw", Kind.IMAGE, None),
        ("/srv/x.v/web_1.raw", Kind.IMAGE, None),
        ("/web___.raw", Kind.IMAGE, None),
        ("/", Kind.DIRECTORY, None),
    ],
)
def test_what_a_path_asks_for(path: str, kind: Kind, spec: Spec | None) -> None:
    assert vpick.parse_path(path, kind) == spec


def test_newest_first() -> None:
    assert picked("web_1.9.raw", "web_1.10.raw", "web_1.10~rc1.raw") == [
        "web_1.10.raw",
        "web_1.10~rc1.raw",
        "web_1.9.raw",
    ]


def test_no_tries_left_comes_last_though_newest() -> None:
    assert picked("web_2+0-3.raw", "web_1.raw") == ["web_1.raw", "web_2+0-3.raw"]


def test_same_version_by_architecture_then_tries_then_name() -> None:
    names = ["web_1_foo.raw", "web_1.raw", "web_1_x86.raw", "web_1_x86-64+1-2.raw", "web_1_x86-64+1-1.raw"]
    assert picked(*names) == list(reversed(["web_1.raw", "web_1_foo.raw", *names[2:]]))


def test_what_was_sorted_out_before_is_not_taken_for_what_differs_a_little() -> None:
    names = [f"web_{number}_x86.raw" for number in range(50)]
    trees = [Dirent(name, "directory") for name in names]
    for _ in range(2):
        assert [
            c.version for c in vpick.pick(IMAGES, [Dirent(name, "file") for name in names], "x86-64")
        ] == [str(number) for number in reversed(range(50))]
        assert vpick.pick(IMAGES, [Dirent(name, "file") for name in names], "arm64") == ()
        assert vpick.pick(IMAGES, trees, "x86-64") == ()
        assert len(vpick.passed_over(IMAGES, trees, "x86-64")) == 50
        assert vpick.pick(IMAGES, [Dirent(names[7], "file")], "x86-64")[0].filename == names[7]


def test_threads_that_ask_at_once_for_the_same_have_it_sorted_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = threading.Barrier(4)
    sorted_by: list[str] = []
    key = version.key

    def slow_key(text: str) -> tuple[object, ...]:
        sorted_by.append(text)
        time.sleep(0.01)  # the others come here, too, if nothing holds them
        return key(text)

    def ask(number: int) -> tuple[Candidate, ...]:
        threads.wait()
        return vpick.pick(IMAGES, [Dirent(f"web_{part}.once.raw", "file") for part in range(4)], "x86-64")

    monkeypatch.setattr(version, "key", slow_key)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(ask, range(4))
    assert [candidate.version for candidate in first] == ["3.once", "2.once", "1.once", "0.once"]
    assert others == [first] * 3
    assert len(sorted_by) == 4


def test_another_hosts_architecture_is_passed_over() -> None:
    assert picked("web_2_arm64.raw", "web_1_x86-64.raw") == ["web_1_x86-64.raw"]
    dirents = [
        Dirent("web_2_arm64.raw", "file"),
        Dirent("web_1_arm.raw", "file"),
        Dirent("web_3_x86.raw", "file"),
    ]
    assert [c.version for c in vpick.pick(IMAGES, dirents, "arm64")] == ["2", "1"]


@pytest.mark.parametrize(
    "name",
    [
        ".web_1.4.raw.Xa81b",
        ".web_1.4.raw",
        "web_1.4.raw.part",
        "web_1.4.raw~",
        "web_1.4.raw.filepart",
        "web.raw",
        "web_.raw",
        "web_1 2.raw",
        "web_1\n2.raw",
        "web_\udcff.raw",
        "web_1:2.raw",
        "web_1.4.img",
        "webs_1.raw",
        "web_+3.raw",
        "web_1+09.raw",
        "web_1+99999999999.raw",
        "web_1+3-.raw",
        "",
    ],
)
def test_names_that_are_none_of_ours(name: str) -> None:
    assert picked(name) == []


@pytest.mark.parametrize(
    ("name", "version", "left", "done"),
    [
        ("web_1.4.raw", "1.4", None, None),
        ("web_1.4+3.raw", "1.4", 3, 0),
        ("web_1.4+3-12.raw", "1.4", 3, 12),
        ("web_1.4+010.raw", "1.4", 8, 0),
        ("web_1.4_x86-64+0-3.raw", "1.4", 0, 3),
        ("web_1.4+4294967295.raw", "1.4", None, None),
        ("web_1_2.raw", "1", None, None),
    ],
)
def test_what_a_name_says(name: str, version: str, left: int | None, done: int | None) -> None:
    (candidate,) = vpick.pick(IMAGES, [Dirent(name, "file")], "x86-64")
    assert (candidate.path, candidate.filename) == (f"/srv/web.raw.v/{name}", name)
    assert (candidate.name, candidate.version, candidate.kind) == ("web", version, Kind.IMAGE)
    assert (candidate.tries_left, candidate.tries_done) == (left, done)


@pytest.mark.parametrize("kind", ["directory", "other", "null", "missing"])
def test_a_wrong_type_is_passed_over_and_told(kind: vpick.Type) -> None:
    dirents = [Dirent("web_1.raw", "file"), Dirent("web_2.raw", kind)]
    assert [c.version for c in vpick.pick(IMAGES, dirents, "x86-64")] == ["1"]
    assert vpick.passed_over(IMAGES, dirents) == (NotPicked("web_2.raw", "not a regular file", "warning"),)


def test_a_dangling_link_is_told_with_its_reason() -> None:
    dirents = [Dirent("web_2.raw", "missing", link=True, problem="the link leads nowhere")]
    assert vpick.passed_over(IMAGES, dirents) == (
        NotPicked("web_2.raw", "the link leads nowhere", "warning"),
    )


@pytest.mark.parametrize(
    ("name", "reason", "level"),
    [
        (
            "web_1.4 final.raw",
            "not called web_VERSION.raw, with letters, digits and -.~^ for VERSION",
            "warning",
        ),
        ("web_1:4.raw", "not called web_VERSION.raw, with letters, digits and -.~^ for VERSION", "warning"),
        ("web_.raw", "not called web_VERSION.raw, with letters, digits and -.~^ for VERSION", "warning"),
        ("web_1.4.img", "not called web_VERSION.raw", "warning"),
        ("web.raw", "not called web_VERSION.raw", "warning"),
        ("README", "not called web_VERSION.raw", "debug"),
        ("web_1_arm64.raw", "made for arm64, and this host is x86-64", "info"),
    ],
)
def test_a_wrong_name_is_told(name: str, reason: str, level: str) -> None:
    assert vpick.passed_over(IMAGES, [Dirent(name, "file")], "x86-64") == (NotPicked(name, reason, level),)
    assert re.fullmatch(vpick.pattern(IMAGES), name)


def test_trees_are_directories_without_suffix() -> None:
    dirents = [Dirent("web_1", "directory"), Dirent("web_2", "file"), Dirent("web_3.raw", "directory")]
    assert [c.version for c in vpick.pick(TREES, dirents, "x86-64")] == ["3.raw", "1"]


def test_a_directory_called_v_alone_has_bare_versions() -> None:
    spec = vpick.parse_path("/srv/.raw.v", Kind.IMAGE)
    assert spec is not None
    assert picked("1.4.raw", "1.10.raw", "we b.raw", spec=spec) == ["1.10.raw", "1.4.raw"]


names = st.builds(
    "".join,
    st.lists(
        st.sampled_from(["web", "_", "1.4", "+", "3", "-", "x86-64", "arm64", ".raw", "~", "é", "\n"]),
        max_size=8,
    ),
)


@given(st.lists(names, unique=True, max_size=6), st.sampled_from([IMAGES, TREES]))
def test_whatever_can_be_picked_is_watched_for(found: list[str], spec: Spec) -> None:
    pattern = re.compile(vpick.pattern(spec))
    assert all(pattern.fullmatch(name) for name in picked(*found, spec=spec))


@pytest.mark.parametrize(
    "name", [".web_1.4.raw.Xa81b", "web_1.4.raw.part", "web_1.4.raw~", ".x", "web_1.4.raw.tmp"]
)
def test_what_grows_beside_is_not_watched_for(name: str) -> None:
    assert re.fullmatch(vpick.pattern(IMAGES), name) is None


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("web_1.4.raw", Kind.IMAGE, ("web", "1.4")),
        ("web_1.4_x86-64+3-1.raw", Kind.IMAGE, ("web", "1.4")),
        ("web.confext.raw", Kind.IMAGE, ("web", "")),
        ("web_2.confext.raw", Kind.IMAGE, ("web", "2")),
        ("web.raw", Kind.IMAGE, ("web", "")),
        ("web+3.raw", Kind.IMAGE, ("web", "")),
        ("tree_7", Kind.DIRECTORY, ("tree", "7")),
        ("tree.raw", Kind.DIRECTORY, ("tree.raw", "")),
    ],
)
def test_name_and_version_of_a_file_named_directly(name: str, kind: Kind, split: tuple[str, str]) -> None:
    assert vpick.split(name, kind) == split


@pytest.mark.parametrize(
    ("machine", "native", "secondary"),
    [
        ("x86_64", "x86-64", "x86"),
        ("i686", "x86", None),
        ("aarch64", "arm64", "arm"),
        ("armv7l", "arm", None),
        ("armv5teb", "arm-be", None),
        ("ppc64le", "ppc64-le", "ppc-le"),
        ("riscv64", "riscv64", None),
        ("s390x", "s390x", "s390"),
        ("quantum", "quantum", None),
    ],
)
def test_the_kernels_names_of_architectures(machine: str, native: str, secondary: str | None) -> None:
    assert architectures.native(machine) == native
    assert architectures.SECONDARY.get(native) == secondary
    assert native in architectures.NAMES or machine == "quantum"
