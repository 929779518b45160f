# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values that systemd's settings have: booleans, time spans, sizes, words with quotes, paths of extensions.

Rules: systemd.syntax(7), systemd.time(7), and systemd.exec(5) for `ExtensionImages=` and `ExtensionDirectories=`.
Standard library only, for the generator.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from watcher.settings.syntax import Assignment
from watcher.text import shown

INFINITY = (1 << 64) - 1
"""What "infinity" is as a time span, in microseconds (systemd's USEC_INFINITY)."""

_WHITE = " \t\n\r"
_UNITS = {
    1: "us usec µs μs",
    1000: "ms msec",
    1_000_000: "s sec second seconds",
    60_000_000: "m min minute minutes",
    3600_000_000: "h hr hour hours",
    86400_000_000: "d day days",
    604800_000_000: "w week weeks",
    2629800_000_000: "M month months",
    31557600_000_000: "y year years",
}
_USEC = {"": 1_000_000, **{unit: usec for usec, units in _UNITS.items() for unit in units.split()}}
_SIZES = {"": 1, "B": 1, **{unit: 1024**power for power, unit in enumerate("KMGTPE", 1)}}
_TRUE = frozenset({"1", "yes", "y", "true", "t", "on"})
_FALSE = frozenset({"0", "no", "n", "false", "f", "off"})
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "s": " "}
_CODES = {"x": (2, 16), "u": (4, 16), "U": (8, 16)}


def boolean(text: str) -> bool:
    """Raises ValueError: not one of yes, no, true, false, on, off, 1, 0 and their first letters."""
    lowered = text.lower()
    if lowered in _TRUE or lowered in _FALSE:
        return lowered in _TRUE
    raise ValueError(f"not yes or no: {shown(text)}")


def flag(assignment: Assignment | None, *, default: bool) -> bool:
    """The boolean that was assigned; `default` if there is no assignment, or a value that systemd would ignore."""
    try:
        return boolean(assignment.value) if assignment else default
    except ValueError:
        return default


def time_span(text: str) -> int:
    """Microseconds of "5s", "1min 30s", "100ms", "1.5" (a bare number is seconds) or "infinity" (systemd.time(7)).

    Raises:
        ValueError: not a time span.
    """
    if text.strip(_WHITE) == "infinity":
        return INFINITY
    return _sum(text, r"[A-Za-zµμ]*", _USEC, "time span, such as 5s or 1min 30s")


def size(text: str) -> int:
    """Bytes of "64M", "1.5G" or "4096"; to the base of 1024.

    Raises:
        ValueError: not a size.
    """
    return _sum(text, r"[A-Za-z]*", _SIZES, "size, such as 64M or 1G")


def number(text: str, least: int = 0) -> int:
    """Raises ValueError: not a decimal number, or below `least`."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(f"not a number from {least} on: {shown(text)}")
    return int(text)


def split(
    text: str, separators: str = _WHITE, *, keep_escapes: bool = False, escapes: bool = False
) -> list[str]:
    """Words with quotes, as systemd's `extract_first_word()` takes them apart.

    Args:
        keep_escapes: a backslash is a character like others, so that a second split can see it.
        escapes: resolve C's escapes ("\\x20", "\\t"); without it a backslash only protects the next character. Before a
            separator it always does.

    Raises:
        ValueError: a quote that is not closed, a backslash at the end, an unknown escape.
    """
    return list(_split(text, separators, keep_escapes, escapes))


def extension_images(
    value: str,
    expand: Callable[[str], str] = lambda text: text,
    complain: Callable[[str], None] = lambda text: None,
) -> list[tuple[str, str, bool]]:
    """The images in one value of `ExtensionImages=` (systemd.exec(5)): `[-]PATH[:OPTIONS] ...`.

    Args:
        expand: replaces specifiers; may raise ValueError.
        complain: is told, one line each, what is left out.

    Returns:
        (path without superfluous slashes, options as written, optional).
    """
    images = []
    for word in _words(value, complain, keep_escapes=True):
        try:
            source, options = _cut(word)
            path = "".join(split(source, "", escapes=True))
            # Bytes that were escaped one by one may be one character together.
            path = os.fsdecode(os.fsencode(path))
            images.append((_path(path.removeprefix("-"), expand), options, path.startswith("-")))
        except ValueError as error:
            complain(str(error))
    return images


def extension_directories(
    value: str,
    expand: Callable[[str], str] = lambda text: text,
    complain: Callable[[str], None] = lambda text: None,
) -> list[tuple[str, bool]]:
    """The directories in one value of `ExtensionDirectories=`: `[-][+]PATH ...`, as (path, optional).

    The `+` (relative to the unit's own root directory) is left out: the caller knows of `RootDirectory=`.
    """
    directories = []
    for word in _words(value, complain):
        try:
            path = word.removeprefix("-").removeprefix("+")
            directories.append((_path(path, expand), word.startswith("-")))
        except ValueError as error:
            complain(str(error))
    return directories


def normalized(path: str) -> str:
    """A path without doubled and trailing slashes and "." components, as systemd simplifies it; ".." stays."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _sum(text: str, unit: str, factors: dict[str, int], what: str) -> int:
    """Numbers with units, added up."""
    error = ValueError(f"not a {what}: {shown(text)}")
    total, at, end = 0, 0, len(text.rstrip(_WHITE))
    part = re.compile(rf"\s*([0-9]{{1,18}})(?![0-9])(?:\.([0-9]{{0,9}}))?\s*({unit})", re.ASCII)
    while at < end:
        match = part.match(text, at)
        if match is None or match[3] not in factors:
            raise error
        fraction = match[2] or "0"
        factor = factors[match[3]]
        total += int(match[1]) * factor + int(fraction) * factor // 10 ** len(fraction)
        at = match.end()
    if not end or total >= INFINITY:
        raise error
    return total


def _split(text: str, separators: str, keep_escapes: bool, escapes: bool) -> Iterator[str]:
    word: list[str] | None = None
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char == "\\" and not keep_escapes:
            if at == len(text):
                raise ValueError(f"a backslash at the end: {shown(text)}")
            char, at = _escape(text, at, separators, escapes)
        elif quote and char == quote:
            quote = ""
            continue
        elif not quote and char in "\"'" and not escapes:
            word, quote = word or [], char
            continue
        elif not quote and char in separators:
            if word is not None:
                yield "".join(word)
            word = None
            continue
        if word is None:
            word = []
        word.append(char)
    if quote:
        raise ValueError(f"a quote that is not closed: {shown(text)}")
    if word is not None:
        yield "".join(word)


def _escape(text: str, at: int, separators: str, resolve: bool) -> tuple[str, int]:
    """The character that is escaped at `at`, after the backslash, and where the escape ends."""
    char = text[at]
    if not resolve or char in separators or char in "\\\"':":
        return char, at + 1
    if char in _ESCAPES:
        return _ESCAPES[char], at + 1
    digits, base = _CODES.get(char, (3, 8))
    start = at + 1 if char in _CODES else at
    code = text[start : start + digits]
    if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}" if base == 16 else rf"[0-7]{{{digits}}}", code):
        raise ValueError(f"an unknown escape: {shown(text)}")
    return _character(int(code, base), single=digits < 4), start + digits


def _character(code: int, *, single: bool) -> str:
    """A code point, or a single byte as `os.fsdecode()` decodes it."""
    if code == 0 or code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ValueError("an escape that stands for no character")
    return chr(code) if not single or code < 0x80 else bytes([code & 0xFF]).decode("utf-8", "surrogateescape")


def _cut(word: str) -> tuple[str, str]:
    """PATH and OPTIONS of a word: they are parted at the first colon without a backslash."""
    match = re.fullmatch(r":*((?:\\.|[^\\:])*)(?::+(.*))?", word, re.DOTALL)
    if match is None:
        raise ValueError(f"a backslash at the end: {shown(word)}")
    return match[1], match[2] or ""


def _words(value: str, complain: Callable[[str], None], *, keep_escapes: bool = False) -> Iterator[str]:
    """The words before the first error."""
    try:
        yield from _split(value, _WHITE, keep_escapes, False)
    except ValueError as error:
        complain(str(error))


def _path(path: str, expand: Callable[[str], str]) -> str:
    """A path as systemd accepts it: absolute, simplified, UTF-8; ".." only at its begin, where it changes nothing."""
    path = expand(path)
    if not path.startswith("/"):
        raise ValueError(f"not an absolute path: {shown(path)}")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in path):
        raise ValueError(f"a path that is not valid UTF-8: {shown(path)}")
    path = normalized(path)
    while path.startswith("/../") or path == "/..":
        path = normalized(path[3:])
    if ".." in path.split("/"):
        raise ValueError(f"a path with .. in it: {shown(path)}")
    return path
