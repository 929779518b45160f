# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service's `/etc` taken apart: its base and its layers, as they are; and the service notices nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts.conftest import BASE, Layers, Swaps

from support.needs import userns
from support.service import Service
from watcher.control import subject
from watcher.images.changes import Comparison, changes
from watcher.images.layers import Layers as Stacked
from watcher.model import Refused
from watcher.mounts import parts
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.parts import Parts
from watcher.mounts.process import may_mount
from watcher.mounts.workers import HostNamespace, MountWorkers

pytestmark = userns

TOP = {name.partition("/")[0] for name in BASE}


def names(directory: int, path: str = ".") -> set[str]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        return set(os.listdir(fd))
    finally:
        os.close(fd)


def taken(fds: Descriptors, workers: MountWorkers, service: Service) -> Parts:
    return workers.submit(parts.of_service, fds, workers, service.namespace).result()


def test_the_base_lies_beneath_the_stack_and_what_is_mounted_on_it(
    workers: MountWorkers, swaps: Swaps, layers: Layers, service: Service
) -> None:
    layer = layers.tree({"new": "1", "app/a.conf": "ours"}, version="2")
    swaps(service, layer)
    service("tmpfs('/etc/app')")
    rows = service("rows()")
    with Descriptors() as fds:
        found = taken(fds, workers, service)
        assert found.table is not None
        assert [one.version for one in found.table.mounted().layers or ()] == ["2"]
        assert (names(found.base), names(found.base, "app")) == (TOP, {"a.conf", "private", "sub"})
        assert names(found.etc) == TOP | names(found.etc) and names(found.etc, "app") == set()
        assert "new" in names(found.etc)
        copies = [layers.copies[layer.digest]]
        roots = workers.submit(parts.open_layers, fds, workers, copies, lambda _: layer).result()
        assert {"new", "app"} <= names(roots[layer.digest])
        with pytest.raises(OSError):
            os.mkdir("x", dir_fd=found.etc)
    assert service("rows()") == rows
    assert service.read("/etc/new") == "1"


def test_an_old_file_of_the_hosts_that_the_service_still_sees_is_not_what_the_base_has(
    workers: MountWorkers, swaps: Swaps, layers: Layers, service: Service, tmp_path: Path
) -> None:
    (base,) = tmp_path.glob("root-*/etc")
    swaps(service, layers.tree({"new": "1"}))
    assert service.read("/etc/base.conf") == "base"
    (base / "renewed").write_text("renewed by the host")
    (base / "renewed").rename(base / "base.conf")
    with Descriptors() as fds:
        found = taken(fds, workers, service)
        stacked = Stacked([found.base])
        for name, same in (("base.conf", service.read("/etc/base.conf") != "base"), ("secret", True)):
            node = stacked.look_up(0, found.base, name)
            assert subject.same(subject.seen(found, (name,)), node) == same
        assert subject.same(subject.seen(found, ("nothing", "x")), None)
        assert not subject.same(subject.seen(found, ("secret",)), None)


def test_the_base_of_a_service_without_a_stack_is_its_etc(workers: MountWorkers, service: Service) -> None:
    service("tmpfs('/etc/app')")
    with Descriptors() as fds:
        found = taken(fds, workers, service)
        assert found.table is not None and not found.table.stacks
        assert (names(found.base), names(found.base, "app")) == (TOP, {"a.conf", "private", "sub"})


def test_the_base_of_what_does_not_run_is_the_hosts(workers: MountWorkers) -> None:
    with Descriptors() as fds:
        found = workers.submit(parts.of_host, fds).result()
        assert (found.table, found.etc) == (None, -1)
        assert "passwd" in names(found.base)


def test_a_namespace_of_the_host_is_not_taken_apart(workers: MountWorkers) -> None:
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        with Descriptors() as fds, pytest.raises(HostNamespace):
            workers.submit(parts.of_service, fds, workers, own).result()
    finally:
        os.close(own)


def test_a_hostile_base_is_walked_and_nothing_of_it_is_opened(
    workers: MountWorkers, swaps: Swaps, layers: Layers, start: Callable[..., Service], tmp_path: Path
) -> None:
    service = start(files=BASE | {"d/file": "1"})
    (base,) = tmp_path.glob("root-*/etc")
    os.mkfifo(base / "d/fifo")
    (base / "d/loop").symlink_to("loop")
    (base / "d/a\n\x1b[m\udcff").write_text("x")
    with (base / "d/sparse").open("wb") as file:
        file.truncate(10 << 30)
    deep = base / "d"
    for _ in range(40):
        deep /= "deep"
        deep.mkdir()
    # It lies on all of that: "d" is a file in the layer.
    layer = layers.tree({"d": "a file"})
    swaps(service, layer)
    with Descriptors() as fds:
        found = taken(fds, workers, service)
        copies = [layers.copies[layer.digest]]
        roots = workers.submit(parts.open_layers, fds, workers, copies, lambda _: layer).result()
        stacked = Stacked([roots[layer.digest], found.base], privileged=may_mount())
        comparison = Comparison()
        told = {change.path for change in changes(stacked, [1], [0, 1]) if not comparison.same(change)}
        assert {("d",), ("d", "fifo"), ("d", "loop"), ("d", "sparse"), ("d", "a\n\x1b[m\udcff")} <= told
        assert ("d", *["deep"] * 40) in told
        for _ in range(30):
            deep /= "deep"
            deep.mkdir()
        with pytest.raises(Refused, match="nested too deeply"):
            list(changes(stacked, [1], [0, 1]))
