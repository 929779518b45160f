#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the picture in README, of commands that are run: `sudo .venv/bin/python contrib/picture.py`.

All of it happens in a mount namespace with an empty /srv, so that nothing is left, and paths are the same in each run.
rich draws the SVG (`Console.export_svg()`): it is there anyway, for tables.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

CHECKOUT = Path(__file__).resolve().parent.parent
PICTURE = CHECKOUT / "contrib/picture.svg"
COLUMNS = 94
SECONDS = 30

sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]
from support.screens import look  # noqa: E402

_SERVER = """
import os, signal, socket, sys, threading

def settings():
    found = {}
    for number, line in enumerate(open("/etc/web.conf"), 1):
        key, is_setting, value = line.partition(" = ")
        if not is_setting or key not in ("listen", "say"):
            sys.exit(f"/etc/web.conf:{number}: no setting: {line.strip()}")
        found[key] = value.strip()
    return found

def serve(*_):
    global server, says
    says = settings()["say"]
    new = socket.socket(socket.AF_UNIX)
    path = settings()["listen"]
    if os.path.exists(path):
        os.unlink(path)
    new.bind(path)
    new.listen()
    old, server = server, new
    if old:
        old.shutdown(socket.SHUT_RDWR)

def answer():
    while True:
        try:
            with server.accept()[0] as asked:
                asked.send(says.encode() + b"\\n")
        except OSError:
            pass

server = None
if sys.argv[1:] == ["--test"]:
    settings()
    sys.exit()
signal.signal(signal.SIGHUP, serve)
serve()
threading.Thread(target=answer, daemon=True).start()
while True:
    signal.pause()
"""
# As health check it sees the service's /etc: on a busy machine the server may be slow to take the signal. _socket: the
# import of socket takes its time there, too.
_ASK = """
import _socket, os, sys
asked = _socket.socket(_socket.AF_UNIX)
asked.settimeout(5)
try:
    asked.connect("/srv/web.sock")
except OSError as error:
    sys.exit(f"/srv/web.sock: {error.strerror}")
said = asked.recv(99).decode()
if os.path.exists("/etc/web.conf") and f"say = {said}" not in open("/etc/web.conf").read():
    sys.exit(f"it still says: {said}")
print(said, end="")
"""
_PROGRAM = """#!{python} -ISB
{text}"""

# What each version of the configuration says.
_VERSIONS = {
    "1.3": "listen = /srv/web.sock\nsay = hello\n",
    "1.4": "listen = /srv/web.sock\nsay = hello, world\n",
    "1.5": "lisen = /srv/web.sock\nsay = hello, moon\n",
    "1.6": "listen = /srv/wbe.sock\nsay = hello, sun\n",
}
_DROP = "web.confext.d/web.raw.v"
SESSION = (
    "ask-web",
    f"cp web_1.4.raw {_DROP}/",
    "ask-web",
    "confext-watcher history",
    "",
    "# The service's own check refuses the next one:",
    f"cp web_1.5.raw {_DROP}/",
    "ask-web",
    "",
    "# This one passes the check, but then nobody answers:",
    f"cp web_1.6.raw {_DROP}/",
    "ask-web",
    "",
    "confext-watcher status",
)
_COPY = re.compile(r"cp (web_.*\.raw) ")


def session() -> str:
    """What a terminal has when these commands were typed, with its control sequences."""
    with _place() as environment:
        return "".join(_typed(command, environment) for command in SESSION)


def _typed(command: str, environment: dict[str, str]) -> str:
    if not command or command.startswith("#"):
        return f"\x1b[2m{command}\x1b[0m\n"
    shown = f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m\n"
    seen = look(["sh", "-c", command], columns=COLUMNS, environment=environment)
    if copied := _COPY.match(command):  # a person looks a moment later
        words = ["confext-watcher", "wait", "--timeout", str(SECONDS), "web", copied[1]]
        subprocess.run(words, env=environment, capture_output=True, check=False)
    return shown + seen.written.replace("\r\n", "\n")


@contextlib.contextmanager
def _place() -> Iterator[dict[str, str]]:
    """A daemon and a server on version 1.3 in /srv; the environment of the commands. The working directory is there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "picture", "/srv"], check=True)
    os.chdir("/srv")
    environment = os.environ | {
        "PATH": f"/srv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        "RUNTIME_DIRECTORY": "/srv/run",
        "STATE_DIRECTORY": "/srv/state",
        "CONFIGURATION_DIRECTORY": "/srv/conf",
    }
    os.mkdir("bin")
    python = sys.executable
    for name, text in {
        "web": _PROGRAM.format(python=python, text=_SERVER),
        "ask-web": _PROGRAM.format(python=python, text=_ASK),
        "confext-watcher": f'#!/bin/sh\nexec {shlex.quote(python)} -m watcher "$@"\n',
    }.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    for version, text in _VERSIONS.items():
        Path("web.conf").write_text(text)
        words = ["confext-watcher", "build", "etc/web.conf=web.conf", "-o", f"web_{version}.raw"]
        subprocess.run(words, env=environment, check=True, capture_output=True)
    os.makedirs(_DROP)
    os.rename("web_1.3.raw", f"{_DROP}/web_1.3.raw")
    start = ["confext-watcher", "exec", "--name", "web.service", "--confext-dir", "web.confext.d"]
    start += ["--check", "web --test", "--health-check", "ask-web", "--set", "HealthCheckSec=2s"]
    start += ["--set", "HealthStableSec=500ms", "--reload-signal", "SIGHUP", "--", "web"]
    with _running(["confext-watcher", "run"], environment), _running(start, environment):
        _until(["ask-web"], environment)
        _until(["sh", "-c", "confext-watcher status web | grep -q 'web 1.3'"], environment)
        yield environment


@contextlib.contextmanager
def _running(words: list[str], environment: dict[str, str]) -> Iterator[None]:
    path = Path(f"{words[1]}.log")
    with path.open("w") as log, subprocess.Popen(words, env=environment, stdout=log, stderr=log) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)


def _until(words: list[str], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + SECONDS
    while (done := subprocess.run(words, env=environment, capture_output=True, check=False)).returncode:
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in Path().glob("*.log"))
            sys.exit(f"picture: {words} fails: {done.stdout!r} {done.stderr!r}\n{logs}")
        time.sleep(0.1)


def draw(written: str) -> str:
    """The SVG of what was written to a terminal, without fonts from elsewhere: pages of forges load none."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="standard"
        )
        console.print(Text.from_ansi(written), soft_wrap=False)
        svg = console.export_svg(title="confext-watcher", theme=MONOKAI, unique_id="picture")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def apart() -> None:
    """Start again in a mount namespace of our own."""
    words = ["unshare", "--mount", "--propagation", "slave", sys.executable, *sys.argv]
    os.execvpe(words[0], words, os.environ | {"CONFEXT_WATCHER_PICTURE": "1"})


if __name__ == "__main__":
    if any(Path(path).is_relative_to("/srv") for path in (CHECKOUT, sys.executable)):
        sys.exit("picture: this needs /srv for itself, and cannot run from there")
    if "CONFEXT_WATCHER_PICTURE" not in os.environ:
        apart()
    written = session()
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(written)
    else:
        PICTURE.write_text(draw(written))
