# SPDX-License-Identifier: LGPL-2.1-or-later
"""The terminal of the tests shows what a real one would, and what is kept of it is the same in each run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support import screens
from support.screens import Terminal, keep, look

SHELL = ("sh", "-c")


def test_a_line_is_folded_where_the_terminal_ends_and_styles_are_seen() -> None:
    seen = look([*SHELL, r"printf 'abcdefgh\n\033[1;31mred\033[m plain\n'; exit 3"], columns=6)
    assert (seen.text, seen.status) == ("abcdef\ngh\nred pl\nain\n", 3)
    assert seen.styled == "abcdef\ngh\n{bold red:red} pl\nain\n"
    assert seen.styles == {"bold red"}


def test_the_program_finds_a_terminal_of_that_width_and_that_encoding() -> None:
    program = (
        "import os, sys; print(os.get_terminal_size().columns, os.environ['LC_ALL'], sys.stdin.isatty())"
    )
    words = [sys.executable, "-c", program]
    assert look(words, columns=40).text == "40 C.UTF-8 True\n"
    assert look(words, columns=72, utf8=False).text == "72 C True\n"


def test_what_is_another_in_each_run_is_kept_as_if_it_were_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screens, "SCREENS", tmp_path)

    def seen(digest: str, seconds: int, place: str) -> screens.Look:
        line = (
            f"{digest} {digest[:12]} PID 12{seconds} at 2026-11-30 15:31:0{seconds} in {seconds} ms {place}/x"
        )
        return look([*SHELL, f"echo '{line}'; echo '{seconds:>4} s ago'"], columns=140)

    first, second = "/tmp/place-abcdefgh", "/tmp/place-hgfedcba"
    monkeypatch.setenv(screens.REWRITE, "1")
    keep("one", seen("5f" * 32, 5, first), Path(first))
    monkeypatch.delenv(screens.REWRITE)
    keep("one", seen("7a" * 32, 7, second), Path(second))
    kept = (tmp_path / "one.txt").read_text()
    assert kept == (
        f"{'0' * 64} {'0' * 12} PID 4711 at 2026-01-02 03:04:05 in 3 ms /etc/systemd/system/x\n   5 s ago\n"
    )
    with pytest.raises(AssertionError, match="looks another way now"):
        keep("one", look([*SHELL, "echo other"]))


def test_one_can_look_while_the_command_goes_on() -> None:
    terminal = Terminal([*SHELL, "echo first; read answer; echo $answer"])
    assert "first" in terminal.until(lambda text: "first" in text)
    terminal.type("second\n")
    assert terminal.end().text == "first\nsecond\nsecond\n"  # the terminal echoes it
