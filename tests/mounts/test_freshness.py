# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real services follow the changes of their base, in the thread that does that: the tests of watch/freshness.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.needs import root, userns
from support.service import Service
from watcher.model import Layer
from watcher.mounts.process import may_mount
from watcher.mounts.refresh import views_of
from watcher.watch import base as watching
from watcher.watch import freshness as freshness_module
from watcher.watch.freshness import Freshness, Held

from .conftest import Layers, Swaps

pytestmark = root

not_in_user_namespace = pytest.mark.skipif(not may_mount(), reason="needs root of the machine")


class Bench:
    """Services on stacks that are followed."""

    def __init__(self, swaps: Swaps, path: Path) -> None:
        self.swaps, self.path = swaps, path
        self.held: list[Held] = []
        self.changed: list[str] = []
        self.remarked = 0
        self.freshness = Freshness(self.held.append, self._changed, self._remark, swaps.workers.stand)

    def _changed(self, name: str, tells: bool) -> None:
        if tells:
            self.changed.append(name)

    def _remark(self) -> None:
        self.remarked += 1

    def follow(
        self, service: Service, *stack: Layer, name: str = "web.service", tells: bool = False, key: str = "1"
    ) -> None:
        self.swaps(service, *stack)
        workers = self.swaps.workers
        views = workers.submit(views_of, workers, service.process, [service.pid], list, tuple).result()
        done: list[bool] = []
        self.freshness.follow(name, key, views, tells=tells)
        self.freshness._order(functools.partial(done.append, True))
        until(lambda: done)

    def etc(self, number: int = 0) -> Path:
        return self.path / f"root-{number}" / "etc"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_shown(service: Service, text: str) -> bool:
    return service.read("/etc/base.conf") == text


def replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)


@pytest.fixture
def bench(swaps: Swaps, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(swaps, tmp_path)
    yield made
    made.freshness.close()


def test_what_the_host_replaces_shows(bench: Bench, service: Service, layers: Layers) -> None:
    bench.follow(service, layers.tree({"web.conf": "1"}))
    for number in range(100):
        service.read("/etc/base.conf")
        replace(bench.etc() / "base.conf", str(number))
        until(functools.partial(is_shown, service, str(number)))
    service("os.path.exists('/etc/later')")
    (bench.etc() / "later").write_text("1")
    until(lambda: service("os.path.exists('/etc/later')"))
    assert not bench.held and not bench.changed and not bench.remarked


def test_what_changes_all_the_time_is_not_called_held(bench: Bench, service: Service, layers: Layers) -> None:
    """A look takes time: what it finds of such a name is not true any more."""
    bench.follow(service, layers.tree({"web.conf": "1"}))
    program = "import os\nfor _ in range(20_000):\n open('new', 'w'); os.unlink('new')"
    subprocess.run([sys.executable, "-c", program], cwd=bench.etc(), check=True)
    until(lambda: not bench.freshness._again and bench.freshness._recheck_at == float("inf"))
    assert not bench.held
    service("globals().__setitem__('held', open('/etc/base.conf'))")
    replace(bench.etc() / "base.conf", "new")
    until(lambda: bench.held)


def test_all_services_on_one_base_share_its_watches(
    bench: Bench, start: Callable[..., Service], layers: Layers
) -> None:
    first = start()
    services = [first, *(start("private", inside=first) for _ in range(3))]
    other = start()
    for number, service in enumerate(services):
        bench.follow(service, layers.tree({"web.conf": str(number)}), name=f"{number}.service")
    bench.follow(other, layers.tree({"web.conf": "1"}), name="other.service")
    assert len(bench.freshness._bases) == 2
    assert all(service.read("/etc/base.conf") == "base" for service in (*services, other))
    replace(bench.etc() / "base.conf", "new")
    until(lambda: all(service.read("/etc/base.conf") == "new" for service in services))
    assert other.read("/etc/base.conf") == "base"
    replace(bench.etc(1) / "base.conf", "other's")
    until(lambda: other.read("/etc/base.conf") == "other's")
    for number in range(4):
        bench.freshness.drop(f"{number}.service")
    until(lambda: len(bench.freshness._bases) == 1)
    bench.freshness.drop("other.service")
    until(lambda: not bench.freshness._bases)
    assert not bench.freshness._watches._at


def test_a_name_that_is_held_is_told_once_it_is_clear_that_it_stays(
    bench: Bench, service: Service, layers: Layers
) -> None:
    bench.follow(service, layers.tree({"web.conf": "1"}))
    service("globals().__setitem__('held', open('/etc/base.conf'))")
    replace(bench.etc() / "base.conf", "new")
    until(lambda: bench.held)
    assert (bench.held[0].service, bench.held[0].paths) == ("web.service", ("base.conf",))
    assert service.read("/etc/base.conf") == "base"


def test_a_list_that_stays_old_is_told(bench: Bench, service: Service, layers: Layers) -> None:
    bench.follow(service, layers.tree({"app/own.conf": "1"}))
    service("globals().__setitem__('held', os.open('/etc/app', os.O_RDONLY))")
    service("os.listdir(held)")
    (bench.etc() / "app/new.conf").write_text("new")
    until(lambda: bench.held)
    assert bench.held[0].paths == ("app/new.conf",)


def test_directories_of_a_stack_that_was_mounted_anew_stay_fresh(
    bench: Bench, service: Service, layers: Layers
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "1"})
    bench.follow(service, one)
    service("os.chdir('/etc/app')")
    bench.follow(service, two)
    assert service.read("a.conf") == "base"
    replace(bench.etc() / "app/a.conf", "new")
    until(lambda: service.read("a.conf") == service.read("/etc/app/a.conf") == "new")
    bench.follow(service, one, key="2")
    assert len(bench.freshness._followed["web.service"].views) == 1
    assert not bench.freshness._followed["web.service"].older


def test_one_who_is_to_be_told_is_told(bench: Bench, service: Service, layers: Layers) -> None:
    bench.follow(service, layers.tree({"web.conf": "1"}), tells=True)
    replace(bench.etc() / "base.conf", "new")
    until(lambda: "web.service" in bench.changed)


def test_nothing_wakes_up_where_nothing_changes(bench: Bench, service: Service, layers: Layers) -> None:
    bench.follow(service, layers.tree({"web.conf": "1"}))
    replace(bench.etc() / "base.conf", "new")
    until(lambda: service.read("/etc/base.conf") == "new")
    until(lambda: bench.freshness._recheck_at == float("inf"))
    thread = f"/proc/self/task/{bench.freshness._thread.native_id}/status"

    def woken() -> list[str]:
        return [line for line in Path(thread).read_text().splitlines() if "ctxt" in line]

    time.sleep(0.2)
    before = woken()
    for _ in range(5):
        with open(bench.etc() / "base.conf", "a") as file:
            file.write("in place")
        time.sleep(0.05)
    assert woken() == before
    assert service.read("/etc/base.conf").startswith("newin place"), "that shows by itself"


def test_without_watches_it_is_refreshed_by_time_and_said(
    bench: Bench, service: Service, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "watches_max", lambda: 4)
    monkeypatch.setattr(freshness_module, "RETRY_SEC", 0.05)
    bench.follow(service, layers.tree({"web.conf": "1"}))
    until(bench.freshness.remarks)
    (remark,) = bench.freshness.remarks()
    assert "fs.inotify.max_user_watches" in str(remark)
    assert service.read("/etc/app/sub/deep.conf") == "base"
    replace(bench.etc() / "app/sub/deep.conf", "new")
    until(lambda: service.read("/etc/app/sub/deep.conf") == "new")
    assert bench.remarked == 1
    bench.freshness._order(lambda: setattr(bench.freshness._watches, "_limit", 100))
    until(lambda: not bench.freshness.remarks())
    assert bench.freshness._look_at == float("inf")


def test_without_an_inotify_instance_it_is_refreshed_by_time(
    bench: Bench, service: Service, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise OSError(24, "no inotify instance left: raise fs.inotify.max_user_instances with sysctl")

    monkeypatch.setattr(freshness_module, "new_inotify", none)
    monkeypatch.setattr(freshness_module, "RETRY_SEC", 0.05)
    bench.follow(service, layers.tree({"web.conf": "1"}))
    (remark,) = bench.freshness.remarks()
    assert "max_user_instances" in str(remark)
    replace(bench.etc() / "base.conf", "new")
    until(lambda: service.read("/etc/base.conf") == "new")


def test_nothing_is_left_open(bench: Bench, service: Service, layers: Layers) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bench.follow(service, layers.tree({"web.conf": "1"}))
    bench.follow(service, layers.tree({"web.conf": "2"}))
    bench.follow(service, layers.tree({"web.conf": "2"}), key="2")
    bench.freshness.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    bench.freshness = Freshness(bench.held.append)


@userns
@not_in_user_namespace
@pytest.mark.limit(300)
@pytest.mark.parametrize("options", [[], ["--mount"]])
def test_all_of_this_in_a_user_namespace(tmp_path: Path, options: list[str]) -> None:
    command = ["unshare", "--user", "--map-root-user", *options, sys.executable, "-m", "pytest", "-q"]
    own = ["-p", "no:cacheprovider", f"--basetemp={tmp_path}/own"]
    files = [__file__, os.path.join(os.path.dirname(__file__), "test_refresh.py")]
    done = subprocess.run([*command, *own, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_look_that_was_under_way_when_it_was_closed_does_nothing(
    swaps: Swaps, service: Service, layers: Layers, tmp_path: Path
) -> None:
    """Its descriptors may be another's by then: so it was "may not be seen: Bad file descriptor" at a shutdown."""
    bench = Bench(swaps, tmp_path)
    bench.follow(service, layers.tree({"web.conf": "1"}))
    workers = swaps.workers
    views = workers.submit(views_of, workers, service.process, [service.pid], list, tuple).result()
    fd = views[0].fd
    bench.freshness.close()
    other = os.eventfd(0)  # most likely the descriptor that was closed
    try:
        bench.freshness.follow("web.service", "2", views, tells=False)
        bench.freshness.drop("web.service")
        bench.freshness.retry()
        os.eventfd_write(other, 1)
        assert os.eventfd_read(other) == 1
    finally:
        os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
