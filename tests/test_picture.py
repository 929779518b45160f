# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture in README says what its commands print."""

from __future__ import annotations

import html
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest

from support import CHECKOUT
from support.needs import root, tool

SCRIPT = CHECKOUT / "contrib/picture.py"
PICTURE = CHECKOUT / "contrib/picture.svg"


_WIDTH = 12.2  # of a sign, in the units of the picture: rich's


def drawn(svg: str) -> list[str]:
    """The lines of text in a picture: rich writes each stretch of one style as an element, at its place."""
    lines: dict[float, str] = {}
    body = svg.partition('<g class="picture-matrix">')[2]
    for x, y, text in re.findall(
        r'<text [^>]*\bx="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', body, re.DOTALL
    ):
        before = lines.get(float(y), "")
        lines[float(y)] = before.ljust(round(float(x) / _WIDTH)) + html.unescape(text).replace("\xa0", " ")
    return [line for y in sorted(lines) if (line := lines[y].rstrip())]


def without_times(lines: list[str]) -> list[str]:
    """The commands, each with what it printed, without what is another in each run, or makes room for that."""
    text = re.sub(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", " ".join(" ".join(lines).split()))
    text = re.sub(r"\b\d+(?:\.\d+)? (?:us|ms|s|min)\b", "DURATION", text)
    return text.split("$ ")


@pytest.fixture(scope="module")
def picture() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def printed() -> str:
    words = [sys.executable, SCRIPT, "--print"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout


@root
@tool("mksquashfs")
def test_what_is_drawn_is_what_was_printed(picture: dict[str, Any], printed: str) -> None:
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed)
    assert drawn(picture["draw"](printed)) == [line.rstrip() for line in plain.splitlines() if line.strip()]


@root
@tool("mksquashfs")
def test_the_picture_is_of_what_the_commands_print_today(printed: str) -> None:
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed)
    seen, now = without_times(drawn(PICTURE.read_text())), without_times(plain.splitlines())
    other = [f"{before}\nis now\n{after}" for before, after in zip(seen, now, strict=True) if before != after]
    assert not other, f"run {SCRIPT}:\n" + "\n".join(other)


def test_the_readme_shows_it_and_says_what_is_on_it(picture: dict[str, Any]) -> None:
    shown = re.search(r"!\[(.*?)\]\(contrib/picture\.svg\)", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert shown and len(shown[1].split()) >= 20
    assert "http" not in PICTURE.read_text().replace("http://www.w3.org/", "").replace(
        "https://www.textualize.io", ""
    )
