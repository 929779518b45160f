# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put the checkout's program into the virtual machine, as its package would."""

from __future__ import annotations

from pathlib import Path

from beds import payload
from vm import native
from vm.machine import Machine


def install(machine: Machine, scratch: Path) -> None:
    """Install the program, compiled on this machine.

    Args:
        scratch: an empty directory, only used meanwhile.
    """
    payload.install(scratch)
    native.compile_all(scratch, "usr/lib/confext-watcher")
    machine.send(scratch)
    machine.run(["systemctl", "daemon-reload"])
