# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service's user who owns the service's root directory exchanges its /etc with a link to what is the host's, while
stacks come and go: at each step of a swap, and as fast as he can. Whatever becomes of the swap, he never gets that."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from support.needs import root
from support.nobody import NOBODY
from support.service import Service
from watcher.model import Copy, Layer, Refused, Stack
from watcher.mounts.etc import Moved
from watcher.mounts.process import may_mount
from watcher.mounts.swap import swap
from watcher.mounts.table import Mounted

from .conftest import Layers, Swaps

pytestmark = [root, pytest.mark.skipif(not may_mount(), reason="needs root of the machine: another user")]

Start = Callable[..., Service]

LINK = "exchanged"
MARKER = "of-the-host"
EXCHANGER = Path(__file__).with_name("exchanger.py")


@contextlib.contextmanager
def exchanger(directory: Path, how: str, other: str = LINK) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXCHANGER), str(directory), "etc", other, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert int(process.stdout.readline()) > 0, "it exchanged nothing"


@pytest.fixture
def own_root(service: Service, tmp_path: Path) -> Path:
    """The service's root directory, as seen from outside; it belongs to the service's user."""
    directory = tmp_path / "root-0"
    os.chown(directory, NOBODY, NOBODY)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / MARKER).touch()
    (directory / LINK).symlink_to(tmp_path / "host")
    return directory


@pytest.fixture
def exchange(own_root: Path) -> Iterator[Callable[[], None]]:
    with exchanger(own_root, "once") as process:
        yield functools.partial(_exchange, process)


def _exchange(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


def shown(service: Service) -> set[str]:
    """All that `/etc` shows, wherever it is now; nothing while it is just being exchanged."""
    names: set[str] = set()
    for path in ("/etc", f"/{LINK}"):
        opened = f"os.open({path!r}, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)"
        with contextlib.suppress(NotADirectoryError, FileNotFoundError):
            names |= set(service(f"[(os.listdir(fd), os.close(fd)) for fd in [{opened}]]")[0][0])
    return names


class Told(dict[str, Copy]):
    """Calls back when it is asked for a copy: after the first look at the service, before the stack is made."""

    def __init__(self, copies: Mapping[str, Copy], then: Callable[[], None]) -> None:
        super().__init__(copies)
        self.then = then

    def __getitem__(self, digest: str) -> Copy:
        self.then()
        return super().__getitem__(digest)


STEPS = ("while it is looked at", "before the stack is made", "before it is put there", "after it")


@pytest.mark.parametrize("has_stack", [False, True], ids=["the first stack", "the next stack"])
@pytest.mark.parametrize(("there", "back"), list(itertools.combinations(STEPS, 2)))
def test_exchanged_at_a_step_and_back_at_another(
    service: Service,
    swaps: Swaps,
    layers: Layers,
    exchange: Callable[[], None],
    there: str,
    back: str,
    has_stack: bool,
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    if has_stack:
        swaps(service, one)
    pending = [back, there]

    def at(step: str) -> None:
        if pending and pending[-1] == step:
            pending.pop()
            exchange()

    def keep(_: Mounted) -> bool:
        at(STEPS[0])
        return False

    workers, copies = swaps.workers, Told(layers.copies, lambda: at(STEPS[1]))
    begin = functools.partial(at, STEPS[2])
    with contextlib.suppress(Refused, Moved):
        workers.submit(swap, workers, service.namespace, Stack((two,)), copies, begin, keep).result()
    assert "base.conf" in shown(service) and MARKER not in shown(service)
    while pending:
        at(pending[-1])
    assert "base.conf" in shown(service) and MARKER not in shown(service)
    swaps(service, two)
    assert (service.read("/etc/web.conf"), service.read("/etc/base.conf")) == ("2", "base")
    swaps(service)
    assert service("rows()") == []


def test_exchanged_all_the_time(service: Service, swaps: Swaps, layers: Layers, own_root: Path) -> None:
    stacks: tuple[tuple[Layer, ...], ...] = (
        (layers.tree({"web.conf": "1"}),),
        (layers.tree({"web.conf": "2"}),),
        (),
    )
    done = 0
    with exchanger(own_root, "racing"):
        for number in range(200):
            with contextlib.suppress(Refused, Moved):
                done += swaps(service, *stacks[number % 3]).done
            assert MARKER not in shown(service), f"at swap {number}"
    assert done, "none came through"
    swaps(service, *stacks[0])
    assert (service.read("/etc/web.conf"), service.read("/etc/base.conf")) == ("1", "base")
    assert MARKER not in shown(service)


def test_exchanged_with_a_directory_in_which_the_sandbox_hides_something(
    service: Service, swaps: Swaps, layers: Layers, own_root: Path
) -> None:
    """Its mounts are at another path in the mount table that has been read."""
    service("(os.mkdir('/other'), write('/other/secret', 'to be hidden'), write('/none', ''))")
    service("(write('/other/base.conf', 'other'), bind('/none', '/other/secret'))")
    pending = [True]
    with exchanger(own_root, "once", "other") as process:

        def keep(_: Mounted) -> bool:
            if pending:
                pending.pop()
                _exchange(process)
            return False

        workers, stack = swaps.workers, Stack((layers.tree({"web.conf": "1"}),))
        workers.submit(swap, workers, service.namespace, stack, layers.copies, keep=keep).result()
    assert [service.read(f"/etc/{name}") for name in ("web.conf", "base.conf")] == ["1", "other"]
    assert service.read("/etc/secret") == ""


@pytest.mark.parametrize("above", ["", "sub/"])
def test_a_directory_above_a_sandbox_mount_is_renamed_and_another_made_in_its_place(
    service: Service, swaps: Swaps, layers: Layers, above: str
) -> None:
    service(
        "(write('/none', ''), os.makedirs('/etc/app/sub', exist_ok=True), write('/etc/app/sub/private', 'hidden'))"
    )
    service(f"bind('/none', '/etc/app/{above}private')")
    pending = [True]

    def keep(_: Mounted) -> bool:
        if pending:
            pending.pop()
            service(f"(os.rename('/etc/app', '/etc/moved'), os.makedirs('/etc/app/{above}'))")
            service(f"write('/etc/app/{above}private', 'decoy')")
        return False

    workers, stack = swaps.workers, Stack((layers.tree({"web.conf": "1"}),))
    workers.submit(swap, workers, service.namespace, stack, layers.copies, keep=keep).result()
    assert (service.read("/etc/web.conf"), service.read(f"/etc/moved/{above}private")) == ("1", "")
    assert service.read(f"/etc/app/{above}private") == "decoy"
