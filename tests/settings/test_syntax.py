# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit files are read as systemd reads them (systemd.syntax(7))."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.settings import syntax
from watcher.settings.syntax import Assignment


def assigned(text: str) -> list[tuple[str, str, str, int]]:
    parsed = syntax.parse(text, "/f")
    assert parsed.remarks == ()
    return [(a.section, a.key, a.value, a.line) for a in parsed.assignments]


def complained(text: str) -> list[str]:
    return [f"{r.path} {r.text}" for r in syntax.parse(text, "/f").remarks if r.level == "warning"]


def test_sections_keys_comments_and_blank_lines() -> None:
    text = "# c\n; c\n\n[Unit]\n A = b c \nB=\n  # c\n[Service]\r\nC=d=e\r\n"
    assert assigned(text) == [("Unit", "A", "b c", 5), ("Unit", "B", "", 6), ("Service", "C", "d=e", 9)]


def test_a_line_continues_after_a_backslash_and_over_comments() -> None:
    text = "[S]\nA=one \\\n# comment\n   two\\\n; comment \\\nthree\nB=x\\\\\nC=y\\"
    assert assigned(text) == [("S", "A", "one     two three", 2), ("S", "B", "x\\\\", 7), ("S", "C", "y", 8)]


def test_a_byte_order_mark_is_no_text() -> None:
    assert assigned("\ufeff[S]\nA=b") == [("S", "A", "b", 2)]


def test_what_is_wrong_is_told_with_its_line() -> None:
    text = "A=b\n[S]\nnonsense\n=c\nD=\udcff\nE=f\n[T\nG=h\n"
    assert complained(text) == [
        "/f:1 ignored: A= is outside of any section",
        "/f:3 ignored: not of the form KEY=VALUE: nonsense",
        "/f:4 ignored: not of the form KEY=VALUE: =c",
        r"/f:5 ignored: not valid UTF-8: D=\xff",
        "/f:7 ignored from here on: not a section header: [T",
    ]
    assert [a.key for a in syntax.parse(text, "/f").assignments] == ["E"]


@given(st.text("[]=\\#; \nA\udcff\0\r"))
def test_no_text_makes_it_fail(text: str) -> None:
    for remark in syntax.parse(text, "/f").remarks:
        assert remark.text.isprintable()


def test_a_list_grows_and_an_empty_assignment_resets_it() -> None:
    parsed = syntax.parse("[S]\nA=1\nA=2\nA=\nA=3\n[T]\nA=5\n[S]\nA=4\nB=6", "/f").assignments
    assert [a.value for a in syntax.assigned(parsed, "S", "A")] == ["3", "4"]
    assert syntax.assigned(parsed, "S", "C") == []


def test_of_one_value_the_last_counts() -> None:
    parsed = syntax.parse("[S]\nA=1\nA=2\nB=1\nB=\n", "/f").assignments
    assert syntax.last(parsed, "S", "A") == Assignment("S", "A", "2", "/f", 3)
    assert syntax.last(parsed, "S", "B") is None
    assert syntax.last(parsed, "S", "C") is None


def test_files_are_read_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"[S]\nA=1\n")
    (tmp_path / "b").write_bytes(b"B=2\n[S]\nA=\xff\nA=2\n")
    parsed = syntax.load([f"{tmp_path}/a", f"{tmp_path}/gone", f"{tmp_path}/b"])
    assert [(a.value, a.path) for a in parsed.assignments] == [("1", f"{tmp_path}/a"), ("2", f"{tmp_path}/b")]
    assert [r.path for r in parsed.remarks] == [f"{tmp_path}/b:1", f"{tmp_path}/b:3"]
    assert parsed.assignments[0].remark("x").path == f"{tmp_path}/a:2"


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.conf")
    with pytest.raises(OSError, match="not a regular file"):
        syntax.load([f"{tmp_path}/a.conf"])
    assert syntax.read("/dev/null") == b""


_PIECES = st.sampled_from(
    [
        *("Before", "After=", "=", "[Unit]", "[", "]", "x", " ", "\t", "\n", "\n", "\n", "\\", "#", ";"),
        *("\r", "\0", "\x0b", "\udcff", "\u00e9", "\ufeff", "\u2028"),
    ]
)


@given(st.lists(_PIECES, max_size=30).map("".join))
def test_a_quick_look_for_some_keys_finds_what_all_of_it_says_of_them(text: str) -> None:
    def of_interest(parsed: syntax.Parsed) -> list[tuple[str, str, str]]:
        return [(a.section, a.key, a.value) for a in parsed.assignments if a.key == "Before"]

    content = text.encode("utf-8", "surrogateescape")
    quick = syntax.parse_only(content, "/f", syntax.lines_of(["Before"]))
    whole = syntax.parse(content.decode("utf-8", "surrogateescape"), "/f")
    assert of_interest(quick) == of_interest(whole)
