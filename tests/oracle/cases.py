# SPDX-License-Identifier: LGPL-2.1-or-later
"""The questions: made by hypothesis, from the pieces where the rules have their corners."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

# Versions: all separators, digits with leading zeros and of uneven length, letters of both cases, invalid characters.
_DIGITS = ["0", "00", "1", "01", "2", "9", "10", "11", "123", "99999999999999999999"]
_LETTERS = ["a", "b", "ab", "A", "Z", "z", "rc"]
_SEPARATORS = ["~", "~", "^", "-", "-", ".", ".", "."]
_INVALID = ["_", "+", " ", "é", "\udcff", ",", "/", "%", "\n"]
_pieces = st.sampled_from([*_DIGITS, *_LETTERS, *_SEPARATORS, *_INVALID])
_versions = st.lists(_pieces, max_size=7).map("".join)


# Right behind "~", at the end of the other, systemd takes a byte above 127 for what the machine's `char` makes of it:
# older on x86-64, newer on arm64. No file name can carry such a version, so there is no right answer to look for.
_SIGNED = re.compile(r"~[^\x00-\x7f]")


@st.composite
def version_pairs(draw: st.DrawFn) -> tuple[str, str]:
    """Two versions; half of the time with a common beginning, since that is where order is decided late."""
    common = draw(_versions) if draw(st.booleans()) else ""
    pair = common + draw(_versions), common + draw(_versions)
    assume(not any(map(_SIGNED.search, pair)))
    return pair


_good_versions = st.lists(
    st.sampled_from(["0", "1", "2", "10", "09", "a", "B", ".", ".", "~", "^", "-", "rc"]),
    min_size=1,
    max_size=4,
).map("".join)
_any_versions = st.one_of(
    st.sampled_from(["1", "1.0", "1.1", "1.10", "1~rc1", "2", "2^1", "3-1"]), _good_versions, _versions
)
_architectures = st.sampled_from(
    [
        "",
        "",
        "",
        "_x86-64",
        "_x86-64",
        "_x86",
        "_x86",
        "_arm64",
        "_riscv64",
        "_foo",
        "_",
        "_X86",
        "_x86-64_x86",
        "_x32",
    ]
)
_numbers = st.sampled_from(["0", "1", "2", "3", "10", "03", "010", "08", "4294967295", "4294967296", "", "x"])
_counters = st.one_of(
    st.just(""),
    st.just(""),
    _numbers.map("+{}".format),
    st.tuples(_numbers, _numbers).map(lambda n: f"+{n[0]}-{n[1]}"),
)
_types = st.sampled_from(
    ["file", "directory", "fifo", "block", "link-file", "link-directory", "link-fifo", "dangling"]
)
# Path below the case's own directory, basename and suffix that belong to it, for images and for directories.
_forms = {
    "image": [
        ("web.raw.v", "web", ".raw"),
        ("web.raw.v", "web", ".raw"),
        ("web.v", "web", ".raw"),
        (".raw.v", "", ".raw"),
        ("we b_1.raw.v", "we b_1", ".raw"),
        ("x.v/web___.raw", "web", ".raw"),
        ("x.v/web___.img", "web", ".img"),
        ("x.v/web___", "web", ""),
        ("x.v/___.raw", "", ".raw"),
        ("x.v/a___b____.raw", "a___b_", ".raw"),
        ("\udcff.raw.v", "\udcff", ".raw"),
    ],
    "directory": [
        ("web.v", "web", ""),
        ("web.v", "web", ""),
        ("web.raw.v", "web.raw", ""),
        (".v", "", ""),
        ("x.v/web___", "web", ""),
        ("x.v/web___/", "web", ""),
        ("x.v/web___.d", "web", ".d"),
        ("x.v/w:b\n___", "w:b\n", ""),
    ],
}


@st.composite
def picks(draw: st.DrawFn) -> dict[str, Any]:
    """A path in `.v/` form and what is in that directory: {"path", "kind", "entries": [[name, type]]}."""
    kind = draw(st.sampled_from(["image", "image", "directory"]))
    path, basename, suffix = draw(st.sampled_from(_forms[kind]))
    right = "file" if kind == "image" else "directory"
    types = st.one_of(st.just(right), st.just(right), _types)
    prefixes = st.sampled_from(
        [f"{basename}_" if basename else ""] * 8 + [basename, f".{basename}_", "web_", "x"]
    )
    endings = st.sampled_from([suffix] * 10 + [".raw", "", ".part", "~"])
    # A few versions that several names share, so that what comes after the version decides.
    shared = st.sampled_from(draw(st.lists(_good_versions, min_size=1, max_size=2)))
    versions = st.one_of(shared, shared, shared, _any_versions)
    names: dict[str, str] = {}
    for _ in range(draw(st.integers(0, 6))):
        name = draw(prefixes) + draw(versions) + draw(_architectures) + draw(_counters) + draw(endings)
        name = name.replace("/", "")
        if name not in ("", ".", "..") and len(os.fsencode(name)) < 255:
            names.setdefault(name, draw(types))
    return {"path": path, "kind": kind, "entries": sorted(map(list, names.items()))}


# Policies (systemd.image-policy(7)): mostly valid ones, with all words, and now and then something that is not.
_designators = st.sampled_from(
    [
        *["root"] * 12,
        *["", ""],
        *["usr", "home", "srv", "esp", "xbootldr", "swap", "tmp", "var"],
        *["root-verity", "root-verity", "root-verity-sig", "usr-verity", "usr-verity-sig"],
        *["Root", "root-sig", " root", "root\t", "ro\\ot", "\\", "é", "default", "*"],
    ]
)
_use = ["verity", "signed", "encrypted", "unprotected", "unused", "absent", "open", "ignore"]
_more = ["read-only-on", "read-only-off", "growfs-on", "growfs-off"]
_new = ["encryptedwithintegrity", "btrfs", "erofs", "ext4", "f2fs", "squashfs", "vfat", "xfs"]
_wrong = [
    "",
    "-",
    "Verity",
    "ext3",
    "read-only",
    " signed",
    "verity ",
    "si\\gned",
    "signed\\",
    "'signed'",
    "any",
    "*",
]
_policy_words = st.one_of(
    *[st.sampled_from(_use)] * 6,
    *[st.sampled_from(_more)] * 2,
    st.sampled_from(_new),
    st.sampled_from(_wrong),
)
_rules = st.tuples(_designators, st.lists(_policy_words, max_size=4).map("+".join)).map("=".join)
_odd = st.sampled_from(["", "-", "*", "~", "=", "==", ":", "root", "root=verity=signed", "\\", "=:=", "%i"])


@st.composite
def policies(draw: st.DrawFn) -> str:
    """A policy."""
    if draw(st.integers(0, 39)) == 0:
        return draw(_odd)
    rules = draw(st.lists(_rules, min_size=1, max_size=4))
    if draw(st.integers(0, 9)):  # twice the same is a mistake that would hide all others
        rules = list({rule.partition("=")[0]: rule for rule in rules}.values())
    return ":".join(rules)


def generate(strategy: st.SearchStrategy[Any], wanted: int, key: Callable[[Any], str] = repr) -> list[Any]:
    """`wanted` different examples, the same ones each time for the same hypothesis."""
    found: dict[str, Any] = {}
    number = 0
    while len(found) < wanted:
        number += 1

        @seed(number)
        @settings(
            max_examples=2000, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def collect(example: Any) -> None:
            found.setdefault(key(example), example)

        collect()
    return list(found.values())[:wanted]
