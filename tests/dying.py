# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon, killed before the $DYING_STEP-th step that it takes once the file $DYING_ARMED is there.

A step is whatever leaves something behind: a name made, changed or removed, a mount moved, a program started, a signal
sent, a write of the ledger. What the step was is written into the file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

_STEPS = (
    ("os", "rename"),
    ("os", "replace"),
    ("os", "symlink"),
    ("os", "unlink"),
    ("subprocess", "Popen"),
    ("signal", "pidfd_send_signal"),
    ("watcher.mounts.syscalls", "move_mount"),
    ("watcher.mounts.syscalls", "rename_noreplace"),
)
_count = 0
_lock = threading.Lock()
_kill = os.kill


def step(name: str) -> None:
    global _count
    armed = os.environ["DYING_ARMED"]
    with _lock:
        # In a service's namespace there is no such file; the descriptor of the directory leads to it.
        if not os.access(os.path.basename(armed), os.F_OK, dir_fd=_place):
            return
        _count += 1
        if _count == int(os.environ["DYING_STEP"]):
            fd = os.open(os.path.basename(armed), os.O_WRONLY, dir_fd=_place)
            os.write(fd, name.encode())
            _kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()


def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def stepped(*args: Any, **kwargs: Any) -> Any:
        step(name)
        return function(*args, **kwargs)

    return stepped


def main() -> int:
    from watcher import cli, ledger

    for module, name in _STEPS:
        __import__(module)
        if name != "Popen":
            setattr(sys.modules[module], name, before(f"{module}.{name}", getattr(sys.modules[module], name)))
    subprocess.Popen.__init__ = before("Popen", subprocess.Popen.__init__)  # type: ignore[method-assign]
    ledger.Ledger._write = before("ledger", ledger.Ledger._write)  # type: ignore[method-assign]
    return cli.main(["run"])


if __name__ == "__main__":
    _place = os.open(os.path.dirname(os.environ["DYING_ARMED"]), os.O_PATH)
    sys.exit(main())
