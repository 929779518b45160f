# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-in that `init` writes for a unit, from a recipe; and whether one that is there is still as it was written.

Its first lines say who made it, how to undo that, and what was made with it. They have a digest of all that follows,
so that nothing but the file itself has to be kept to know that a person has changed it: what a person has changed is
neither overwritten nor deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass

from watcher.model import printable
from watcher.settings import syntax
from watcher.setup.recipes import Recipe

FILE = "confext.conf"
_MADE = re.compile(r"# With it: (?P<entry>\S+); as written, (?P<digest>[0-9a-f]{16})\n")
_NO_CHECK = (
    "# There is no recipe for this unit, and so nothing tries a new configuration before the service gets it.",
    "# Its own test of one, if it has any, belongs here; it runs without a shell (watcher.conf(5)):",
    "# Check=/usr/sbin/PROGRAM --test",
)


@dataclass(frozen=True, slots=True)
class Written:
    """A drop-in that is there.

    Attributes:
        entry: the directory of versions that was made with it, such as "web.raw.v"; "": it is none of ours.
        changed: a person has changed it since.
    """

    text: str
    entry: str = ""
    changed: bool = True


def text(unit: str, entry: str, recipe: Recipe | None, user: str = "") -> str:
    """What the drop-in of a unit says.

    Args:
        entry: the directory of versions, such as "web.raw.v".
        user: who may deploy (`TrustedUsers=`); "": root alone.
    """
    lines = [f"# {printable(note)}" for note in recipe.notes] if recipe else []
    sections = recipe.sections() if recipe else ["[X-Confext]", *_NO_CHECK]
    if user:
        if "[X-Confext]" not in sections:
            sections.insert(0, "[X-Confext]")
        sections.insert(sections.index("[X-Confext]") + 1, f"TrustedUsers={user}")
    body = "\n".join((*lines, *sections)) + "\n"
    source = f"by the recipe {printable(recipe.name)}" if recipe else "without a recipe"
    return (
        f"# Made by confext-watcher init, {source}. Undo: confext-watcher remove {unit}\n"
        f"# With it: {entry}; as written, {_digest(body)}\n{body}"
    )


def read(path: str) -> Written | None:
    """The drop-in that is there; None: there is none. Raises OSError: it cannot be read."""
    try:
        there = syntax.read(path).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    made = _MADE.match(there, there.find("\n") + 1)
    if made is None:
        return Written(there)
    return Written(there, made["entry"], made["digest"] != _digest(there[made.end() :]))


def write(path: str, content: str) -> None:
    """Put a drop-in into its place, whole; its directory is made. Raises OSError."""
    directory = os.path.dirname(path)
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogateescape")).hexdigest()[:16]
