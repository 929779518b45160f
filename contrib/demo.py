# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo`: what confext-watcher does, shown on the real thing, in about ten seconds.

The daemon and a small program are started as anybody would start them, in a directory of their own that is removed at
the end. Every step is a plain file operation; beside it stand what the program itself finds in `/etc`, and the line the
daemon logged. As root the steps are done with image files. Without root, or where images cannot be mounted, they are
done with directories, as root of a user namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "watcher")
SECONDS = 15.0
"""After this long a step counts as failed."""
STALL = 2.0
"""How long the upload stalls, seconds."""

MARK = "CONFEXT_WATCHER_DEMO"
INSIDE = "CONFEXT_WATCHER_DEMO_INSIDE"

# A program like any other: it reads its configuration when it starts and when it is told to. Asked (a line on its
# standard input), it says what is there.
PROGRAM = """
import signal, sys

def find():
    try:
        with open("/etc/web.conf") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""

reloads = 0

def reload(*_):
    global reloads
    reloads += 1
    print("reload", reloads, find(), flush=True)

signal.signal(signal.SIGHUP, reload)
print("ready", reloads, find(), flush=True)
while sys.stdin.readline():
    print("asked", reloads, find(), flush=True)
"""


class Failed(Exception):
    """The demonstration cannot go on: one line that says why."""


# --- what is shown ---


class Screen:
    """The output: bold and dim only on a terminal, no line longer than a page where it is one."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = terminal and not os.environ.get("NO_COLOR")
        self._width = min(shutil.get_terminal_size().columns, 110) if terminal else 0

    def title(self, text: str) -> None:
        print(f"\n{self._paint('1', text)}", flush=True)

    def command(self, text: str) -> None:
        print(f"  {self._paint('36', '$ ' + text)}", flush=True)

    def beside(self, label: str, text: str, colour: str = "") -> None:
        """One fact, with what it is a fact about in front of it."""
        indent = " " * 14
        lines = textwrap.wrap(text, self._width - 14, break_on_hyphens=False) if self._width else [text]
        body = f"\n{indent}".join(self._paint(colour, line) for line in lines)
        print(f"  {self._paint('2', label.ljust(12))}{body}", flush=True)

    def plain(self, text: str) -> None:
        print("\n".join(textwrap.wrap(text, self._width)) if self._width else text, flush=True)

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour and colour else text


# --- the two processes ---


class Talker:
    """A child process, and the lines it says."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.heard: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def ask(self) -> None:
        self._stdin.write("?\n")
        self._stdin.flush()

    def next(self, wanted: Callable[[str], bool], what: str) -> str:
        """The next line that is wanted.

        Raises:
            Failed: it does not come.
        """
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise Failed(f"waited {SECONDS:.0f} s for {what}; said so far:\n{self._so_far()}") from None
            if line is None:
                raise Failed(f"ended before {what}; it said:\n{self._so_far()}")
            if wanted(line):
                return line

    def end(self) -> int:
        """Ask it to end; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._stdin.close()
            self._stdout.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _read(self) -> None:
        for line in self._stdout:
            self.heard.append(line.rstrip("\n"))
            self._lines.put(self.heard[-1])
        self._lines.put(None)

    def _so_far(self) -> str:
        return "\n".join(f"    {line}" for line in self.heard) or "    nothing"


def message(line: str) -> str:
    """The sentence in a log line (logfmt)."""
    found = re.search(r' msg=(?:"((?:[^"\\]|\\.)*)"|(\S+))', line)
    if not found:
        return line
    return re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else found[2]


# --- what is dropped ---


@dataclass(frozen=True)
class Form:
    """Images or directories: how a version of the configuration is made, and what it is called.

    Attributes:
        what: for people.
        suffix: of each version's name.
        tools: what makes images, by file system; empty for directories.
    """

    what: str
    suffix: str
    tools: tuple[tuple[str, str], ...] = ()

    @property
    def drop(self) -> str:
        """Name of the directory that versions are dropped into."""
        return f"web{self.suffix}.v"

    def name(self, version: int) -> str:
        return f"web_{version}{self.suffix}"

    def make(self, where: Path, version: int, made_for: str = "_any") -> Path:
        """One version, ready to be dropped."""
        tree = where / f"web_{version}"
        releases = tree / "etc/extension-release.d"
        releases.mkdir(parents=True)
        (releases / "extension-release.web").write_text(f"ID={made_for}\n")
        (tree / "etc/web.conf").write_text(f"Hello from version {version}\n")
        (tree / "etc/web.data").write_bytes(os.urandom(200_000))
        if not self.tools:
            return tree
        image = where / self.name(version)
        tool, fstype = self.tools[version % len(self.tools)]
        words = [tool, str(tree), str(image), "-quiet", "-no-progress", "-noappend"]
        if fstype == "erofs":
            words = [tool, "--quiet", str(image), str(tree)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Failed(f"{tool} failed: {made.stderr.strip()}")
        return image


TREES = Form("directories", "")


def best_form(where: Path, screen: Screen) -> Form:
    """Images, if there is a tool that makes them and this machine can mount what it makes; else directories."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    good = []
    reason = "neither mksquashfs (squashfs-tools) nor mkfs.erofs (erofs-utils) is installed"
    for program, fstype in (("mksquashfs", "squashfs"), ("mkfs.erofs", "erofs")):
        tool = shutil.which(program, path=path)
        if tool is None:
            continue
        scratch = where / fstype
        form = Form(fstype, ".raw", ((tool, fstype),))
        image = form.make(scratch, 0)
        done = subprocess.run([*COMMAND, "check", str(image)], capture_output=True, text=True, check=False)
        shutil.rmtree(scratch)
        if done.returncode == 0:
            good.append((tool, fstype))
        else:
            reason = (done.stdout + done.stderr).strip().removeprefix(f"{image}: ")
    if good:
        return Form(f"images ({' and '.join(fstype for _, fstype in good)})", ".raw", tuple(good))
    screen.plain(f"Directories instead of images: {reason}.")
    return TREES


# --- the demonstration ---


class Demo:
    """The steps, in order, in the directory `where`."""

    def __init__(self, where: Path, form: Form, screen: Screen) -> None:
        self._where = where
        self._form = form
        self._screen = screen
        self._drop = where / "web.service.confext.d" / form.drop
        self._drop.mkdir(parents=True)
        # Less than by default, so that all of it takes about ten seconds.
        (where / "conf").mkdir()
        (where / "conf/watcher.conf").write_text("[Watcher]\nSettleTreeSec=500ms\nRemoveSec=500ms\n")
        self._environment = os.environ | {
            "RUNTIME_DIRECTORY": str(where / "run"),
            "STATE_DIRECTORY": str(where / "state"),
            "CONFIGURATION_DIRECTORY": str(where / "conf"),
        }
        self._daemon: Talker
        self._program: Talker

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            self._daemon = Talker([*COMMAND, "run"], self._environment)
            stack.callback(self._daemon.end)
            self._daemon.next(lambda line: "watching for" in line, "the daemon to be ready")
            self._start(stack)
            self._first()
            self._new_version()
            self._stalled()
            self._broken()
            self._removed()
            self._all_removed()

    def _start(self, stack: contextlib.ExitStack) -> None:
        self._screen.title("A program is started. Nothing has been dropped for it yet.")
        options = ["--name", "web.service", "--confext-dir", "web.service.confext.d"]
        options += ["--reload-signal", "SIGHUP"]
        self._screen.command(" ".join(["confext-watcher exec", *options, "-- python3 web.py"]))
        options[3] = str(self._drop.parent)
        script = self._where / "web.py"
        script.write_text(PROGRAM)
        words = [*COMMAND, "exec", *options, "--", sys.executable, str(script)]
        self._program = Talker(words, self._environment)
        stack.callback(self._program.end)
        self._sees(self._program.next(lambda line: line.startswith("ready"), "the program to be ready"))

    def _first(self) -> None:
        self._screen.title("A first version is copied into the directory.")
        self._copy(1)
        self._applied()

    def _new_version(self) -> None:
        self._screen.title("A new version, moved into place under its final name: so does rsync.")
        source = self._form.make(self._where, 2)
        self._screen.command(f"mv {source.name} {self._drop.parent.name}/{self._form.drop}/")
        os.rename(source, self._drop / source.name)
        self._applied()

    def _stalled(self) -> None:
        self._screen.title(f"An upload that stalls half-way, for {STALL:.0f} seconds. Nothing may happen.")
        source = self._form.make(self._where, 3)
        target = self._drop / source.name
        self._screen.command(f"scp {'-r ' * source.is_dir()}{source.name} HOST:.../{self._form.drop}/")
        if source.is_dir():  # all of it but for its one file
            shutil.copytree(source, target, ignore=lambda _, names: {"web.conf"} & set(names))
            source, target = source / "etc/web.conf", target / "etc/web.conf"
        data = source.read_bytes()
        before = len(self._daemon.heard)
        with open(target, "wb", buffering=0) as upload:
            upload.write(data[: len(data) // 2])
            time.sleep(STALL)  # this is the step itself: nothing may be waited for
            self._sees(self._asked())
            if said := self._daemon.heard[before:]:
                raise Failed(f"the daemon should have waited, and said: {said}")
            self._screen.beside("daemon log", "(nothing: it waits)")
            self._screen.plain("  The rest arrives.")
            upload.write(data[len(data) // 2 :])
        self._applied()

    def _broken(self) -> None:
        if self._form.tools:
            self._screen.title("A broken image: the connection was cut before the end.")
            source = self._form.make(self._where, 4)
            self._screen.command(
                f"head -c 100000 {source.name} > {self._drop.parent.name}/{self._form.drop}/{source.name}"
            )
            (self._drop / source.name).write_bytes(source.read_bytes()[:100_000])
        else:
            self._screen.title("A version that was made for another system.")
            self._copy(4, made_for="another-system")
        line = self._daemon.next(lambda line: " outcome=" in line, "the daemon's verdict")
        if "outcome=applied" in line:
            raise Failed(f"this should not have been applied: {line}")
        self._sees(self._asked())
        self._screen.beside("daemon log", message(line), "33")

    def _removed(self) -> None:
        self._screen.title("Both are removed: back to the version before.")
        self._remove(4)
        self._remove(3)
        self._applied()

    def _all_removed(self) -> None:
        self._screen.title("Everything is removed: back to the machine's own /etc.")
        self._remove(2)
        self._remove(1)
        # Both at once, or one after the other.
        line = self._daemon.next(lambda line: " removed, applied" in line, "all to be removed")
        self._sees(self._asked())
        self._screen.beside("daemon log", message(line), "32")

    def _copy(self, version: int, made_for: str = "_any") -> None:
        source = self._form.make(self._where, version, made_for)
        self._screen.command(
            f"cp {'-r ' * source.is_dir()}{source.name} {self._drop.parent.name}/{self._form.drop}/"
        )
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, self._drop / source.name)

    def _remove(self, version: int) -> None:
        path = self._drop / self._form.name(version)
        self._screen.command(
            f"rm {'-r ' * path.is_dir()}{self._drop.parent.name}/{self._form.drop}/{path.name}"
        )
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _applied(self) -> None:
        line = self._daemon.next(lambda line: "outcome=applied" in line, "it to be applied")
        self._sees(self._program.next(lambda said: said.startswith("reload"), "the program to reload"))
        self._screen.beside("daemon log", message(line), "32")

    def _asked(self) -> str:
        self._program.ask()
        return self._program.next(lambda line: line.startswith("asked"), "the program's answer")

    def _sees(self, line: str) -> None:
        _, reloads, *found = line.split(" ", 2)
        what = f'"{found[0]}"' if found and found[0] else "not there"
        times = "once" if reloads == "1" else f"{reloads} times"
        told = "not told to reload yet" if reloads == "0" else f"told to reload {times} so far"
        self._screen.beside("program", f"/etc/web.conf: {what}; {told}")


# --- nothing left behind ---


def left_behind(where: Path, mounts_before: set[str]) -> list[str]:
    """What is still there of a demonstration that ran in `where`; the kernel gets a moment to tidy up."""
    deadline = time.monotonic() + 5
    while (found := sorted(_left(where, mounts_before))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _left(where: Path, mounts_before: set[str]) -> Iterator[str]:
    if where.exists():
        yield f"the directory {where}"
    for line in mounts() - mounts_before:
        point = line.split()[4]
        if point.startswith(("/etc", "/sys", str(where))):
            yield f"a mount on {point}"
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(where) in backing.read_text():
                yield f"the loop device {backing.parts[3]}"
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.name != str(os.getpid()) and mark in (process / "environ").read_bytes().split(b"\0"):
                yield f"process {process.name}"


def mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


# --- as whom ---


def can_mount() -> bool:
    """Whether we may make mount namespaces as we are."""
    return _succeeds("unshare", "--mount", "true")


def enter_user_namespace() -> None:
    """Start again as root of a user namespace of our own.

    Raises:
        Failed: that is forbidden here.
    """
    words = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "slave"]
    if INSIDE in os.environ or not _succeeds(*words, "true"):
        raise Failed(
            "this needs root, or permission to make user namespaces, which this machine does not give you"
        )
    os.environ[INSIDE] = "1"
    sys.stdout.flush()
    os.execvp(words[0], [*words, sys.executable, *sys.argv])


def _succeeds(*words: str) -> bool:
    try:
        return not subprocess.run(words, capture_output=True, check=False).returncode
    except FileNotFoundError as error:
        raise Failed(f"{words[0]} is not installed (util-linux)") from error


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what confext-watcher does.")
    parser.add_argument(
        "--without-root", action="store_true", help="as an ordinary user sees it, also as root"
    )
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH", "")))
    )
    os.environ.setdefault(MARK, uuid.uuid4().hex)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    screen = Screen()
    try:
        if INSIDE not in os.environ and (options.without_root or not can_mount()):
            enter_user_namespace()
        left = _show(screen)
    except Failed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    screen.title("Left behind: " + (", ".join(left) or "nothing. No file, mount, loop device or process."))
    return 1 if left else 0


def _show(screen: Screen) -> list[str]:
    before = mounts()
    where = Path(tempfile.mkdtemp(prefix="confext-demo-"))
    try:
        root = INSIDE not in os.environ
        form = best_form(where, screen) if root else TREES
        who = "as root" if root else "without root, in a sandbox of its own (a user namespace)"
        screen.plain(f"confext-watcher on Linux {platform.release()}, {who}: with {form.what}.")
        screen.plain(f"All of it happens in {where}.")
        Demo(where, form, screen).run()
    finally:
        shutil.rmtree(where)
    return left_behind(where, before)


if __name__ == "__main__":
    sys.exit(main())
