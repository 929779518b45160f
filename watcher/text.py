# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words for people: how any text is shown on one line. And `Kind`, the one part of the model that the generator needs.

`watcher.model` imports `dataclasses`, which takes longer than the start of Python. The generator runs at each boot,
while systemd waits: it imports this module, and the model only if it must.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable

_ASKED_MAX = 255
"""Characters: of a unit's name (systemd.unit(5)) as of a file's (NAME_MAX)."""
_TELLING_MAX = 300
"""Characters of a line of a command's output, which become part of a line of ours."""
# How serious a line is, by its first such word: nginx has "[emerg]", haproxy "[WARNING]", Python "ValueError:".
_SAID = r"""(?xi) (?<![\w/-]) (?:
    (?P<wrong> \w*error | \w*exception | fatal | emerg | alert | crit | critical | panic | failed ) (?=[]:,"|]) |
    (?: warn | warning | notice | info | debug ) (?=[]:,"|]) | deprecated\b )"""
# A line of a file: "/etc/web.conf:3", "/etc/web.conf(3)", "/etc/web.conf line 3", "line 3 of /etc/web.conf". What is
# further to the right is in the stack of a program.
_PLACE = r"""(?xi) ^(?!\s) (?:
    (?:.*[\s"'([])? /[^\s:(]++ (?: :\d+(?!\w) | \(\d+\) | .*\bline\ \d ) | .*\bline\ \d+\ (?:of|in)\ /)"""


class Kind(enum.Enum):
    """What an entry is, with systemd's words: `ExtensionImages=` or `ExtensionDirectories=`."""

    IMAGE = "image"
    DIRECTORY = "directory"


def shown(text: str) -> str:
    """Text on one line, printable and unambiguous: control characters, surrogates and backslashes become escapes."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join("\\\\" if char == "\\" else _escape(char) for char in text)


def printable(text: str, keep: str = "") -> str:
    """A sentence on one line, printable; the escapes that `shown()` made of its parts stay as they are.

    Args:
        keep: control characters that may stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep else _escape(char) for char in text)


def problem(error: Exception) -> str:
    """An error in words; an OSError with its file first: "/var/lib/x: No space left on device"."""
    if not isinstance(error, OSError):
        return str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return f"{shown(name)}: {error.strerror or error}" if name else error.strerror or str(error)


def telling(output: str) -> str:
    """The line of a command's output that says best what was wrong, as `shown()` has it; "" where there is none.

    The first one that names an error ("[emerg]", "Fatal:") or a line of a file, and is no warning: what follows mostly
    comes of that, or sums it up. Where no line does, the last one. One that ends with a colon has the next behind it.
    """
    import re  # only where a command has failed: the generator imports this module

    lines = [line[:_TELLING_MAX] for line in output.splitlines() if line.strip()]
    chosen = len(lines) - 1
    for number, line in enumerate(lines):
        found = re.search(_SAID, line)
        if found["wrong"] if found else re.search(_PLACE, line):
            chosen = number
            break
    with_next = lines and lines[chosen].rstrip().endswith(":")
    said = " ".join(line.strip() for line in lines[chosen : chosen + (2 if with_next else 1)])
    return shown(said[:_TELLING_MAX])


def reason_in(output: str) -> str:
    """What of a command's output says what is wrong, to be put behind a sentence: " (LINE)", or ""."""
    line = telling(output)
    return f" ({line})" if line else ""


def nearest(asked: str, names: Iterable[str]) -> str:
    """The name that was probably meant where none is called as asked; "" if none is like it.

    `.service` does not count: people leave it out.
    """
    import difflib  # only where a name was mistyped: the generator imports this module

    if len(asked) > _ASKED_MAX:  # comparing takes the square of that
        return ""
    known = {name.removesuffix(".service"): name for name in names}
    found = difflib.get_close_matches(asked.removesuffix(".service"), known, n=1)
    return known[found[0]] if found else ""


def _escape(char: str) -> str:
    if char.isprintable():
        return char
    if 0xDC80 <= ord(char) <= 0xDCFF:
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
