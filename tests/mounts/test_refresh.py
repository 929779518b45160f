# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service on a stack sees what the host has changed in its `/etc`; each test first shows that it would not.

These tests are also those of mounts/renew.py. All of it once more in a user namespace: test_freshness.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.needs import root
from support.service import Service
from watcher.model import Layer, Stack
from watcher.mounts.converge import Compared, converge
from watcher.mounts.process import Process, may_mount
from watcher.mounts.refresh import BaseNow, Changes, View, is_concerned, listed_wrongly, still_old, views_of
from watcher.mounts.renew import renew
from watcher.mounts.table import SOURCE
from watcher.mounts.workers import HostNamespace, MountWorkers

from .conftest import Layers, Swaps

pytestmark = root

not_in_user_namespace = pytest.mark.skipif(not may_mount(), reason="needs root of the machine")

Start = Callable[..., Service]


def replace(path: Path, text: str) -> None:
    """As careful editors and package managers do it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)


def shown(service: Service, path: str) -> str | None:
    try:
        return service.read(f"/etc/{path}")
    except FileNotFoundError:
        return None


class Bench:
    """A service on a stack, its base, and the view of it."""

    def __init__(self, service: Service, base: Path, swaps: Swaps, views: Callable[..., list[View]]) -> None:
        self.service, self.base, self.swaps = service, base, swaps
        self._views = views

    def put(self, *stack: Layer) -> None:
        self.swaps(self.service, *stack)
        self.look()

    def look(self) -> None:
        (self.view,) = self._views(self.service)

    def refresh(self, *names: str, replaced: bool = True) -> tuple[str, ...]:
        """Names that have changed; those that stay old."""
        changes, now = Changes(), BaseNow(self.view.base)
        for name in names:
            directory, _, last = name.rpartition("/")
            changes.add(directory, last, replaced=replaced)
        if any(is_concerned(self.view, changes, now) for _ in range(5)):
            self.swaps.workers.submit(self.view.drop_unused).result()
        old = (still_old(self.view, names, BaseNow(self.view.base)) for _ in range(5))
        return next(filter(None, old), ())

    def renew(
        self, layers: Layers, *stack: Layer, old: tuple[str, ...], compared: Compared | None = None
    ) -> int:
        workers = self.swaps.workers
        return workers.submit(
            renew,
            workers,
            self.service.process,
            [self.service.pid],
            Stack(stack),
            layers.copies,
            compared or {},
            old=old,
            devices=[self.view.device],
            kept=lambda: [Stack(stack)],
        ).result()


@pytest.fixture
def views(workers: MountWorkers) -> Iterator[Callable[..., list[View]]]:
    with ExitStack() as opened:

        def found(service: Service, *others: Service) -> list[View]:
            pids = [service.pid, *(other.pid for other in others)]
            made = workers.submit(views_of, workers, service.process, pids, list, tuple).result()
            for view in made:
                opened.callback(view.close)
            return made

        yield found


@pytest.fixture
def bench(service: Service, swaps: Swaps, views: Callable[..., list[View]], tmp_path: Path) -> Bench:
    return Bench(service, tmp_path / "root-0" / "etc", swaps, views)


def test_what_was_replaced_created_or_deleted_shows(bench: Bench, layers: Layers) -> None:
    bench.put(layers.tree({"web.conf": "1", "app/own.conf": "1"}))
    names = ("base.conf", "app/a.conf", "empty/new", "new/deep", "app/sub/deep.conf")
    before = [shown(bench.service, name) for name in names]
    replace(bench.base / "base.conf", "other")
    replace(bench.base / "app/a.conf", "other")
    (bench.base / "empty/new").write_text("new")
    (bench.base / "new").mkdir()
    (bench.base / "new/deep").write_text("new")
    (bench.base / "app/sub/deep.conf").unlink()
    assert [shown(bench.service, name) for name in names] == before, "the kernel does it now: delete all this"
    assert not bench.refresh(*names, "new")
    assert [shown(bench.service, name) for name in names] == ["other", "other", "new", "new", None]
    assert shown(bench.service, "web.conf") == shown(bench.service, "app/own.conf") == "1"


def test_a_link_that_is_flipped_shows(bench: Bench, layers: Layers) -> None:
    """As certbot does it: new files in archive/, links in live/."""
    for directory in ("live", "archive"):
        (bench.base / directory).mkdir()
    (bench.base / "archive/cert1.pem").write_text("1")
    (bench.base / "live/cert.pem").symlink_to("../archive/cert1.pem")
    bench.put(layers.tree({"web.conf": "1"}))
    assert shown(bench.service, "live/cert.pem") == "1"
    (bench.base / "archive/cert2.pem").write_text("2")
    (bench.base / "live/.new").symlink_to("../archive/cert2.pem")
    (bench.base / "live/.new").rename(bench.base / "live/cert.pem")
    assert not bench.refresh("archive/cert2.pem", "live/.new", "live/cert.pem")
    assert shown(bench.service, "live/cert.pem") == "2"


@not_in_user_namespace
def test_a_mode_that_was_changed_counts(bench: Bench, layers: Layers) -> None:
    """Overlayfs checks it by what it has read once: what was closed to others would stay open to them."""
    bench.put(layers.tree({"web.conf": "1"}))
    bench.base.joinpath("app").chmod(0o755)
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", "/etc/base.conf"]
    as_nobody = f"subprocess.run({words}, capture_output=True).returncode"
    assert bench.service(as_nobody) == 0
    (bench.base / "base.conf").chmod(0o600)
    bench.refresh("base.conf", replaced=False)
    assert bench.service(as_nobody) != 0


def test_nothing_is_done_for_a_name_that_was_never_looked_up(bench: Bench, layers: Layers) -> None:
    bench.put(layers.tree({"web.conf": "1"}))
    changes = Changes()
    replace(bench.base / "app/a.conf", "other")
    for directory, name in (("app", "a.conf"), ("app/sub", "new"), ("", "nothing")):
        changes.add(directory, name, replaced=True)
    now = BaseNow(bench.view.base)
    assert not is_concerned(bench.view, changes, now)
    bench.service("os.path.exists('/etc/nothing')")
    assert not is_concerned(bench.view, changes, now), "there is still nothing"
    (bench.base / "nothing").write_text("something")
    assert is_concerned(bench.view, changes, BaseNow(bench.view.base))
    assert is_concerned(bench.view, Changes(anything=True), now)
    assert not is_concerned(bench.view, Changes(unknown={"app/sub"}), now)
    bench.service("os.path.exists('/etc/app/sub/nothing')")
    assert is_concerned(bench.view, Changes(unknown={"app/sub"}), now)


def test_sandbox_mounts_and_held_directories_stay_right(bench: Bench, layers: Layers) -> None:
    service = bench.service
    bench.put(layers.tree({"web.conf": "1"}))
    service("(write('/hidden', ''), bind('/hidden', '/etc/secret'), bind('/etc/app', '/etc/app'))")
    service("os.chdir('/etc/app')")
    bench.look()
    before = service("rows()")
    assert (service.read("a.conf"), service.read("/etc/app/a.conf"), service.read("/etc/secret")) == (
        "base",
        "base",
        "",
    )
    replace(bench.base / "app/a.conf", "other")
    replace(bench.base / "secret", "other secret")
    assert not bench.refresh("app/a.conf", "secret")
    assert (service.read("a.conf"), service.read("/etc/app/a.conf"), service.read("/etc/secret")) == (
        "other",
        "other",
        "",
    )
    assert service("rows()") == before


def test_what_systemd_has_mounted_is_refreshed_too(bench: Bench, tmp_path: Path) -> None:
    service = bench.service
    service("(os.mkdir('/layer'), write('/layer/web.conf', '1'), os.mkdir('/under'), bind('/etc', '/under'))")
    service(f"overlay({SOURCE!r}, '/layer', '/under')")
    bench.look()
    assert shown(service, "base.conf") == "base"
    replace(bench.base / "base.conf", "other")
    assert not bench.refresh("base.conf")
    assert shown(service, "base.conf") == "other"


def test_what_systemd_has_mounted_is_taken_over_although_the_host_has_replaced_a_file(
    bench: Bench, layers: Layers
) -> None:
    """While no watcher ran. It shows nothing else than the wanted stack once it is fresh."""
    service, layer, workers = bench.service, layers.tree({"web.conf": "1"}), bench.swaps.workers
    service("(os.mkdir('/under'), bind('/etc', '/under'))")
    service(f"overlay({SOURCE!r}, {layers.copies[layer.digest].path + '/etc'!r}, '/under')")
    assert shown(service, "base.conf") == "base"
    replace(bench.base / "base.conf", "other")
    compared: Compared = {}
    converged = workers.submit(
        converge,
        workers,
        service.process,
        [service.pid],
        Stack((layer,)),
        layers.copies,
        lambda: None,
        compared,
        kept=list,
    ).result()
    assert converged.swaps == 0
    assert shown(service, "base.conf") == "other"
    service("globals().__setitem__('held', open('/etc/base.conf'))")
    replace(bench.base / "base.conf", "third")
    bench.look()
    assert bench.refresh("base.conf") == ("base.conf",)
    assert bench.renew(layers, layer, old=("base.conf",)) == 0, "it is not known to be that stack"
    assert bench.renew(layers, layer, old=("base.conf",), compared=compared) == 1
    assert shown(service, "base.conf") == "third"
    assert service.mounted.stack == Stack((layer,)).id


def test_namespaces_that_were_copied_share_an_overlay(
    bench: Bench, layers: Layers, start: Start, views: Callable[..., list[View]]
) -> None:
    bench.put(layers.tree({"web.conf": "1"}))
    nested = start("private", inside=bench.service)
    assert len(views(bench.service, nested)) == 1
    assert nested.read("/etc/base.conf") == "base"
    replace(bench.base / "base.conf", "other")
    assert not bench.refresh("base.conf")
    assert nested.read("/etc/base.conf") == "other"


@not_in_user_namespace
@pytest.mark.parametrize("option", ["user-first", "user-last"])
def test_what_others_than_root_may_have_mounted_is_refreshed_without_a_look_at_it(
    start: Start, swaps: Swaps, layers: Layers, views: Callable[..., list[View]], tmp_path: Path, option: str
) -> None:
    """A service that owns its namespace may put an overlay there whose layers do not answer."""
    guest = start(option)
    bench = Bench(guest, tmp_path / "root-0/etc", swaps, views)
    bench.put(layers.tree({"web.conf": "1"}))
    assert bench.view.frank == (option == "user-last")
    for content in ("other", "third"):
        shown(guest, "base.conf")
        replace(bench.base / "base.conf", content)
        assert not bench.refresh("base.conf")
        assert shown(guest, "base.conf") == content
    guest("globals().__setitem__('held', open('/etc/base.conf'))")
    replace(bench.base / "base.conf", "fourth")
    assert bool(bench.refresh("base.conf")) == bench.view.frank


def test_nothing_is_followed_where_there_is_no_stack(
    service: Service, workers: MountWorkers, views: Callable[..., list[View]]
) -> None:
    assert views(service) == []
    service("(os.mkdir('/up'), os.mkdir('/workdir'), os.mkdir('/layer'))")
    service(
        "syscalls.mount('systemd-extensions', '/etc', 'overlay', 0, 'lowerdir=/layer,upperdir=/up,workdir=/workdir')"
    )
    assert views(service) == [], "what can be written to is no stack"
    service("write('/etc/still', 'writable')")


def test_a_name_that_is_held_needs_a_new_mount(bench: Bench, layers: Layers) -> None:
    service, layer = bench.service, layers.tree({"web.conf": "1", "app/own.conf": "1"})
    bench.put(layer)
    service("(write('/hidden', ''), bind('/hidden', '/etc/secret'))")
    service("globals().__setitem__('held', open('/etc/base.conf'))")
    replace(bench.base / "base.conf", "other")
    assert bench.refresh("base.conf") == ("base.conf",)
    assert shown(service, "base.conf") == "base"
    assert bench.renew(layers, layer, old=("base.conf",)) == 1
    assert shown(service, "base.conf") == "other"
    assert service.read("/etc/secret") == "", "its sandbox is what it was"
    assert service("held.read()") == "base", "so is what it has open"
    assert service.mounted.stack == Stack((layer,)).id
    assert len([row for row in service("rows()") if row.startswith("/etc ")]) == 1


def test_what_a_layer_has_needs_none(bench: Bench, layers: Layers) -> None:
    """The image covers the name, or the whole directory."""
    service = bench.service
    layer = layers.tree({"base.conf": "the layer's", "app/own.conf": "1"})
    opaque = "trusted.overlay.opaque" if may_mount() else "user.overlay.opaque"
    os.setxattr(f"{layers.copies[layer.digest].path}/etc/app", opaque, b"y")
    bench.put(layer)
    service("globals().__setitem__('held', [open('/etc/base.conf'), os.open('/etc/app', os.O_PATH)])")
    assert shown(service, "app/a.conf") is None
    service("os.path.exists('/etc/app/a.conf')")
    replace(bench.base / "base.conf", "other")
    replace(bench.base / "app/a.conf", "other")
    old = bench.refresh("base.conf", "app/a.conf")
    assert "base.conf" in old
    assert bench.renew(layers, layer, old=("base.conf", "app/a.conf")) == 0
    assert shown(service, "base.conf") == "the layer's"


def test_a_directory_of_the_image_hides_no_change_in_it(bench: Bench, layers: Layers) -> None:
    service, layer = bench.service, layers.tree({"app/own.conf": "1"})
    bench.put(layer)
    service("os.chdir('/etc/app')")
    assert (service.read("a.conf"), service.read("own.conf")) == ("base", "1")
    shutil.copytree(bench.base / "app", bench.base / "app.new")
    (bench.base / "app.new/a.conf").write_text("other")
    (bench.base / "app").rename(bench.base / "app.old")
    (bench.base / "app.new").rename(bench.base / "app")
    old = bench.refresh("app", "app.new", "app.old")
    assert old == ("app",), "it is held, and cannot be told from the image's"
    assert bench.renew(layers, layer, old=old) == 1
    assert service.read("/etc/app/a.conf") == "other"
    assert service.read("/etc/app/own.conf") == "1"


def test_a_directory_that_is_held_open_lists_what_is_there(bench: Bench, layers: Layers) -> None:
    """For those who open it; the one who holds it has what he has read."""
    service, layer = bench.service, layers.tree({"app/own.conf": "1"})
    bench.put(layer)
    service("globals().__setitem__('held', os.open('/etc/app', os.O_RDONLY))")
    assert "new.conf" not in service("os.listdir(held)")
    (bench.base / "app/new.conf").write_text("new")
    (bench.base / "app/a.conf").unlink()
    names = ("app/new.conf", "app/a.conf")
    assert not bench.refresh(*names)
    assert service.read("/etc/app/new.conf") == "new"
    assert "new.conf" not in service("os.listdir('/etc/app')")
    changes = Changes()
    for name in ("new.conf", "a.conf", "own.conf", "never"):
        changes.add("app", name, replaced=True)
    changes.add("empty", "never", replaced=True)
    assert listed_wrongly(bench.view, changes) == names
    assert bench.renew(layers, layer, old=names) == 1
    assert sorted(service("os.listdir('/etc/app')")) == ["new.conf", "own.conf", "private", "sub"]
    bench.look()
    assert listed_wrongly(bench.view, changes) == ()


def test_another_stack_is_left_alone(bench: Bench, layers: Layers) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    bench.put(one)
    assert bench.renew(layers, two, old=("base.conf",)) == 0
    assert shown(bench.service, "web.conf") == "1"
    bench.swaps(bench.service, two)
    assert bench.renew(layers, two, old=("base.conf",)) == 0, "that is another overlay by now"


def test_the_hosts_namespace_is_refused(workers: MountWorkers) -> None:
    with Process(os.getpid()) as host, pytest.raises(HostNamespace):
        workers.submit(views_of, workers, host, [os.getpid()], list, tuple).result()
