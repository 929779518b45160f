# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon, in which something happens before the N-th step that it takes once the file $DYING_ARMED is there.

What the file says happens: nothing but N (or $DYING_STEP, if it is empty): the daemon is killed. "N PID SIGNAL": that
process is sent that signal, and the file goes away.

A step is whatever leaves something behind: a name made, changed or removed, a mount moved, a program started, a signal
sent, a write of the ledger. What the step was is written into the file, or added to "taken" beside it.
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
_place = -1
_lock = threading.Lock()
_kill, _unlink = os.kill, os.unlink


def step(name: str) -> None:
    global _count
    armed = os.path.basename(os.environ["DYING_ARMED"])
    with _lock:
        # In a service's namespace there is no such file; the descriptor of the directory leads to it.
        try:
            fd = os.open(armed, os.O_RDWR, dir_fd=_place)
        except FileNotFoundError:
            _count = 0
            return
        number, *victim = os.read(fd, 100).decode().split() or [os.environ["DYING_STEP"]]
        _count += 1
        if _count < int(number):
            os.close(fd)
        elif victim:
            _kill(*map(int, victim))
            taken = os.open("taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=_place)
            os.write(taken, f"{name}\n".encode())
            _unlink(armed, dir_fd=_place)
            os.close(taken)
            os.close(fd)
        else:
            os.write(fd, name.encode())
            _kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()


def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def stepped(*args: Any, **kwargs: Any) -> Any:
        step(name)
        return function(*args, **kwargs)

    return stepped


def main() -> int:
    global _place
    _place = os.open(os.path.dirname(os.environ["DYING_ARMED"]), os.O_PATH)
    from watcher.cli.main import main as command_line
    from watcher.records import ledger

    for module, name in _STEPS:
        __import__(module)
        if name != "Popen":
            setattr(sys.modules[module], name, before(f"{module}.{name}", getattr(sys.modules[module], name)))
    subprocess.Popen.__init__ = before("Popen", subprocess.Popen.__init__)  # type: ignore[method-assign]
    ledger.Ledger._write = before("ledger", ledger.Ledger._write)  # type: ignore[method-assign]
    return command_line(["run"])


if __name__ == "__main__":
    sys.exit(main())
