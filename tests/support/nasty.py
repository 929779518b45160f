# SPDX-License-Identifier: LGPL-2.1-or-later
"""File names that an attacker would choose to get a line of his own into a unit file; as `os.fsdecode()` gives them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import strategies as st

LINES = ("\n", "\r", "\r\n", "\0", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
_SYNTAX = (
    *(
        "\\",
        '"',
        "'",
        "%",
        "%%",
        "%n",
        "%i",
        "$",
        "${x}",
        ":",
        " ",
        "\t",
        "#",
        ";",
        "=",
        "-",
        "+",
        "!",
        "~",
        "@",
    ),
    *(
        ",",
        "{",
        "}",
        "[",
        "]",
        "[Service]",
        "\\n",
        "\\x0a",
        "\\u000a",
        "\\s",
        "\\x25n",
        "\\x5c",
        "\\:",
        "\\ ",
    ),
    *(
        ":root:ro",
        "ExecStartPre=+/bin/false",
        "\nExecStartPre=+/bin/false\n",
        '"\nExecStartPre=+/bin/false #',
    ),
    *(
        "\x7f",
        "\x1b[31m",
        "\x80",
        "\ufeff",
        "\u202e",
        "\xa0",
        "\ufdd0",
        "\uffff",
        "\ufffe",
        "\U0001fffe",
        "ü",
        "€",
    ),
    *("\udcff", "\udc80", "\udcc3", "a", "b", "0", "_", "."),
)
PIECES = (*LINES, *_SYNTAX)

NAMES = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=20),
).map(lambda name: name.replace("\0", "\n").replace("/", "\\"))
"""Names of files; "." and ".." never come out of a directory."""


def names(number: int, seed: int = 7) -> Iterator[str]:
    """So many of them, always the same, of this alone and in between."""
    for piece in PIECES:
        yield from (piece, f"a{piece}", f"{piece}b", f"a{piece}b")
    chosen = random.Random(seed)
    for _ in range(number):
        yield "".join(chosen.choices(PIECES, k=chosen.randint(2, 9)))
