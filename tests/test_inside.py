# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whom a command is made like: by a real process, in a namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from needs import root, tool
from watcher import inside
from watcher.model import Later
from watcher.order import Like, Order
from watcher.process import Process

pytestmark = [root, tool("unshare"), tool("chroot")]

JAILED = """
cd "$0" && mkdir usr proc && echo yes >inside && mount --bind /usr usr && mount --bind /proc proc
for name in bin lib lib64; do ln -s usr/$name $name; done
exec chroot . /bin/sh -c 'echo ready; exec sleep 1000'
"""


@pytest.fixture
def jail(tmp_path: Path) -> Path:
    path = tmp_path / "above/jail"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def main(jail: Path) -> Iterator[Process]:
    """A process that has chrooted itself."""
    words = ["unshare", "--mount", "sh", "-ec", JAILED, str(jail)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with Process(child.pid) as process:
            yield process
        child.kill()


async def run(main: Process, who: Like, *words: str) -> inside.Ended:
    namespace = main.namespace()
    try:
        with inside.namespaces(main, namespace) as paths:
            order = Order(paths, who, words, contained=True)
            return await inside.run(order, timeout_sec=30)
    finally:
        os.close(namespace)


async def test_its_root_directory_is_that_of_the_process(main: Process, jail: Path) -> None:
    ended = await run(main, inside.like(main, {}), "/bin/cat", "/inside")
    assert (ended.reason, ended.output) == ("", "yes\n")


def linked(jail: Path) -> None:
    jail.rename(jail.with_name("aside"))
    jail.symlink_to("/")


def linked_above(jail: Path) -> None:
    jail.parent.rename(jail.parent.with_name("aside"))
    jail.parent.symlink_to("/")
    assert not os.path.exists("/jail")


def another(jail: Path) -> None:
    jail.rename(jail.with_name("aside"))
    (jail / "usr").mkdir(parents=True)
    (jail / "bin").symlink_to("/usr/bin")


@pytest.mark.parametrize("exchange", [linked, linked_above, another])
async def test_whoever_exchanges_the_root_directory_gets_nothing_run(
    main: Process, jail: Path, exchange: Callable[[Path], None]
) -> None:
    who = inside.like(main, {})
    exchange(jail)
    ended = await run(main, who, "/bin/true")
    assert ended.reason == (
        "cannot be started: it cannot be given the service's namespaces, user, root or capabilities"
    )
    assert ended.output == ""


async def test_what_cannot_be_executed_is_said(main: Process) -> None:
    ended = await run(main, inside.like(main, {}), "/nowhere")
    assert ended.reason == "cannot be started: No such file or directory"


async def test_what_was_to_run_it_says_why_it_has_failed(
    main: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = (sys.executable, "-c", r"import sys; sys.exit('Traceback\nno such module')")
    monkeypatch.setattr(inside, "PROGRAM", failing)
    with pytest.raises(Later, match=r"what was to run it has failed \(no such module\)$"):
        await run(main, inside.like(main, {}), "/bin/true")
