# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever strangers call their files, people read one line that cannot be mistaken."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from watcher.text import nearest, printable, problem, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("web 1.4 über", "web 1.4 über"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        ("a\\nb", "a\\\\nb"),
        ("\udcff\u2028\u202e", "\\xff\\u2028\\u202e"),
    ],
)
def test_what_cannot_be_printed_is_escaped_and_so_is_the_escape_itself(text: str, line: str) -> None:
    assert shown(text) == line
    assert printable(f"{line}: a sentence") == f"{line}: a sentence"


def test_an_error_begins_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        (tmp_path / "a\nb").read_bytes()
    assert problem(raised.value) == f"{tmp_path}/a\\nb: No such file or directory"
    assert problem(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert problem(OSError("of no number")) == "of no number"
    assert problem(ValueError("another")) == "another"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("nginx2.service", "nginx.service"),
        ("ngnix", "nginx.service"),
        ("postgres@16-main", "postgresql@16-main.service"),
        ("haproxy.service", ""),
        ("x" * 100_000, ""),
        ("", ""),
    ],
)
def test_what_was_probably_meant(asked: str, meant: str) -> None:
    assert nearest(asked, ["nginx.service", "postgresql@16-main.service", "ssh.service"]) == meant
