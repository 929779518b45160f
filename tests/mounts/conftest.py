# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mount workers, services, and stacks of small layers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from support.images import FORMATS, confext, image
from support.service import Service, make_root
from watcher.model import Copy, Kind, Layer, Stack
from watcher.mounts.process import may_mount
from watcher.mounts.swap import Swapped, swap
from watcher.mounts.workers import MountWorkers

BASE = {
    "base.conf": "base",
    "secret": "to be hidden",
    "app/a.conf": "base",
    "app/private": "to be hidden",
    "app/sub/deep.conf": "base",
    "empty/": "",
}


class Layers:
    """Makes layers, and keeps the copies that a swap needs of them."""

    def __init__(self, directory: Path) -> None:
        self.copies: dict[str, Copy] = {}
        self._directory = directory
        self._numbers = itertools.count()

    def tree(self, files: Mapping[str, str], name: str = "web", version: str = "") -> Layer:
        """A layer that is a directory tree, with files by their path below `etc`."""
        root = self._tree(files, name)
        return self._layer(root, Kind.DIRECTORY, "", name, version)

    def image(self, files: Mapping[str, str], fstype: str, version: str = "") -> Layer:
        root = self._tree(files, "web")
        path = image(root, root.with_suffix(f".{fstype}"), fstype)
        return self._layer(path, Kind.IMAGE, fstype, "web", version)

    def redirected(self, name: str, to: str, fstype: str = "") -> Layer:
        """A layer with a directory of which overlayfs is told that it is called otherwise in the layers below."""
        root = self._tree({f"{name}/own.conf": "1"}, "web")
        attribute = "trusted.overlay.redirect" if may_mount() else "user.overlay.redirect"
        os.setxattr(root / "etc" / name, attribute, to.encode())
        if not fstype:
            return self._layer(root, Kind.DIRECTORY, "", "web", "1")
        path = image(root, root.with_suffix(f".{fstype}"), fstype)
        return self._layer(path, Kind.IMAGE, fstype, "web", "1")

    def linked(self, target: Path, fstype: str = "") -> Layer:
        """A layer whose `etc` is a link: a directory tree, or an image."""
        root = self._directory / f"layer-{next(self._numbers)}"
        root.mkdir()
        (root / "etc").symlink_to(target)
        if not fstype:
            return self._layer(root, Kind.DIRECTORY, "", "web", "1")
        path = image(root, root.with_suffix(f".{fstype}"), fstype)
        return self._layer(path, Kind.IMAGE, fstype, "web", "1")

    def text(self, layer: Layer, path: str) -> str:
        """A file of a layer that is a directory tree."""
        return Path(self.copies[layer.digest].path, "etc", path).read_text()

    def _tree(self, files: Mapping[str, str], name: str) -> Path:
        contents = {f"etc/{path}": text.encode() for path, text in files.items()}
        return confext(self._directory / f"layer-{next(self._numbers)}", name, contents)

    def _layer(self, path: Path, kind: Kind, fstype: str, name: str, version: str) -> Layer:
        digest = hashlib.sha256(str(path).encode()).hexdigest()
        self.copies[digest] = Copy(digest, str(path), 0, kind, FORMATS.get(fstype))
        return Layer(path.name, name, version, digest, kind, str(path))


class Swaps:
    """Swaps stacks of these layers."""

    def __init__(self, workers: MountWorkers, layers: Layers) -> None:
        self.workers = workers
        self.layers = layers

    def __call__(self, service: Service, *stack: Layer, begin: Callable[[], None] = lambda: None) -> Swapped:
        copies = self.layers.copies
        return self.workers.submit(
            swap, self.workers, service.namespace, Stack(stack), copies, begin
        ).result()


def wait_until_idle(workers: MountWorkers) -> None:
    """Until none of them has anything left to do: what swaps have left behind is removed."""
    deadline = time.monotonic() + 10
    while len(workers._idle) < len(workers._threads):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def workers() -> Iterator[MountWorkers]:
    with MountWorkers(privileged=may_mount()) as made:
        yield made


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


@pytest.fixture
def swaps(workers: MountWorkers, layers: Layers) -> Swaps:
    return Swaps(workers, layers)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services with a root of their own; `files` is their base instead of BASE, `inside` another service."""
    numbers = itertools.count()
    with contextlib.ExitStack() as running:

        def started(*options: str, files: Mapping[str, str] = BASE, inside: Service | None = None) -> Service:
            root = None if inside else make_root(tmp_path / f"root-{next(numbers)}", files)
            return running.enter_context(Service(root, *options, inside=inside.pid if inside else None))

        yield started


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    return start()
