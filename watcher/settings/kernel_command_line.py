# SPDX-License-Identifier: LGPL-2.1-or-later
"""`systemd.confext=` on the kernel command line (systemd 261): for a machine that its newest configuration has made
unusable. systemd merges nothing then, and we give services nothing new."""

from __future__ import annotations

import functools
import os

from watcher.settings import values

_KEY = "systemd.confext"

# What a container's manager was started with takes the place of the kernel's line, as in systemd's proc_cmdline().
_IN_CONTAINER, _CONTAINERS, _KERNELS = "/run/systemd/container", "/proc/1/cmdline", "/proc/cmdline"
_OVERRIDE = "SYSTEMD_PROC_CMDLINE"


@functools.cache
def why_nothing_new() -> str:
    """One line if the kernel command line turns confexts off, "" if not. It never changes while a program runs."""
    line = _read()
    return f"{_KEY}=no is on the kernel command line" if is_off(line) else ""


def is_off(line: str) -> bool:
    """Whether a kernel command line turns confexts off.

    The last assignment counts, "-" and "_" are the same in a key, and a value that is no boolean counts for nothing.
    """
    off = False
    try:
        words = values.split(line)
    except ValueError:  # an open quote
        words = line.split()
    for word in words:
        key, assigned, value = word.partition("=")
        if assigned and key.replace("_", "-") == _KEY:
            off = _is_no(value)
    return off


def _is_no(value: str) -> bool:
    try:
        return not values.boolean(value)
    except ValueError:
        return False


def _read() -> str:
    if (override := os.environ.get(_OVERRIDE)) is not None:
        return override
    path = _CONTAINERS if os.path.exists(_IN_CONTAINER) else _KERNELS
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().replace("\0", " ")
    except OSError:
        return ""  # without /proc nothing works anyway, and says so
