# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processor architectures by systemd's names ("x86-64"), as they stand in file names and in ARCHITECTURE=.

The names are those of ConditionArchitecture= in systemd.unit(5). Word width and byte order are part of a name,
processor models are not: `uname -m` is the other way round.
"""

from __future__ import annotations

import os
import re

_ALL = """
    alpha arc arc-be arm arm-be arm64 arm64-be cris ia64 loongarch64 m68k mips mips-le mips64 mips64-le nios2 parisc
    parisc64 ppc ppc-le ppc64 ppc64-le riscv32 riscv64 s390 s390x sh sh64 sparc sparc64 tilegx x86 x86-64
"""
NAMES = frozenset(_ALL.split())
"""Every name that can stand as the architecture of a versioned file; any other word there means no architecture."""

SECONDARY = {"x86-64": "x86", "arm64": "arm", "ppc64": "ppc", "ppc64-le": "ppc-le", "s390x": "s390"}
"""What an architecture runs besides itself."""

_MACHINES = {
    "x86_64": "x86-64",
    "aarch64": "arm64",
    "aarch64_be": "arm64-be",
    "crisv32": "cris",
    "arceb": "arc-be",
    "ppc64le": "ppc64-le",
    "ppcle": "ppc-le",
    "riscv": "riscv64",
    "sh5": "sh64",
}


_OTHERS = {
    "amd64": "x86-64",
    "x64": "x86-64",
    "armhf": "arm",
    "armel": "arm",
    "ppc64el": "ppc64-le",
    "mipsel": "mips-le",
    "mips64el": "mips64-le",
}
"""What Debian, Go and others say."""


def meant(word: str) -> str:
    """systemd's name for what others call an architecture ("amd64", "aarch64"); "" for any other word."""
    if word in NAMES:
        return ""
    if word in _MACHINES or re.fullmatch(r"i[3-6]86|armv[5-8]l?", word):
        return native(word)
    return _OTHERS.get(word, "")


def native(machine: str | None = None) -> str:
    """The architecture of this host, or of `machine` as `uname -m` prints it; an unknown machine's own name."""
    machine = machine or os.uname().machine
    if machine in _MACHINES:
        return _MACHINES[machine]
    if re.fullmatch(r"i[3-6]86", machine):
        return "x86"
    if re.fullmatch(r"arm.*b", machine):
        return "arm-be"
    if machine.startswith("arm"):
        return "arm"
    if re.fullmatch(r"sh[2-4]a?", machine):
        return "sh"
    return machine
