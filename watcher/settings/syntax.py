# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's INI syntax (systemd.syntax(7)), for unit files and `watcher.conf`.

`configparser` knows no continuation lines, and keeps one value per key. In systemd a list grows by repetition, and an
empty assignment resets it. Every assignment keeps its file and line, for messages.

Standard library only, for the generator.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from watcher.text import shown

if TYPE_CHECKING:
    from watcher.model import Remark

_WHITE = " \t\n\r"


class Assignment(NamedTuple):
    """One `key=value` line; `line` is the number of its first line, from 1."""

    section: str
    key: str
    value: str
    path: str
    line: int

    def remark(self, text: str) -> Remark:
        """A warning about this line."""
        return _warning(self.path, self.line, text)


class Parsed(NamedTuple):
    """One file's assignments in order, and what was wrong with the rest."""

    assignments: tuple[Assignment, ...]
    remarks: tuple[Remark, ...] = ()


def parse(text: str, path: str) -> Parsed:
    """
    Args:
        text: bytes that are not UTF-8 are surrogates in it; as in systemd, a line with such a byte is left out.
        path: of the file, for messages.
    """
    return _assigned(_logical_lines(text), path)


def _assigned(lines: Iterable[tuple[int, str]], path: str) -> Parsed:
    assignments: list[Assignment] = []
    remarks: list[Remark] = []
    section, at = "", 0

    def ignored(text: str) -> None:
        remarks.append(_warning(path, at, f"ignored{text}"))

    for at, line in lines:
        key, equals, value = (part.strip(_WHITE) for part in line.partition("="))
        if not line.isascii() and any(0xD800 <= ord(char) <= 0xDFFF for char in line):
            ignored(f": not valid UTF-8: {shown(line)}")
        elif line.startswith("["):
            section = line[1:-1] if line.endswith("]") else ""
            if not section:  # systemd gives up here, too: the section of the rest is not known
                ignored(f" from here on: not a section header: {shown(line)}")
                break
        elif not equals or not key:
            ignored(f": not of the form KEY=VALUE: {shown(line)}")
        elif not section:
            ignored(f": {shown(key)}= is outside of any section")
        else:
            assignments.append(Assignment(section, key, value, path, at))
    return Parsed(tuple(assignments), tuple(remarks))


def _warning(path: str, line: int, text: str) -> Remark:
    from watcher.model import Remark  # here, because its import costs the generator milliseconds

    return Remark("warning", f"{path}:{line}", text)


def parse_only(content: bytes, path: str, lines: re.Pattern[bytes]) -> Parsed:
    """`parse()` of the lines that match `lines_of()` some keys: much faster, without line numbers and most remarks."""
    joined = b"\\\n" in content or content.endswith(b"\\")
    if joined or b"\r" in content or b"\0" in content or content.startswith(b"\xef\xbb\xbf"):
        # Only the whole syntax tells where a line ends here.
        return parse(content.decode("utf-8", "surrogateescape"), path)
    chosen = b"\n".join(lines.findall(content)).decode("utf-8", "surrogateescape")
    return _assigned(((0, line.strip(_WHITE)) for line in chosen.split("\n") if line), path)


def lines_of(keys: Iterable[str]) -> re.Pattern[bytes]:
    """For `parse_only()`: section headers, and lines that begin with one of these keys."""
    words = "|".join(map(re.escape, keys))
    return re.compile(rf"^[ \t]*(?:\[|{words}).*".encode(), re.MULTILINE)


def read(path: str) -> bytes:
    """Content of a file; a link to /dev/null is empty. Never waits, as a FIFO would have it do.

    Raises OSError: it cannot be read, or is no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3):
            return b""
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        content = b""
        while len(content) < status.st_size and (more := os.read(fd, status.st_size - len(content))):
            content += more
        return content
    finally:
        os.close(fd)


def load(paths: Iterable[str]) -> Parsed:
    """Several files read one after another: a unit and its drop-ins. A file that has gone meanwhile is left out.

    Raises OSError: a file is there and cannot be read.
    """
    assignments: list[Assignment] = []
    remarks: list[Remark] = []
    for path in paths:
        try:
            parsed = parse(read(path).decode("utf-8", "surrogateescape"), path)
        except FileNotFoundError:
            continue
        assignments += parsed.assignments
        remarks += parsed.remarks
    return Parsed(tuple(assignments), tuple(remarks))


def assigned(assignments: Iterable[Assignment], section: str, key: str) -> list[Assignment]:
    """All assignments to a list setting since the last empty one."""
    found: list[Assignment] = []
    for assignment in assignments:
        if (assignment.section, assignment.key) == (section, key):
            if assignment.value:
                found.append(assignment)
            else:
                found.clear()
    return found


def last(assignments: Iterable[Assignment], section: str, key: str) -> Assignment | None:
    """The last assignment to a setting with one value; None if there is none, or if that one is empty."""
    found = None
    for assignment in assignments:
        if (assignment.section, assignment.key) == (section, key):
            found = assignment
    return found if found and found.value else None


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """(number of the first line, stripped text) of each line that says something, continuations joined."""
    begun = 0
    joined: list[str] = []
    for index, line in enumerate(re.split(r"\r\n|\n|\r|\0", text.removeprefix("\ufeff")), 1):
        if line.lstrip(_WHITE)[:1] in ("#", ";"):  # also in the middle of a continuation
            continue
        begun = begun or index
        if (len(line) - len(line.rstrip("\\"))) % 2:
            joined += (line[:-1], " ")
            continue
        joined.append(line)
        if complete := "".join(joined).strip(_WHITE):
            yield begun, complete
        begun, joined = 0, []
    if complete := "".join(joined).strip(_WHITE):
        yield begun, complete
