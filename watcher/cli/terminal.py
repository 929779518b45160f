# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the standard output is: a terminal or a file, how wide, with colours or without, UTF-8 or not.

Words carry the meaning, a style only helps to find them. So there are bold, dim, red and green alone, which can be read
on a light and on a dark ground.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator

_STYLES = {"bold": "\x1b[1m", "dim": "\x1b[2m", "red": "\x1b[31m", "green": "\x1b[32m"}
_PLAIN = "\x1b[m"
_STYLE = re.compile("\x1b\\[[0-9]*m")

# A sign that textwrap takes for none between words, and that no text has: shown() escapes it.
_NO_BREAK = "\x00"

FILE_COLUMNS = 10_000
"""Only a terminal has a width that lines must fit; elsewhere a line stays one line."""


def is_terminal() -> bool:
    return sys.stdout.isatty()


def columns() -> int:
    return shutil.get_terminal_size().columns if is_terminal() else FILE_COLUMNS


def coloured() -> bool:
    """Whether colours are for the standard output (no-color.org)."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str) -> str:
    """Text in a style, where there are colours; "" is none."""
    return f"{_STYLES[style]}{text}{_PLAIN}" if style and text and coloured() else text


def plain(text: str) -> str:
    """Without styles."""
    return _STYLE.sub("", text)


def wrapped(text: str, indent: int, first: str = "") -> Iterator[str]:
    """Words folded to the width of the terminal. Never within a word, which may be a path to be copied.

    Args:
        indent: columns before each line.
        first: what stands before the first line, with styles, padded to `indent`.
    """
    lines = folded(text, max(columns() - indent, 20))
    yield (first + " " * max(indent - len(plain(first)), 0) + lines[0]).rstrip()
    yield from (" " * indent + line for line in lines[1:])


def folded(text: str, width: int, first: str = "", more: str = "") -> list[str]:
    """Lines of so many columns, at least one. Neither a word is cut nor a command in backticks: people copy these.

    Args:
        first, more: what the first line, and the others, begin with.
    """
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=more,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first]
    return [line.replace(_NO_BREAK, " ") for line in lines]


def is_utf8() -> bool:
    """Whether the locale has UTF-8. Python itself writes UTF-8 in the locale C, too (PEP 538 and 540).

    PEP 538 sets LC_CTYPE= where it did so: what the environment was before is in /proc/self/environ.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            before = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    except OSError:
        return True
    for name in (b"LC_ALL", b"LC_CTYPE", b"LANG"):
        if before.get(name):
            return bool(re.search(rb"utf-?8", before[name], re.IGNORECASE))
    return False


def prepare() -> None:
    """Have a terminal without UTF-8 get ASCII alone: other characters as escapes, such as \\xfc."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty() and not is_utf8():
            stream.reconfigure(encoding="ascii", errors="backslashreplace")  # type: ignore[union-attr]


def ago(usec: int | None) -> str:
    """How long ago a time is, microseconds since the epoch: "12 s ago", "3 min ago", "5 h ago", "2 days ago"."""
    return f"{lasting(usec)} ago" if usec else "-"


def lasting(since: int | None) -> str:
    """How long it is since then: "12 s", "3 min", "5 h", "2 days"."""
    seconds = max(time.time() - (since or 0) / 1_000_000, 0)
    for unit, size, most in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} days"
