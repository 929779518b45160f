# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon and its services as real processes, in a directory of their own.

Everything is waited for by what a process says, never by a pause: `Output.wait_for()`. That something does *not* happen
is shown by what comes after it: every round that was asked for has been done before a later drop is applied.

As root, services get images; in a user namespace, directory trees. A test that is written with `Service.put()` runs on
either.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from support import fork_server, images
from support.fork_server import COMMAND

SCRATCH = "CONFEXT_WATCHER_TEST_SCRATCH"
"""Environment variable: where confexts are made, once for all tests."""

PATIENCE = float(os.environ.get("CONFEXT_WATCHER_TEST_PATIENCE", "60"))
"""Seconds after which something that should have happened has not."""

# Says what it read at its start and at each SIGHUP. SIGUSR1 makes it become itself anew, SIGUSR2 end with status 7.
PROGRAM = """
import os, signal, sys
def read():
    try:
        return open("/etc/web.conf").read().strip()
    except FileNotFoundError:
        return "nothing"
def say(word):
    os.write(1, f"{word} {read()}\\n".encode())
signal.signal(signal.SIGHUP, lambda *_: say("reloaded"))
signal.signal(signal.SIGUSR1, lambda *_: os.execv(sys.orig_argv[0], sys.orig_argv))
signal.signal(signal.SIGUSR2, lambda *_: os._exit(7))
say("started")
while True:
    signal.pause()
"""
PYTHON = (sys.executable, "-ISc", PROGRAM)


class Output:
    """The lines that a process has written, as far as they were read.

    Waiting goes on from where the last wait ended, so that each line answers one wait.

    Attributes:
        lines: what was read.
        beside: the other one of the same process, shown too when a wait is in vain.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.lines: list[str] = []
        self.beside: Output | None = None
        self._stream = stream
        self._rest = b""
        self._at: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        self._ended = False
        os.set_blocking(stream.fileno(), False)

    def wait_for(self, *words: str, reader: str = "") -> str:
        """The next line in which all the words stand, each a regular expression.

        Args:
            reader: each goes on from where its own last wait ended.
        """
        deadline = time.monotonic() + PATIENCE
        at = self._at.get(reader, 0)
        while True:
            for number in range(at, len(self.lines)):
                if all(re.search(word, self.lines[number]) for word in words):
                    self._at[reader] = number + 1
                    return self.lines[number]
            at = len(self.lines)
            left = deadline - time.monotonic()
            if self._ended or left <= 0:
                why = "it ended" if self._ended else f"{PATIENCE:.0f} s"
                beside = self.beside.read() if self.beside else []
                said = [line.split(" message_id=")[0] for line in self.lines[-8:]]
                raise AssertionError(
                    "\n".join([f"no {words} ({why}) in:", "...", *said, "beside:", *beside[-40:]])
                )
            self._read(left)

    def mark(self, reader: str) -> None:
        """Nothing that was said up to now is of interest to the reader."""
        self._at[reader] = self._marks[reader] = len(self.read())

    def begin(self, reader: str) -> int:
        return self._marks.get(reader, 0)

    def wait_for_end(self) -> list[str]:
        """All lines, once the other end is closed."""
        deadline = time.monotonic() + PATIENCE
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            self._read(left)
        assert self._ended, "still open:\n" + "\n".join(self.lines)
        return self.lines

    def read(self) -> list[str]:
        """All lines that are there by now."""
        while self._read(0) and not self._ended:
            pass
        return self.lines

    def _read(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ)
            if not selector.select(seconds):
                return False
        data = os.read(self._stream.fileno(), 1 << 16)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.lines += [line.decode(errors="replace") for line in lines]
        return True


class Running:
    """A process of a test; `stop()` is called at the latest when its `Place` is closed."""

    def __init__(self, words: Sequence[str], environment: dict[str, str], **options: Any) -> None:
        self.process = fork_server.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.pid = self.process.pid
        self.said = Output(self.process.stdout)
        self.errors = Output(self.process.stderr)
        self.said.beside, self.errors.beside = self.errors, self.said

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, as `subprocess` has it: negative for a signal."""
        return self.process.wait(timeout=PATIENCE)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Daemon(Running):
    """`confext-watcher run`; its log is what it says on standard error."""

    @property
    def log(self) -> Output:
        return self.errors

    def wait_until_ready(self) -> Daemon:
        self.log.wait_for("watching for")
        return self

    def stop(self) -> None:
        """As systemd would; it must have come to an end by itself."""
        self.send(signal.SIGTERM)
        assert self.wait() == 0, "\n".join(self.log.wait_for_end())
        assert not [line for line in self.log.wait_for_end() if "Traceback" in line], self.log.lines
        self.kill()


class Service(Running):
    """A program started by `confext-watcher exec`, with a directory to drop things into.

    Attributes:
        name: of the service.
        drops: its `.confext.d/`.
        versions: the `.v/` directory in it that `put()` drops into.
    """

    def __init__(self, place: Place, name: str, words: Sequence[str], **options: Any) -> None:
        super().__init__(words, place.environment, **options)
        self.place = place
        self.name = name
        self.drops = place.drops(name)
        self.versions = place.versions(name)
        self._since = 0

    def wait_until_started(self) -> Service:
        self.said.wait_for("^started")
        return self

    def logged(self, *words: str) -> str:
        """The next line of the daemon about this service that has all these words."""
        return self.log.wait_for(f'msg="{re.escape(self.name)}: ', *words, reader=str(self.pid))

    @property
    def log(self) -> Output:
        assert self.place.daemon is not None
        return self.place.daemon.log

    def log_lines(self) -> list[str]:
        """What the daemon has said about it, since `renew()`."""
        lines = self.log.read()[self.log.begin(str(self.pid)) :]
        return [line for line in lines if f'msg="{self.name}: ' in line]

    def reloaded(self, value: str) -> None:
        """Wait for a reload that reads `value`."""
        self.said.wait_for(f"^reloaded {re.escape(value)}$")

    @property
    def heard(self) -> list[str]:
        """Everything that it has read, at its start and in reloads, in order; since `renew()`."""
        return [line.partition(" ")[2] for line in self.said.read()[self._since :]]

    def renew(self) -> None:
        """Take everything away that it got, and begin with a version "0" alone."""
        aside = self.place.path / f"gone-{next(self.place.numbers)}"
        if self.drops.exists():
            self.drops.rename(aside)
        value = "second" if self.said.read()[-1:] == ["reloaded first"] else "first"
        self.versions.mkdir(parents=True)
        self.log.mark(str(self.pid))
        self.put("0", value=value)
        self.reloaded(value)
        self.logged("applied in", "version=0 ")
        self.log.mark(str(self.pid))
        self._since = len(self.said.read())

    def etc(self, name: str = "") -> Path:
        """A path of its `/etc`, as it sees it, for somebody outside."""
        return Path(f"/proc/{self.pid}/root/etc/{name}")

    def has(self, value: str, name: str = "web.conf") -> bool:
        return self.etc(name).read_text().strip() == value

    def put(
        self, version: str, *, value: str | None = None, name: str = "web", at: Path | None = None
    ) -> Path:
        """Drop a version of the confext "web" atomically, whose `web.conf` has `value`, at first the version."""
        made = self.place.confext(version, value, name)
        target = (at or self.versions) / f"{name}_{version}{self.place.suffix}"
        self.place.bring(made, target)
        return target

    def remove(self, version: str, name: str = "web") -> None:
        """Take a version away at once."""
        path = self.versions / f"{name}_{version}{self.place.suffix}"
        gone = self.place.path / f"gone-{next(self.place.numbers)}"
        os.rename(path, gone)

    def status(self) -> dict[str, Any]:
        answer = json.loads(self.place.run("status", "--json", self.name).stdout)
        found: dict[str, Any] = answer["services"][0]
        return found

    def stop(self) -> None:
        self.kill()


class Place:
    """Directories, environment and processes of one daemon.

    Args:
        path: an empty directory of its own.
        trees: in a user namespace, with directory trees; otherwise as root with squashfs images.
    """

    def __init__(self, path: Path, *, trees: bool = False) -> None:
        self.path = path
        self.trees = trees
        self.suffix = "" if trees else ".raw"
        self.daemon: Daemon | None = None
        self.services: list[Service] = []
        self.numbers = itertools.count(1)
        self.runtime, self.state, self.conf = path / "run", path / "state", path / "conf"
        self.environment = os.environ | {
            "RUNTIME_DIRECTORY": str(self.runtime),
            "STATE_DIRECTORY": str(self.state),
            "CONFIGURATION_DIRECTORY": str(self.conf),
            "COLUMNS": "1000",
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._ends = ExitStack()
        # PID of the process in whose user and mount namespace everything is started.
        self._inside: int | None = None
        self.configure("SettleSec=20ms")
        if trees:
            self._enter_user_namespace()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ends:
            for service in self.services:
                service.kill()
            if self.daemon is None:
                return
            if error is None and self.daemon.process.poll() is None:
                self.daemon.stop()
            self.daemon.kill()

    def configure(self, *lines: str) -> None:
        """Write `watcher.conf`. What is not said waits for neither trees nor removals."""
        self.conf.mkdir(exist_ok=True)
        said = {line.partition("=")[0] for line in lines}
        others = [f"{key}=0" for key in ("SettleTreeSec", "RemoveSec") if key not in said]
        (self.conf / "watcher.conf").write_text("\n".join(["[Watcher]", *lines, *others, ""]))

    def start_daemon(self, *prefix: str, wait: bool = True) -> Daemon:
        """`confext-watcher run`, ready.

        Args:
            prefix: a command that becomes it.
        """
        self.daemon = Daemon([*prefix, str(COMMAND), "run"], self.environment, inside=self._inside)
        return self.daemon.wait_until_ready() if wait else self.daemon

    def start(
        self,
        *options: str,
        name: str = "",
        program: Sequence[str] = PYTHON,
        prefix: Sequence[str] = (),
        declared: bool = True,
        wait: bool = True,
        **popen: Any,
    ) -> Service:
        """`confext-watcher exec`: a service, started.

        Args:
            options: of `exec`, instead of `--reload-signal SIGHUP`.
            declared: with `--confext-dir`.
            prefix: a command that becomes it.
        """
        name = name or f"web-{next(self.numbers)}.service"
        words = [*prefix, str(COMMAND), "exec", "--name", name]
        if declared:
            self.versions(name).mkdir(parents=True, exist_ok=True)
            words += ["--confext-dir", str(self.drops(name))]
        words += options or ["--reload-signal", "SIGHUP"]
        service = Service(self, name, [*words, "--", *program], inside=self._inside, **popen)
        self.services.append(service)
        return service.wait_until_started() if wait else service

    def run(
        self, *words: str, check: bool = True, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """A `confext-watcher` command that comes to an end by itself."""
        return fork_server.run(
            [*prefix, str(COMMAND), *words],
            inside=self._inside,
            env=self.environment,
            text=True,
            errors="surrogateescape",
            timeout=PATIENCE,
            check=check,
        )

    def drops(self, name: str) -> Path:
        return self.path / f"{name}.confext.d"

    def versions(self, name: str) -> Path:
        return self.drops(name) / ("web.v" if self.trees else "web.raw.v")

    def confext(self, version: str, value: str | None = None, name: str = "web") -> Path:
        """An image or tree to be copied, not to be dropped itself."""
        make = tree if self.trees else image
        return make(f"{name}_{version}", version if value is None else value, name=name)

    def bring(self, made: Path, target: Path) -> None:
        """A copy of an image or tree, all at once."""
        temporary = target.with_name(f".{next(self.numbers)}")
        if made.is_dir():
            shutil.copytree(made, temporary, symlinks=True)
        else:
            shutil.copyfile(made, temporary)
        os.rename(temporary, target)

    def _enter_user_namespace(self) -> None:
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo; exec sleep infinity"],
            stdout=subprocess.PIPE,
            env=self.environment,
        )
        assert holder.stdout is not None
        self._ends.callback(holder.wait)
        self._ends.callback(holder.kill)
        self._ends.enter_context(holder.stdout)
        assert holder.stdout.read(1), "no user namespace"
        self._inside = holder.pid

    def inside(self, *words: str) -> None:
        """Run a command where the daemon is."""
        prefix = fork_server.entering(self._inside) if self._inside is not None else []
        subprocess.run([*prefix, *words], check=True, stdin=subprocess.DEVNULL, env=self.environment)


def tree(label: str, value: str, *, name: str = "web", release: str = "ID=_any\n", extra: str = "") -> Path:
    """A directory tree with `etc/NAME.conf`, not to be changed; made once.

    Args:
        label: "web_1.4"; decides nothing but where it is made.
        extra: path below it of another file with the same content.
    """
    what = hashlib.sha256(repr((label, value, name, release, extra)).encode()).hexdigest()[:16]
    root = Path(os.environ[SCRATCH], what, "tree")
    if not root.exists():
        files = {path: f"{value}\n".encode() for path in (f"etc/{name}.conf", extra) if path}
        # So that most of an image is content, which no compression makes smaller, and hardly any of it padding.
        files[f"etc/{name}.large"] = random.Random(what).randbytes(20_000)
        images.confext(root, name, files, release)
    return root


def image(label: str, value: str, *, fstype: str = "squashfs", **more: str) -> Path:
    """An image of `tree(label, value, **more)`; made once."""
    root = tree(label, value, **more)
    path = root.with_name(f"{fstype}.raw")
    return path if path.exists() else images.image(root, path, fstype)


def shell(command: str, *paths: Path) -> None:
    """A command line as people type it; `{0}`, `{1}` ... stand for the paths."""
    words = [shlex.quote(str(path)) for path in paths]
    subprocess.run(["sh", "-ec", command.format(*words)], check=True, stdin=subprocess.DEVNULL)


def until(true: Callable[[], object]) -> None:
    """Wait for what nothing tells."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
