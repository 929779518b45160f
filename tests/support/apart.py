# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that must not run in this process: with other namespaces, limits or privileges.

What is decorated with `@apart("unshare", "--mount")` runs in a second pytest, under that command, and what it does to
the machine ends with it. A module's tests under the same command share one: starting pytest takes longer than they do.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ParamSpec

import pytest

from support import CHECKOUT

Parameters = ParamSpec("Parameters")
Test = Callable[Parameters, Awaitable[None]]
Command = tuple[str, ...]

INSIDE = "CONFEXT_WATCHER_TEST_APART"
SHARED = "CONFEXT_WATCHER_TEST_SHARED"
"""Environment variable: directory that the processes that run tests have in common (conftest.py)."""

_tests: dict[tuple[Command, str], list[str]] = {}


def apart(*command: str) -> Callable[[Test[Parameters]], Test[Parameters]]:
    """A decorator for asynchronous tests; `command` is what their Python interpreter is started under."""

    def decorate(test: Test[Parameters]) -> Test[Parameters]:
        file = test.__code__.co_filename
        _tests.setdefault((command, file), []).append(f"{file}::{test.__name__}")

        @functools.wraps(test)
        async def outer(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            if INSIDE in os.environ:
                await test(*args, **kwargs)
                return
            name = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].partition("::")[2]
            passed, output = _run(command, file)
            assert name in passed, f"under {' '.join(command)}:\n{output}"

        # For conftest.py. The first one waits for all of them.
        outer.apart = command, file  # type: ignore[attr-defined]
        return pytest.mark.limit(600)(outer)

    return decorate


@functools.cache
def _run(command: Command, file: str) -> tuple[frozenset[str], str]:
    """Names of the tests that passed, and what pytest printed."""
    printed = _printed_once(command, file) if SHARED in os.environ else _printed(command, file)
    return frozenset(re.findall(r"^PASSED \S+?\.py::(.*)$", printed, re.MULTILINE)), printed


def _printed_once(command: Command, file: str) -> str:
    """Of several processes that have tests of a module, the first runs all; the others wait for it."""
    name = hashlib.sha256(repr((command, file)).encode()).hexdigest()
    with Path(os.environ[SHARED], f"apart-{name}").open("a+") as found:
        fcntl.flock(found, fcntl.LOCK_EX)
        found.seek(0)
        printed = found.read()
        if not printed:
            printed = _printed(command, file)
            found.write(printed)
        return printed


def _printed(command: Command, file: str) -> str:
    inner = [sys.executable, "-m", "pytest", "-rA", "--no-header", "-p", "no:cacheprovider"]
    # Of its own: two that tidy up the same directory get into each other's way.
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [*command, *inner, f"--basetemp={scratch}/tests", *_tests[command, file]],
            cwd=CHECKOUT,
            env=os.environ | {INSIDE: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    return done.stdout
