# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be seen: contents whose every file says whose it is. Standard library only; the reader uses it too."""

from __future__ import annotations

LETTERS = "ABCD"
SECRET = "S"
"""What root keeps for himself, as whole as the others."""
FILES = ("one", "two", "three")
_BYTES = 40_000


def content(letter: str, file: str) -> bytes:
    line = f"{letter} {file}\n".encode()
    return line * (_BYTES // len(line))


def violation(found: dict[str, bytes]) -> str:
    """What is wrong with what lies in one directory, "" if it is one of the contents as a whole, or empty."""
    if not found:
        return ""
    letters = {bytes(text[:1]).decode("ascii", "replace") for text in found.values()}
    if SECRET in letters:
        return "what only root may read"
    if set(found) != set(FILES):
        return f"not the files of any content: {sorted(found)}"
    if len(letters) > 1:
        return f"files of several contents: {sorted(letters)}"
    (letter,) = letters
    wrong = [file for file, text in found.items() if text != content(letter, file)]
    if letter not in LETTERS or wrong:
        return f"not the content of {letter!r}: {wrong}"
    return ""
