# SPDX-License-Identifier: LGPL-2.1-or-later
"""The syntax of os-release(5) and of extension-release files: `KEY=value` with the quotes of a shell."""

from __future__ import annotations

import re

_LINE_END = re.compile(r"[\r\n]")
_KEY = re.compile(r"[ \t]*([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
_PIECE = re.compile(
    r"""
    "(?P<double>(?:[^"\\]|\\.)*)"
    | '(?P<single>[^']*)'
    | \\(?P<escaped>.)
    | (?P<plain>[^\\\r\n]+?)(?=["']|\\|[\r\n]|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_os_release(text: str) -> dict[str, str]:
    """Keys and values of an os-release or extension-release file.

    As in systemd, lines that assign nothing are skipped, and the last of several assignments to a key counts.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        assignment = _KEY.match(text, at)
        if assignment:
            found[assignment[1]], at = _value(text, assignment.end())
        end = _LINE_END.search(text, at)
        at = end.end() if end else len(text)
    return found


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where it ends."""
    value = ""
    while at < len(text) and text[at] not in "\r\n":
        piece = _PIECE.match(text, at)
        if piece is None:  # a backslash at the very end
            return value + text[at:], len(text)
        kind, content = piece.lastgroup, piece[piece.lastgroup or 0]
        at = piece.end()
        if kind == "double":
            content = re.sub(r"""\\(?:(["\\`$])|\n)""", lambda match: match[1] or "", content)
        elif kind == "escaped" and content in "\r\n":
            content = ""
        elif kind == "plain" and text[at : at + 1] in ("", "\r", "\n"):
            content = content.rstrip()
        value += content
    return value, at
