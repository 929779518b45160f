#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write what the recipes say into their man page: `contrib/recipes_page.py`, after a recipe was changed."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

CONTRIB = Path(__file__).resolve().parent
PAGE = CONTRIB / "man/confext-watcher-recipes.7"
_BEGIN, _END = ".Bl -tag -width Ds\n", ".El\n"

sys.path.insert(0, str(CONTRIB.parent))
from watcher.setup import recipes  # noqa: E402


def page(text: str) -> str:
    """The page with the list as it should be."""
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + "".join(f"{line}\n" for line in _list()) + _END + rest.rpartition(_END)[2]


def _list() -> Iterator[str]:
    for path in sorted((CONTRIB / "recipes").glob("*.conf")):
        recipe = recipes.load(str(path))
        yield f".It Pa {path.name}"
        yield from _lines(f"For {' and '.join(recipe.units)}, takes {' and '.join(recipe.sources)}.")
        yield from _lines(path.read_text().splitlines()[1].removeprefix("# "))
        for setting in recipe.settings:
            if setting.section == "X-Confext":
                yield ".br"
                yield from _wrapped(f"{setting.key}={' '.join(setting.value.split())}")
        for note in recipe.notes:
            yield ".Pp"
            yield from _lines(note)


def _lines(text: str) -> Iterator[str]:
    """A sentence a line, as mdoc(7) has it."""
    for sentence in re.split(r"(?<=\.) (?=[A-Z`])", text):
        yield from _wrapped(sentence)


def _wrapped(text: str) -> Iterable[str]:
    lines = textwrap.wrap(text, 76, break_long_words=False, break_on_hyphens=False)
    return [re.sub(r"^(?=[.'])", r"\\&", line.replace("\\", "\\e")) for line in lines]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
