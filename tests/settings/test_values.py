# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values mean what they mean to systemd (systemd.syntax(7), systemd.time(7), systemd.exec(5))."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.settings import values
from watcher.settings.syntax import Assignment


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("ON", True), ("1", True), ("t", True), ("no", False)]
)
def test_booleans(text: str, value: bool) -> None:
    assert values.boolean(text) is value


def test_a_setting_that_is_no_boolean_or_not_set_has_its_default() -> None:
    def assigned(value: str) -> Assignment:
        return Assignment("S", "A", value, "/f", 1)

    for default in (True, False):
        assert values.flag(None, default=default) is default
        assert values.flag(assigned("maybe"), default=default) is default
        assert values.flag(assigned("off"), default=default) is False


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
        ("infinity", values.INFINITY),
    ],
)
def test_time_spans(text: str, usec: int) -> None:
    assert values.time_span(text) == usec


@pytest.mark.parametrize(
    "text", ["", "x", "5x", "-5s", "5s x", "1.5.5", "5 s s", "9" * 30, "infinity s", "99999999y"]
)
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(ValueError, match="not a time span"):
        values.time_span(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("1.5G", 3 << 29), ("4096", 4096), ("10K", 10240), ("3B", 3), ("1 T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert values.size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64m", "64MB", "-1", "1e3", "infinity"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        values.size(text)


def test_numbers_and_their_bounds() -> None:
    assert values.number("7", 7) == 7
    for text in ("6", "-7", "", "7.0", "\N{ARABIC-INDIC DIGIT SEVEN}", "9" * 19):
        with pytest.raises(ValueError, match="not a number from 7 on"):
            values.number(text, 7)
    with pytest.raises(ValueError, match="not yes or no: maybe"):
        values.boolean("maybe")


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
    assert values.split(text) == words


@pytest.mark.parametrize("text", ["'a", '"a b', "a\\"])
def test_unclosed_quotes_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"a quote that is not closed|a backslash at the end"):
        values.split(text)


def images(value: str) -> tuple[list[tuple[str, str, bool]], list[str]]:
    told: list[str] = []
    return values.extension_images(value, complain=told.append), told


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
    assert values.extension_directories(value, complain=told.append) == [
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

    assert values.extension_images("-%h/%n.raw:%n", expand) == [("/root/x.service.raw", "%n", True)]
    assert values.extension_directories("-%h/%n", expand) == [("/root/x.service", True)]


@given(st.text("\\'\":/ax0u-. \udcff\n"))
def test_no_value_makes_it_fail(value: str) -> None:
    for path, _, _ in values.extension_images(value):
        assert path.startswith("/")
    for path, _ in values.extension_directories(value):
        assert path.startswith("/")


@pytest.mark.parametrize(
    ("path", "clean"), [("//srv//web/", "/srv/web"), ("/./a/../b", "/a/../b"), ("/", "/")]
)
def test_paths_are_simplified_as_systemd_does(path: str, clean: str) -> None:
    assert values.normalized(path) == clean
