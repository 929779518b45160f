# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo` shows what it claims, to root and to anybody else, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import pty
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from support.needs import root, tool, userns, which
from support.nobody import AS_NOBODY, NOBODY

DEMO = Path(__file__).parent.parent / "contrib/demo.py"
# setpriv looks up what it executes with root's rights still, so there is a shell in between.
SHELL_OF_NOBODY = (*AS_NOBODY, "sh", "-c", 'exec "$0" "$@"')

# What the program found in /etc, step by step, and how often it had been told to reload.
SEEN = [
    "not there; not told to reload yet",
    '"Hello from version 1"; told to reload once so far',
    '"Hello from version 2"; told to reload 2 times so far',
    '"Hello from version 2"; told to reload 2 times so far',  # half an upload
    '"Hello from version 3"; told to reload 3 times so far',
    '"Hello from version 3"; told to reload 3 times so far',  # a broken one
    '"Hello from version 2"; told to reload 4 times so far',
    "not there; told to reload 5 times so far",
]


def seen(output: str) -> list[str]:
    return re.findall(r"^ +program +/etc/web.conf: (.*)$", output, re.MULTILINE)


def logged(output: str) -> list[str]:
    return re.findall(r"^ +daemon log +(.*)$", output, re.MULTILINE)


def show(scratch: Path, *options: str) -> str:
    """Run it; its output. Its scratch files go to the directory `scratch`, where nothing may be left."""
    done = subprocess.run(
        [sys.executable, str(DEMO), *options],
        env=os.environ | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert os.listdir(scratch) == []
    return done.stdout


def check_story(output: str, refusal: str) -> None:
    assert seen(output) == SEEN
    first, second, stalled, third, broken, back, gone = logged(output)
    assert "web 1 added, applied in" in first
    assert "web 1 -> 2 applied in" in second
    assert stalled.startswith("(nothing")
    assert "web 2 -> 3 applied in" in third
    assert refusal in broken
    assert broken.endswith("it keeps web 3")
    assert "web 3 -> 2 applied in" in back
    assert "removed, applied in" in gone
    assert "\nLeft behind: nothing." in output
    assert "\x1b" not in output


@root
@tool("mksquashfs")
@tool("mkfs.erofs")
def test_root_sees_it_done_with_images(tmp_path: Path) -> None:
    output = show(tmp_path)
    assert "with images (squashfs and erofs)" in output
    check_story(output, "web_4.raw incomplete: 100000 of ")


@userns
def test_without_root_it_is_done_with_directories(tmp_path: Path) -> None:
    output = show(tmp_path, "--without-root")
    assert "without root" in output
    check_story(output, "refused: made for ID=another-system")


@functools.cache
def interpreter_for_all() -> str | None:
    """A Python that the user nobody can start, and that takes the modules of ours."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        words = [*SHELL_OF_NOBODY, python, "-c", "import trio, structlog, psutil, inotify_simple"]
        environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
        if (
            which(python)
            and subprocess.run(words, env=environment, capture_output=True, check=False).returncode == 0
        ):
            return python
    return None


@root
@userns
@tool("setpriv")
def test_a_user_without_any_rights_sees_it_too() -> None:
    python = interpreter_for_all()
    if python is None:
        pytest.skip("needs a Python and a checkout that everybody may read")
    with tempfile.TemporaryDirectory() as scratch:
        os.chown(scratch, NOBODY, NOBODY)
        done = subprocess.run(
            [*SHELL_OF_NOBODY, python, str(DEMO)],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": sysconfig.get_path("purelib"),
                "TMPDIR": scratch,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        check_story(done.stdout, "refused: made for ID=another-system")
        assert os.listdir(scratch) == []


@userns
@tool("setpriv")
def test_where_that_is_forbidden_it_says_so_in_one_line() -> None:
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all -- "$@"'
    words = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, str(DEMO)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"demo: this needs root, or permission to make user namespaces.*\n", done.stderr)


@userns
def test_on_a_terminal_it_has_colour(tmp_path: Path) -> None:
    main, other = pty.openpty()
    environment = os.environ | {"TMPDIR": str(tmp_path), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    words = [sys.executable, str(DEMO), "--without-root"]
    with subprocess.Popen(words, env=environment, stdin=other, stdout=other, stderr=other) as process:
        os.close(other)
        output = b""
        try:
            while chunk := os.read(main, 4096):
                output += chunk
        except OSError:  # EIO: nobody has the other end open any more
            pass
        os.close(main)
    assert process.returncode == 0, output.decode()
    assert b"\x1b[1mA program is started" in output
