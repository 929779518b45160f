# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows of a mount table (proc_pid_mountinfo(5)). Pure; standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One row; paths and the source are without the escapes of mountinfo, `super_options` is as it stands there."""

    id: int
    parent: int
    device: str
    root: str
    point: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: str


def mounts(lines: Iterable[str]) -> Iterator[Mount]:
    r"""The rows among the lines; what is no row is passed over.

    Args:
        lines: split at "\n" alone: the kernel does not escape a "\r" in a path.
    """
    for line in lines:
        try:
            mount = parse(line)
        except ValueError:
            continue
        yield mount


def parse(line: str) -> Mount:
    """One row. Raises ValueError: it is none."""
    left, _, right = line.partition(" - ")
    mount_id, parent, device, root, point, options, *_ = left.split(" ")
    fstype, source, super_options = right.split(" ", 2)
    return Mount(
        int(mount_id),
        int(parent),
        device,
        unescape(root),
        unescape(point),
        tuple(options.split(",")),
        fstype,
        unescape(source),
        super_options,
    )


def unescape(text: str) -> str:
    r"""A field as the kernel had it before it wrote `\040` for a blank."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
