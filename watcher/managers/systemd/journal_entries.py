# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only the journal has: what a command of a unit printed, and who has sent a signal to its main process."""

from __future__ import annotations

import re
import subprocess
from typing import Final

import trio

from watcher.managers.command import OUTPUT_MAX

_PRINTED_SEC: Final = 5.0
# It is asked at each end of a service, and meanwhile no other service is looked at.
_SENT_SEC: Final = 1.0
# unit_kill_one() in src/core/unit.c, of 257 and 262.
_SENT: Final = re.compile(r"Sent signal (SIG[A-Z0-9+-]+) to main process ([0-9]+) .*on client request")


async def printed(unit: str, pid: int, begun_usec: int) -> str:
    """What a command of a unit printed, at most 64 KiB.

    Args:
        begun_usec: when it began, microseconds since the epoch.
    """
    since = f"--since=@{begun_usec / 1_000_000:.6f}"
    with trio.move_on_after(_PRINTED_SEC):
        return await _entries(since, f"_SYSTEMD_UNIT={unit}", f"_PID={pid}")
    return ""


async def sent_by_clients(unit: str, invocation: str, pid: int) -> frozenset[str]:
    """Names of the signals that systemd has sent to the main process of a unit because a client asked for it
    (`systemctl kill`)."""
    said = ""
    with trio.move_on_after(_SENT_SEC):
        said = await _entries("_PID=1", f"UNIT={unit}", f"INVOCATION_ID={invocation}")
    return frozenset(name for name, main in _SENT.findall(said) if int(main) == pid)


async def _entries(*matches: str) -> str:
    await _journalctl("--sync")
    return await _journalctl("--quiet", "--no-pager", "--output=cat", *matches)


async def _journalctl(*options: str) -> str:
    argv = ["journalctl", *options]
    try:
        done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return ""  # there is no journal to ask
    return done.stdout[-OUTPUT_MAX:].decode("utf-8", "backslashreplace")
