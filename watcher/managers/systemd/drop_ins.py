# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only place where lines of unit files are made.

systemd runs as root what a unit file says, and strangers choose names that we write into one: those of files and
directories. So no other module joins strings to a line. A setting is given its words. Each word is made by the function
below that knows how systemd takes this kind of setting apart, and `DropIn.assign()` refuses what no line can hold. It
writes exactly one assignment of exactly these words, or nothing.

Rules: systemd.syntax(7); config_parse() and utf8_is_valid() for lines; config_parse_extension_images(),
config_parse_namespace_path_strv() and config_parse_bind_paths() for words; 257 and 262 were asked (tests/beds).

Standard library only, for the generator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from watcher.text import shown

_KEY = re.compile(r"[A-Za-z]+")
_TOKEN = re.compile(r"[A-Za-z0-9/_.@-]+")
_PLAIN = re.compile(r"[A-Za-z0-9/._@~+=,-]+")  # these mean themselves in a path, for each kind of setting
# No white space, no quotes, and after a backslash always a character.
_OPTIONS = re.compile(r"(?:[!#$&(-\[\]-~]|\\[!-~])*")
_PATH_MAX = 4096


class Unwritable(ValueError):
    """A unit file cannot hold this: `str()` says what, and why."""


class Word(str):
    """A word of a setting's value, as it stands in the file. Only the functions below make one."""

    __slots__ = ()


class DropIn:
    """The text of a drop-in, assignment by assignment.

    Args:
        comment: its first line.
    """

    def __init__(self, comment: str) -> None:
        self._lines = [f"# {shown(comment)}"]
        self._section = ""

    def assign(self, section: str, key: str, *words: Word) -> None:
        """Add one assignment; one without words resets a list.

        Raises:
            Unwritable: nothing was added.
        """
        if not _KEY.fullmatch(section) or not _KEY.fullmatch(key):
            raise Unwritable(f"[{shown(section)}] {shown(key)}= is no setting")
        line = f"{key}={' '.join(words)}"
        _require_line(line)
        if section != self._section:
            self._section = section
            self._lines.append(f"[{section}]")
        self._lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def token(text: str) -> Word:
    """A word of our own that needs no quotes: "rw", a unit's name.

    Raises:
        Unwritable
    """
    if not _TOKEN.fullmatch(text):
        raise Unwritable(f"{shown(text)} is no plain word")
    return Word(text)


def own(text: str) -> Word:
    """A value that is written in this program, as it stands: nothing in it comes from elsewhere.

    Raises:
        Unwritable
    """
    _require_line(text)
    return Word(text)


def variable(name: str, paths: Iterable[str]) -> Word:
    """A word of `Environment=`: a list of paths, as systemd sets it for `ConfigurationDirectory=` and its kin.

    Raises:
        Unwritable
    """
    return Word(f"{name}={':'.join(token(path) for path in paths)}")


def path(*paths: str, options: str = "", optional: bool = False) -> Word:
    """`[-]PATH[:PATH][:OPTIONS]` for settings that list paths: `ReadOnlyPaths=`, `BindPaths=`, `ExtensionDirectories=`.

    systemd 257 parts at blanks and colons in one go, and a backslash protects the next character. 262 takes a value of
    `BindPaths=` apart twice: first at blanks, where a backslash means nothing and protects no quote, then at colons,
    also at those between quotes. `_quoted()` writes what all of them read alike.

    Raises:
        Unwritable
    """
    return Word(("-" if optional else "") + ":".join(map(_quoted, paths)) + _options(options))


def image(path: str, options: str = "", *, optional: bool = False) -> Word:
    r"""`[-]PATH[:OPTIONS]` for `ExtensionImages=`, where C's escapes work: all but the harmless as `\xHH`.

    Args:
        options: as they were written in a unit file.

    Raises:
        Unwritable
    """
    _require_path(path)
    escaped = "".join(
        chr(byte) if _PLAIN.fullmatch(chr(byte)) else f"\\x{byte:02x}" for byte in path.encode()
    )
    # systemd looks for specifiers once the escapes are gone.
    return Word(("-" if optional else "") + escaped.replace("\\x25", "%%") + _options(options))


def _quoted(path: str) -> str:
    _require_path(path)
    if _PLAIN.fullmatch(path):
        return path
    protected = path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")
    return '"' + protected.replace('"', """"'"'\"""") + '"'


def _options(options: str) -> str:
    if not _OPTIONS.fullmatch(options):
        raise Unwritable(f"the options {shown(options)} cannot be written into a unit file")
    return f":{options}" if options else ""


def _require_path(path: str) -> None:
    """Raises Unwritable unless a path is absolute, normalized, and of characters that a unit file can hold."""
    _require_line(path)
    if not path.startswith("/") or {"", ".", ".."} & set(path[1:].split("/")):
        raise Unwritable("the path is not absolute and without . and ..")
    if len(path.encode()) >= _PATH_MAX:
        raise Unwritable("the path is too long")


def _require_line(text: str) -> None:
    """Raises Unwritable unless `text` stays on one line and is text to systemd, which ignores any other line."""
    if text.isascii() and text.isprintable():
        return
    for char in text:
        code = ord(char)
        if code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029):
            raise Unwritable(f"the control character {shown(char)} cannot stand in a unit file")
        if 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
            raise Unwritable(f"{shown(char)} is no character of UTF-8, and a unit file can hold no others")
