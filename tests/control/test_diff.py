# SPDX-License-Identifier: LGPL-2.1-or-later
"""`diff`: which stacks it compares (control/compared.py, control/compared_drop.py), hunks (control/text_diff.py),
and how people see it (cli/show_diff.py). On real services: tests/scenarios/test_diff.py."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.needs import tool
from watcher.cli import show_diff
from watcher.control import text_diff
from watcher.control.compared_drop import placed
from watcher.model import Kind, Layer, Stack, Trust
from watcher.records.schema import Failed, to_dict
from watcher.records.traces import Compared, Diff, Difference, Side, TracedLayer

LINES = st.lists(
    st.sampled_from((b"a", b"b", b"c", b"", b"-x", b"+++ y", b"@@", b"\xff\x1b[m", b"\r")), max_size=12
)


def texts() -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda lines, ends: b"\n".join(lines) + (b"\n" if ends and lines else b""), LINES, st.booleans()
    )


@tool("patch")
@pytest.mark.parametrize("few", [text_diff.FEW, -1], ids=["difflib", "diff"])
@settings(max_examples=60)
@given(before=texts() | st.none(), after=texts() | st.none())
def test_hunks_make_one_text_of_the_other(
    tmp_path_factory: pytest.TempPathFactory, few: int, before: bytes | None, after: bytes | None
) -> None:
    if before is None and after is None:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_diff, "FEW", few)
        hunks = text_diff.unified(before, after)
    assert hunks is not None
    assert bool(hunks) == ((before or b"") != (after or b""))
    if not hunks:
        return
    path = tmp_path_factory.mktemp("patch") / "file"
    path.write_bytes(before or b"")
    words = ["patch", "--quiet", "--unified", "--binary", "--posix", str(path)]
    subprocess.run(words, input=b"--- a\n+++ b\n" + hunks, check=True)
    assert (path.read_bytes() if path.exists() else b"") == (after or b"")


def test_hunks_that_take_too_long_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_diff, "SECONDS", 0.0)
    assert text_diff.unified(b"a\n" * 100_000, b"b\n" * 100_000) is None


def test_a_missing_diff_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(text_diff, "_ENVIRONMENT", {"PATH": str(tmp_path)})
    with pytest.raises(Failed, match="diffutils"):
        text_diff.unified(b"a\n" * 100, b"b\n" * 100)


def layer(slot: str, version: str = "1") -> Layer:
    kind = Kind.IMAGE if slot.endswith(".raw") else Kind.DIRECTORY
    name = slot.removesuffix(".raw")
    return Layer(slot, name, version, f"{name} {version}", kind, f"/srv/{slot}")


@pytest.mark.parametrize(
    ("stack", "new", "slots"),
    [
        ([], "web.raw", ["web.raw*"]),
        (["web.raw", "tree"], "web.raw", ["web.raw*", "tree"]),
        (["web.raw", "tree"], "app.raw", ["app.raw*", "web.raw", "tree"]),
        (["zz.raw", "web.raw", "tree"], "app.raw", ["zz.raw", "app.raw*", "web.raw", "tree"]),
        (["web.raw", "tree"], "xx.raw", ["web.raw", "xx.raw*", "tree"]),
        (["web.raw", "tree"], "web", ["web.raw", "tree", "web*"]),
        (["web.raw"], "a", ["web.raw", "a*"]),
    ],
)
def test_a_drop_takes_the_place_of_its_name_or_that_of_a_new_one(
    stack: list[str], new: str, slots: list[str]
) -> None:
    found = placed(Stack(tuple(map(layer, stack))), layer(new, "2"), {"zz.raw"})
    assert [one.slot + "*" * (one.version == "2") for one in found.layers] == slots


def test_a_drop_of_what_is_there_already_is_there_once() -> None:
    same = layer("web.raw")
    other = Layer("x", "x", "1", same.digest, Kind.IMAGE, "/x.raw")
    assert len(placed(Stack((same,)), other).layers) == 1


# --- how it is shown

WEB = TracedLayer("web", "1.4", "d" * 64, "image", "web.raw", "/srv/web_1.4.raw", Trust())
NASTY = "/etc/a\x1b[31m\n\udcff"


def side(type: str = "file", **more: object) -> Side:
    known: dict[str, object] = {
        "layer": WEB.digest, "mode": 0o644, "uid": 0, "gid": 0, "size": 3, "target": "", "device": 0, "sha256": "ab",
    }  # fmt: skip
    return Side(type, **(known | more))  # type: ignore[arg-type]


def difference(*files: Difference) -> Diff:
    none, new = Compared("none", "", ()), Compared("desired", "x" * 16, (WEB,))
    return Diff("web.service", bool(files), none, new, files)


def lines(*files: Difference, stat: bool = False, colour: bool = False) -> list[str]:
    return list(show_diff.diff(difference(*files), stat=stat, colour=colour))


TEXT = Difference(
    "/etc/t", "changed", side(layer=""), side(), diff="@@ -1 +1 @@\n-a\x1b[m\n+b\tc\n", added=1, removed=1
)
BINARY = Difference("/etc/b", "changed", side(sha256="12"), side(size=4, sha256="34"))


def test_nothing_differs() -> None:
    assert lines() == ["web.service: the host's /etc -> web 1.4 (what it should have now)", "no difference"]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (TEXT, ["--- /etc/t (the host's /etc)", "+++ /etc/t (web 1.4)", "@@ -1 +1 @@", "-a\\x1b[m", "+b\tc"]),
        (BINARY, ["/etc/b: 3 bytes, sha256 12 -> 4 bytes, sha256 34"]),
        (
            Difference("/etc/n", "added", None, side(), diff="@@ -0,0 +1 @@\n+x\n", added=1),
            ["/etc/n: added, file 0644 of 0:0", "--- /dev/null", "+++ /etc/n (web 1.4)", "@@ -0,0 +1 @@", "+x"],
        ),
        (
            Difference("/etc/d", "removed", side("directory", mode=0o750), None),
            ["/etc/d: removed, directory 0750 of 0:0"],
        ),
        (
            Difference("/etc/l", "changed", side("link", target="a"), side("link", target="b\n")),
            ["/etc/l: link to a -> b\\n"],
        ),
        (
            Difference("/etc/l", "changed", side("link", target="a"), side("device", device=os.makedev(1, 3))),
            ["/etc/l: a link to a -> device 0644 of 0:0 1:3"],
        ),
        (
            Difference("/etc/m", "changed", side(mode=0o4755, uid=1), side(), ("security.x",), note="not read"),
            ["/etc/m: mode 4755 -> 0644; owner 1:0 -> 0:0; extended attributes security.x; not read"],
        ),
        (Difference(NASTY, "added", None, side("FIFO")), ["/etc/a\\x1b[31m\\n\\xff: added, FIFO 0644 of 0:0"]),
    ],
)  # fmt: skip
def test_each_kind_of_difference_has_its_words(file: Difference, said: list[str]) -> None:
    assert lines(file)[1:] == said
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in lines(file, colour=True)[1:]]
    assert plain == said
    assert to_dict(difference(file))["files"][0]["path"].startswith("/etc/")


def test_statistics_are_one_line_for_each_file() -> None:
    long = Difference("/etc/long", "changed", side(), side(), diff="@@\n", added=1000, removed=1)
    assert lines(TEXT, BINARY, long, stat=True)[1:] == [
        " /etc/t    |    2 +-",
        " /etc/b    | 3 bytes, sha256 12 -> 4 bytes, sha256 34",
        f" /etc/long | 1001 {'+' * 20}-",
        " 3 paths differ, 1001 lines added, 2 removed",
    ]
