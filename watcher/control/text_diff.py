# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unified diff of two texts: of small changes by difflib, of others by diff(1).

difflib takes the square of the number of lines, or more, and a layer's author chooses these. The program of diffutils,
which every Debian has, gives up looking for the smallest difference in time; and it is a process, which can be ended.
But to start it takes longer than all else that is done for a file. So what is the same at the beginning and at the end
is cut off first, and where few lines are left, as nearly always, these go to difflib.
"""

from __future__ import annotations

import difflib
import os
import subprocess
from collections.abc import Iterator, Sequence

from watcher.mounts.descriptors import Descriptors
from watcher.records.schema import Failed

SECONDS = 10.0
"""After which two texts count as too different."""
FEW = 32
"""Lines for which difflib takes no longer, whatever they are, than diff(1) takes to start."""

_CONTEXT = 3
_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}


def unified(before: bytes | None, after: bytes | None) -> bytes | None:
    """The hunks, without a header; None: it took too long.

    Args:
        before, after: None: there is nothing.

    Raises:
        Failed: diff(1) is missing, or fails.
    """
    if before is None or after is None:
        return _whole(b"-", before) if after is None else _whole(b"+", after)
    if before == after:
        return b""
    one, other = _lines(before), _lines(after)
    start = _same(one, other)
    end = _same(one[start:][::-1], other[start:][::-1])
    if max(len(one), len(other)) - start - end <= FEW:
        return b"".join(_hunks(one, other, start, end))
    return _by_program(before, after)


def _lines(text: bytes) -> list[bytes]:
    """With their ends: of the last one there may be none."""
    lines = text.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


def _same(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """How many lines are the same at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((count for count, (line, twin) in pairs if line != twin), min(len(one), len(other)))


def _hunks(one: list[bytes], other: list[bytes], start: int, end: int) -> Iterator[bytes]:
    """By difflib, of what is not the same at the beginning and at the end, and of the lines around it."""
    start = max(start - _CONTEXT, 0)
    end = max(end - _CONTEXT, 0)
    one, other = one[start : len(one) - end], other[start : len(other) - end]
    for group in difflib.SequenceMatcher(None, one, other, autojunk=False).get_grouped_opcodes(_CONTEXT):
        first, last = group[0], group[-1]
        yield b"@@ -%s +%s @@\n" % (_span(start, first[1], last[2]), _span(start, first[3], last[4]))
        for tag, begin, stop, begin_other, stop_other in group:
            if tag == "equal":
                yield from (_line(b" ", line) for line in one[begin:stop])
                continue
            yield from (_line(b"-", line) for line in one[begin:stop])
            yield from (_line(b"+", line) for line in other[begin_other:stop_other])


def _span(offset: int, begin: int, stop: int) -> bytes:
    """Lines in the header of a hunk; of none, the line before, as diff(1) has it."""
    count, first = stop - begin, offset + begin + 1
    return b"%d" % first if count == 1 else b"%d,%d" % (first if count else first - 1, count)


def _line(sign: bytes, line: bytes) -> bytes:
    return sign + line if line.endswith(b"\n") else sign + line + b"\n\\ No newline at end of file\n"


def _by_program(before: bytes, after: bytes) -> bytes | None:
    with Descriptors() as fds:
        files = [fds.add(_file(text)) for text in (before, after)]
        # By descriptors: no name has to be made up, and none is left behind.
        words = [
            "diff",
            "--unified",
            "--text",
            "--label=",
            "--label=",
            *(f"/proc/self/fd/{fd}" for fd in files),
        ]
        try:
            done = subprocess.run(
                words, pass_fds=files, capture_output=True, check=False, timeout=SECONDS, env=_ENVIRONMENT
            )
        except FileNotFoundError:
            raise Failed("diff(1) is not installed: it is in the package diffutils")
        except subprocess.TimeoutExpired:
            return None
    if done.returncode not in (0, 1):
        raise Failed(f"diff(1): {os.fsdecode(done.stderr).strip()}")
    return done.stdout.split(b"\n", 2)[2] if done.stdout else b""


def _whole(sign: bytes, text: bytes | None) -> bytes:
    """All lines of a text as added, or as removed."""
    lines = _lines(text or b"")
    if not lines:
        return b""
    span = _span(0, 0, len(lines))
    place = b"-0,0 +" + span if sign == b"+" else b"-" + span + b" +0,0"
    return b"".join([b"@@ " + place + b" @@\n", *(_line(sign, line) for line in lines)])


def _file(text: bytes) -> int:
    fd = os.memfd_create("confext-watcher", os.MFD_CLOEXEC)
    try:
        view = memoryview(text)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
