# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that ends, or becomes another program, before any step that the daemon takes for it."""

from __future__ import annotations

import functools
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import dying
from support.needs import root, tool
from support.place import Place, eventually
from support.records import under_way

pytestmark = [root, tool("mksquashfs")]

# Ready to be told to reload, and to become itself anew, once it says so.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: os.execv(sys.orig_argv[0], sys.orig_argv))
open(sys.argv[1], "a").write("x")
while True:
    time.sleep(1000)
"""


class Victims(Place):
    """A place with a service before any of whose steps something happens."""

    @property
    def ready(self) -> Path:
        return self.scratch / "ready"

    def starts(self) -> int:
        """How often the program has been executed, and got ready."""
        return self.ready.stat().st_size if self.ready.exists() else 0

    def begin(self) -> subprocess.Popen[bytes]:
        before = self.starts()
        program = (sys.executable, "-ISc", PROGRAM, str(self.ready))
        service = self.start(*program, options=("--reload-signal", "SIGHUP"))
        eventually(lambda: self.starts() > before)
        return service

    def is_ready_again(self, service: subprocess.Popen[bytes], before: int) -> bool:
        """It has become itself anew; or ended, if it was told to reload before it could listen."""
        return service.poll() is not None or self.starts() > before

    def is_over(self, version: str, armed: Path) -> bool:
        """It has happened, or there is an outcome for a version, and nothing is left to do for it."""
        if not armed.exists():
            return True
        return not under_way(self.state) and any(event.version == version for event in self.history()[:2])

    def has_come(self, service: subprocess.Popen[bytes], version: str) -> bool:
        """The service has a version; or had it, was told, and ended, which is put down to that."""
        undone = (event.version for event in self.history() if event.outcome.value == "rolled-back")
        return self.shown(service) == version or version in undone


@pytest.mark.limit(400)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["ends", "executes"])
def test_before_any_step(tmp_path: Path, number: signal.Signals) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with Victims(tmp_path) as place:
        armed = place.scratch / "armed"
        place.environment |= {"DYING_ARMED": str(armed)}
        place.image("1", "1")
        place.start_daemon((sys.executable, dying.__file__))
        service = place.begin()
        place.until("started well")
        for step in itertools.count(1):
            version, starts = str(step + 1), place.starts()
            arming = armed.with_name("arming")
            arming.write_text(f"{step} {service.pid} {number.value}")
            arming.rename(armed)
            place.image(version, version)
            eventually(functools.partial(place.is_over, version, armed), lambda: place.log[-8:])
            if armed.exists():
                break  # there are not so many steps
            eventually(functools.partial(place.is_ready_again, service, starts))
            if service.poll() is not None:
                service = place.begin()
            eventually(functools.partial(place.has_come, service, version), lambda: place.log[-8:])
            assert place.daemon is not None and place.daemon.poll() is None
        taken = (place.scratch / "taken").read_text().split()
        assert len(taken) >= 10 and len(set(taken)) >= 3, taken
        assert not [line for line in place.log if "Traceback" in line or "a bug" in line], place.log
    assert Path("/proc/self/mountinfo").read_text() == mounts
