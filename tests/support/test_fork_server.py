# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is forked finds what it would find if it were started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from support import fork_server, portrait
from support.needs import userns

PORTRAIT = (sys.executable, str(portrait.__file__))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "input": {"stdin": subprocess.PIPE},
    "another directory and environment": {"cwd": "/", "env": {**os.environ, "WORD": "ä\udcff"}},
    "errors with the output": {"stderr": subprocess.STDOUT},
}


def shown(out: str) -> dict[str, Any]:
    """The portrait, in whatever order it and the other line came."""
    found: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    return found


def told(kind: type[subprocess.Popen[Any]], options: dict[str, Any], *words: str) -> tuple[int, str, str]:
    # readline sets some variables behind Python's back.
    usual = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": dict(os.environ),
    }
    with kind([*PORTRAIT, *words], text=True, **(usual | options)) as process:
        out, err = process.communicate("said" if process.stdin else None)
    return process.returncode, out, err or ""


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fork_finds_what_a_start_finds(options: dict[str, Any]) -> None:
    before = fork_server.server().forks
    forked = told(fork_server.Popen, options, "word", "another word")
    assert fork_server.server().forks == before + 1
    started = told(subprocess.Popen, options, "word", "another word")
    assert shown(forked[1]) == shown(started[1])
    assert (forked[0], forked[2]) == (started[0], started[2])
    assert shown(forked[1])["parent"] == os.getpid()
    assert shown(forked[1])["arguments"] == ["word", "another word"]


@pytest.mark.parametrize("words", [["exit", "0"], ["exit", "3"], ["raise"]], ids=" ".join)
def test_it_ends_as_a_start_does(words: list[str]) -> None:
    forked, started = told(fork_server.Popen, {}, *words), told(subprocess.Popen, {}, *words)
    assert forked[:2] == started[:2]
    assert forked[2].splitlines()[-1:] == started[2].splitlines()[-1:]  # the way to the error is another


def test_it_is_killed_like_any_other() -> None:
    with fork_server.Popen([*PORTRAIT, "wait"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_what_a_fork_cannot_have_is_really_started() -> None:
    before = fork_server.server().forks
    for options in ({"env": {"LC_ALL": "C"}}, {"start_new_session": True}, {"preexec_fn": os.getpid}):
        assert told(fork_server.Popen, options)[0] == 0
    assert fork_server.server().forks == before


@userns
def test_it_can_be_started_inside_of_another_processs_namespaces() -> None:
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo; exec sleep infinity"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.read(1)
        forked = told(fork_server.Popen, {"inside": holder.pid})
        started = subprocess.run(
            [*fork_server.entering(holder.pid), *PORTRAIT],
            env=dict(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        holder.kill()
    assert shown(forked[1]) == shown(started.stdout)
