# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README tells people to type does what it says there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import CHECKOUT
from support.needs import root, tool
from watcher.settings import config
from watcher.settings.config import Settings

README = (CHECKOUT / "README.md").read_text()

# In one shell, as somebody would who follows it, and waits to see what comes of a step before the next one.
SETTLED = """
seen() { until tr '\\n' ' ' <log | grep -q "$1"; do kill -0 $daemon; sleep 0.02; done; }
heard() { until grep -q "$1" reloads; do kill -0 $service; sleep 0.02; done; }
"""


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    command = bin_ / "confext-watcher"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {sys.executable} -m watcher "$@"\n')
    command.chmod(0o755)
    yield tmp_path


def script() -> str:
    make, start, drop, deploy, rollback, review = blocks()
    start = start.replace(
        "confext-watcher run &", "confext-watcher run 2>log & daemon=$!; seen 'watching for'"
    )
    start = start.rstrip().removesuffix("&") + ">reloads & service=$!"
    ready = "until confext-watcher status | grep 'web 1.3'; do sleep 0.1; done"
    # Two signals in quick succession are one to a shell.
    applied = "seen '1.3 -> 1.4 applied'; heard 'port = 8081'"
    parts = [SETTLED, make, start, ready, drop, applied, deploy, rollback]
    return "\n".join([*parts, "seen '1.5 -> 1.4 .*1.4 -> 1.5'", review, "kill $service $daemon; wait"])


@root
@tool("mksquashfs")
def test_following_it_from_top_to_bottom(place: Path) -> None:
    environment = os.environ | {
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "RUNTIME_DIRECTORY": f"{place}/run",
        "STATE_DIRECTORY": f"{place}/state",
        "CONFIGURATION_DIRECTORY": f"{place}/conf",
    }
    with subprocess.Popen(
        ["bash", "-eu", "-c", script()],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    log = (place / "log").read_text()
    for line in (
        "web_1.4.raw: good: web 1.4, squashfs",
        "web.service: web 1.4 -> 1.5 applied in",  # wait
        "web.service: web 1.5 -> 1.4 applied in",  # rollback
        "It stays there until `confext-watcher rollback --forget web.service`.",
        "web.service: free to have what is newest",
        "web.service: no change",  # plan
    ):
        assert line in output, output + log
    reloads = (place / "reloads").read_text().splitlines()
    assert reloads[0] == "port = 8081"
    assert reloads[-1] == "port = 8080"
    assert process.returncode == 0, output + log


def test_it_names_the_settings_as_they_are() -> None:
    settings = Settings()
    text = " ".join(README.split())
    assert f"`SettleSec=`, {settings.settle_usec // 1000} ms" in text
    assert f"for {settings.settle_tree_usec // 1_000_000} seconds (`SettleTreeSec=`)" in text
    assert f"after {settings.remove_usec // 1_000_000} seconds (`RemoveSec=`)" in text
    assert settings.keep_stacks == 3 and "last three stacks" in text
    assert f"{settings.store_max >> 30} GiB in all" in text
    assert f"{settings.image_max >> 30} GiB for one" in text
    assert "Linux 6.8" in text and config.KERNEL_OLDEST == (6, 8)


def test_the_commands_that_it_names_are_there() -> None:
    words = [sys.executable, "-m", "watcher", "--help"]
    said = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    code = "\n".join(re.findall(r"```.*?```|`[^`]*`", README, re.DOTALL))
    named = set(re.findall(r"(?:^# |^|`|HOST )confext-watcher ([a-z]+)\b", code, re.MULTILINE))
    assert {"init", "build", "wait", "doctor"} <= named
    assert named <= set(re.findall(r"^ {4}(\w+)", said.partition("COMMAND\n")[2], re.MULTILINE))


def test_it_links_to_what_is_there() -> None:
    for path in re.findall(r"`(?:man )?(contrib/[^`, ]+)`", README):
        assert (CHECKOUT / path).exists(), path
    makefiles = [CHECKOUT / "Makefile", *CHECKOUT.glob("contrib/packaging/*.mk")]
    targets = "".join(path.read_text() for path in makefiles)
    for target in re.findall(r"\bmake ([a-z-]+)\b", README):
        if target not in ("a", "it"):
            assert f"\n{target}:" in targets, target
