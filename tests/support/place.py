# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon of one's own and services without systemd, as the command line starts them."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support import CHECKOUT, fork_server, images
from watcher.model import Event
from watcher.mounts.process import Gone, Process
from watcher.records.ledger import Reader

SECONDS = 60
"""After so long what should have happened has not."""
PROGRAM = (sys.executable, "-m", "watcher")


class Place:
    """Directories of one's own below `scratch`; leaving it ends everything that was started.

    Attributes:
        log: what the daemons have said so far.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.drops = scratch / "web.confext.d"
        self.runtime, self.state, self.settings = (scratch / name for name in ("run", "state", "conf"))
        for directory in (self.drops / "web.raw.v", self.runtime, self.state, self.settings):
            directory.mkdir(parents=True)
        (self.settings / "watcher.conf").write_text("[Watcher]\nSettleSec=0\nSettleTreeSec=0\nRemoveSec=0\n")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "RUNTIME_DIRECTORY": str(self.runtime),
            "STATE_DIRECTORY": str(self.state),
            "CONFIGURATION_DIRECTORY": str(self.settings),
        }
        self.log: list[str] = []
        self.daemon: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._services: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_daemon()
        for service in self._services:
            self.stop(service)

    # --- the daemon ---

    def start_daemon(self, program: Sequence[str] = PROGRAM) -> None:
        self.daemon = fork_server.Popen(
            [*program, "run"],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        self._reader = threading.Thread(target=self._read, args=(self.daemon,))
        self._reader.start()
        self.until("watching for")

    def stop_daemon(self, number: int = signal.SIGTERM) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.ended()

    def ended(self) -> None:
        """The daemon has ended, or does so now."""
        assert self.daemon is not None and self._reader is not None and self.daemon.stderr is not None
        self.daemon.wait(SECONDS)
        self._reader.join()
        self.daemon.stderr.close()
        self.daemon = None
        while self._lines.get() is not None:
            pass

    def _read(self, daemon: subprocess.Popen[str]) -> None:
        assert daemon.stderr is not None
        for line in daemon.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def until(self, pattern: str) -> str:
        """The next line of the daemon's that has `pattern` (a regular expression) in it."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                self._lines.put(None)
                raise AssertionError(f"the daemon did not say {pattern!r}:\n{''.join(self.log)}")
            if re.search(pattern, line):
                return line

    def outcome(self, outcome: str, service: str = "web.service") -> str:
        return self.until(rf"service={re.escape(service)} outcome={outcome} ")

    # --- services ---

    def start(
        self, *program: str, name: str = "web.service", options: Sequence[str] = (), drops: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a service and wait until it is registered, and so on its stack."""
        service = fork_server.Popen(
            [
                *PROGRAM,
                "exec",
                "--name",
                name,
                "--confext-dir",
                str(drops or self.drops),
                *options,
                "--",
                *program,
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )
        self._services.append(service)
        comm = os.path.basename(program[0])[:15]
        eventually((self.runtime / "services" / f"{name}.json").exists)
        eventually(lambda: _comm(service.pid) not in ("", "python", comm) or _comm(service.pid) == comm)
        return service

    def stop(self, service: subprocess.Popen[bytes]) -> None:
        if service.poll() is None:
            service.kill()
        service.wait(SECONDS)

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = fork_server.run([*PROGRAM, *arguments], env=self.environment, text=True)
        assert not check or done.returncode == 0, done
        return done

    # --- images ---

    def image(
        self,
        version: str,
        content: str,
        *,
        drops: Path | None = None,
        name: str = "web",
        versions: str = "web.raw.v",
    ) -> Path:
        """Drop `NAME_VERSION.raw` with `/etc/NAME.conf`, by rename as `rsync` does it."""
        made = images.confext(
            self.scratch / f"tree-{time.monotonic_ns()}", name, {f"etc/{name}.conf": content.encode()}
        )
        hidden = images.image(made, self.scratch / f"{name}_{version}.raw")
        target = (drops or self.drops) / versions / hidden.name
        target.parent.mkdir(exist_ok=True)
        return hidden.rename(target)

    def shown(self, service: subprocess.Popen[bytes], path: str = "/etc/web.conf") -> str | None:
        """A file as the service sees it."""
        try:
            return Path(f"/proc/{service.pid}/root{path}").read_text()
        except FileNotFoundError:
            return None

    def slot(self, name: str = "web.service") -> str | None:
        """The digest that the next start gets."""
        try:
            return os.path.basename(os.readlink(self.state / "units" / f"{name}.exec" / "web.raw"))
        except FileNotFoundError:
            return None

    def dropped(self) -> list[str]:
        return sorted(os.listdir(self.drops / "web.raw.v"))

    def history(self, name: str = "web.service") -> list[Event]:
        """Newest first."""
        return Reader(str(self.state)).history(name)

    def outcomes(self, name: str = "web.service") -> list[str]:
        """Oldest first."""
        return [event.outcome.value for event in reversed(self.history(name))]


def eventually(condition: Callable[[], object], say: Callable[[], object] = lambda: "") -> None:
    """Wait for what nothing announces.

    Args:
        say: what is worth knowing when it did not come about.
    """
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"did not come about {say()}"
        time.sleep(0.01)


def _comm(pid: int) -> str:
    try:
        with Process(pid) as process:
            return process.read("comm").rstrip("\n")
    except Gone:
        return ""
