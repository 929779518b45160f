# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit files are read as systemd reads them (systemd.syntax(7), systemd.time(7))."""

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
    assert [a.value for a in syntax.values(parsed, "S", "A")] == ["3", "4"]
    assert syntax.values(parsed, "S", "C") == []


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


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("ON", True), ("1", True), ("t", True), ("no", False)]
)
def test_booleans(text: str, value: bool) -> None:
    assert syntax.boolean(text) is value


@pytest.mark.parametrize(
    ("text", "usec"),
    [
        ("5s", 5_000_000),
        ("100ms", 100_000),
        ("0", 0),
        ("7", 7_000_000),
        ("1.5", 1_500_000),
        ("1min 30s", 90_000_000),
        ("1h30min", 5_400_000_000),
        (" 2 days 3us ", 172_800_000_003),
        ("1M", 2_629_800_000_000),
        ("20µs", 20),
        ("infinity", syntax.INFINITY),
    ],
)
def test_time_spans(text: str, usec: int) -> None:
    assert syntax.time_span(text) == usec


@pytest.mark.parametrize(
    "text", ["", "x", "5x", "-5s", "5s x", "1.5.5", "5 s s", "9" * 30, "infinity s", "99999999y"]
)
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(ValueError, match="not a time span"):
        syntax.time_span(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("1.5G", 3 << 29), ("4096", 4096), ("10K", 10240), ("3B", 3), ("1 T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert syntax.size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64m", "64MB", "-1", "1e3", "infinity"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        syntax.size(text)


def test_numbers_and_their_bounds() -> None:
    assert syntax.number("7", 7) == 7
    for text in ("6", "-7", "", "7.0", "\N{ARABIC-INDIC DIGIT SEVEN}", "9" * 19):
        with pytest.raises(ValueError, match="not a number from 7 on"):
            syntax.number(text, 7)
    with pytest.raises(ValueError, match="not yes or no: maybe"):
        syntax.boolean("maybe")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a  b\tc ", ["a", "b", "c"]),
        ("'a b' \"c d\"e", ["a b", "c de"]),
        ("a\\ b \\'c", ["a b", "'c"]),
        ("''", [""]),
        ("'a\"b'", ['a"b']),
        ('"a\\"b"', ['a"b']),
    ],
)
def test_words_and_quotes(text: str, words: list[str]) -> None:
    assert syntax.split(text) == words


@pytest.mark.parametrize("text", ["'a", '"a b', "a\\"])
def test_unclosed_quotes_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"a quote that is not closed|a backslash at the end"):
        syntax.split(text)


def images(value: str) -> tuple[list[tuple[str, str, bool]], list[str]]:
    told: list[str] = []
    return syntax.extension_images(value, complain=told.append), told


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("/a.raw", [("/a.raw", "", False)]),
        ("-/a.raw /b.raw.v/", [("/a.raw", "", True), ("/b.raw.v", "", False)]),
        ("/a.raw:ro,nosuid", [("/a.raw", "ro,nosuid", False)]),
        ("-/a.raw:root:ro:usr:nodev", [("/a.raw", "root:ro:usr:nodev", True)]),
        ("/with\\:colon.raw:ro", [("/with:colon.raw", "ro", False)]),
        ('"/with space.raw:ro" /b.raw', [("/with space.raw", "ro", False), ("/b.raw", "", False)]),
        ("/with\\x20space.raw", [("/with space.raw", "", False)]),
        ("/\\xc3\\xa9.raw", [("/é.raw", "", False)]),
        ("/\\101.raw", [("/A.raw", "", False)]),
        (":/a.raw", [("/a.raw", "", False)]),
        ("/../..//a.raw /..", [("/a.raw", "", False), ("/", "", False)]),
        ("/\\u00e9.raw", [("/é.raw", "", False)]),
        ("/srv//./x.v/web___.raw", [("/srv/x.v/web___.raw", "", False)]),
        ("/a.raw:opt\\:with", [("/a.raw", "opt\\:with", False)]),
    ],
)
def test_extension_images(value: str, found: list[tuple[str, str, bool]]) -> None:
    assert images(value) == (found, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a.raw", "not an absolute path: a.raw"),
        ("/a/../b.raw", "a path with .. in it: /a/../b.raw"),
        ("/\\q", "an unknown escape: /\\\\q"),
        ("/\\x00", "an escape that stands for no character"),
        ("/a\\", "a backslash at the end: /a\\\\"),
        ("/\\xff", "a path that is not valid UTF-8: /\\xff"),
    ],
)
def test_a_bad_image_is_told_and_the_others_count(value: str, reason: str) -> None:
    assert images(f"/x.raw {value} /y.raw") == ([("/x.raw", "", False), ("/y.raw", "", False)], [reason])


def test_words_before_an_unclosed_quote_count() -> None:
    assert images("/b.raw '/a.raw") == (
        [("/b.raw", "", False)],
        ["a quote that is not closed: /b.raw '/a.raw"],
    )


def test_extension_directories() -> None:
    told: list[str] = []
    value = '/a -/b.v/ +/c -+/d "/e f" /g\\ h:i relative'
    assert syntax.extension_directories(value, complain=told.append) == [
        ("/a", False),
        ("/b.v", True),
        ("/c", False),
        ("/d", True),
        ("/e f", False),
        ("/g h:i", False),
    ]
    assert told == ["not an absolute path: relative"]


def test_specifiers_are_expanded_before_a_path_is_judged() -> None:
    def expand(text: str) -> str:
        return text.replace("%n", "x.service").replace("%h", "/root")

    assert syntax.extension_images("-%h/%n.raw:%n", expand) == [("/root/x.service.raw", "%n", True)]
    assert syntax.extension_directories("-%h/%n", expand) == [("/root/x.service", True)]


@given(st.text("\\'\":/ax0u-. \udcff\n"))
def test_no_value_makes_it_fail(value: str) -> None:
    for path, _, _ in syntax.extension_images(value):
        assert path.startswith("/")
    for path, _ in syntax.extension_directories(value):
        assert path.startswith("/")


@pytest.mark.parametrize(
    ("path", "clean"), [("//srv//web/", "/srv/web"), ("/./a/../b", "/a/../b"), ("/", "/")]
)
def test_paths_are_simplified_as_systemd_does(path: str, clean: str) -> None:
    assert syntax.normalized(path) == clean


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
