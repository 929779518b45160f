# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever strangers call their files, people read one line that cannot be mistaken."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from support import CHECKOUT
from watcher.text import nearest, printable, problem, shown, telling

OUTPUTS = sorted(CHECKOUT.glob("tests/corpus/command_output/*-*"))
"""What real programs print of a bad configuration. Above it: which program, the line that is to be chosen, nothing."""


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


@pytest.mark.parametrize("path", OUTPUTS, ids=lambda path: path.name)
def test_what_a_program_says_of_a_bad_configuration_is_the_line_that_says_why(path: Path) -> None:
    program, line, empty, output = path.read_text().split("\n", 3)
    assert not empty and ": " in program
    assert telling(output) == line


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("no\n", "no"),
        ("one\n\ttwo\n\n", "two"),
        ("web: a\x1b[2J\n", "web: a\\x1b[2J"),
        ("x" * 999, "x" * 300),
        # An error that nothing follows, one that the next line completes, one that a warning comes before.
        ("reading:\nError:", "Error:"),
        ("Error:\n  no such port\ndone", "Error: no such port"),
        ("warning: /etc/web.conf:1: error: old\n/etc/web.conf:2: bad\nfailed", "/etc/web.conf:2: bad"),
        ('{"level":"info","error":""}\n{"level":"error","msg":"bad"}\nend', '{"level":"error","msg":"bad"}'),
        # Words and addresses that only look like it.
        ("log is /var/log/error: new\n0 errors\nend", "end"),
        ("listening on http://localhost:80\nat 10.0.0.1:80\n/run/web.sock 3:4\nend", "end"),
        # Where a program was when it failed is not why.
        (
            'Traceback (most recent call last):\n  File "/x.py", line 3, in f\nValueError: bad',
            "ValueError: bad",
        ),
        ("in main: java.lang.Error: bad\n\tat A.f(/A.java:3)\nend", "in main: java.lang.Error: bad"),
    ],
)
def test_of_other_output_it_is_the_first_line_that_names_an_error_else_the_last(
    output: str, line: str
) -> None:
    assert telling(output) == line
