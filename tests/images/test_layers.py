# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a path comes from (images/layers.py) and what differs (images/changes.py): the real overlayfs is the judge."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.needs import root
from watcher.images.changes import Comparison, changes
from watcher.images.layers import Found, Layers, Role, Type
from watcher.model import DEPTH_MAX, Refused
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.swap import _overlay
from watcher.mounts.workers import MountWorkers

pytestmark = root

NAMES = ("a", "b", "\udcff\n\x1b[31m")
REDIRECT, METACOPY = "trusted.overlay.redirect", "trusted.overlay.metacopy"


@dataclass(frozen=True)
class Dir:
    children: Mapping[str, object] = field(default_factory=dict)
    opaque: bytes = b""
    redirect: bool = False


def nodes() -> st.SearchStrategy[object]:
    leaves = st.sampled_from(("file", "file", "whiteout", "empty whiteout", "link", "fifo", "metacopy"))
    return st.recursive(
        leaves,
        lambda inner: st.builds(
            Dir,
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            st.sampled_from((b"", b"", b"", b"y", b"x")),
            st.sampled_from((False,) * 9 + (True,)),
        ),
        max_leaves=8,
    )


LAYERS = st.lists(st.dictionaries(st.sampled_from(NAMES), nodes(), max_size=3), min_size=2, max_size=4)


def make(path: str, node: object, layer: int) -> None:
    """Each file says where it is from; a directory's mode says of which layer it is."""
    match node:
        case Dir(children, opaque, redirect):
            os.mkdir(path)
            os.chmod(path, 0o700 + layer)
            if opaque:
                os.setxattr(path, "trusted.overlay.opaque", opaque)
            if redirect:
                os.setxattr(path, REDIRECT, b"elsewhere")
            for name, child in children.items():
                make(f"{path}/{name}", child, layer)
        case "file" | "metacopy":
            with open(path, "w", errors="surrogateescape") as file:
                file.write(f"{layer}")
            if node == "metacopy":
                os.setxattr(path, METACOPY, b"")
        case "whiteout":
            os.mknod(path, stat.S_IFCHR, 0)
        case "empty whiteout":
            open(path, "w").close()
            os.setxattr(path, "trusted.overlay.whiteout", b"y")
        case "link":
            os.symlink(f"{layer}", path)
        case "fifo":
            os.mkfifo(path, 0o600 + layer)


def paths(tree: Mapping[str, object], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, node in tree.items():
        yield (*before, name)
        if isinstance(node, Dir):
            yield from paths(node.children, (*before, name))


@contextlib.contextmanager
def stacked(
    trees: list[Mapping[str, object]], fds: Descriptors, order: list[int] | None = None
) -> Iterator[str]:
    """In a scratch directory: the layers as directories "0", "1" ... (the topmost first), and an overlay of them."""
    for layer, tree in enumerate(trees):
        make(str(layer), Dir(tree), layer)
    yield mounted([str(layer) for layer in order or range(len(trees))], fds)


def mounted(layers: list[str], fds: Descriptors) -> str:
    """As a stack's, with an empty cover: one layer alone would be no overlay."""
    os.makedirs("cover", exist_ok=True)
    return f"/proc/self/fd/{fds.add(_overlay(['cover', *layers], 0, privileged=True))}"


def seen(path: str) -> tuple[int, int, str] | None:
    """What the kernel shows: mode, size, and for what is no directory the layer that it names; None: nothing."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    said = ""
    if stat.S_ISREG(status.st_mode):
        with open(path) as file:
            said = file.read()
    elif stat.S_ISLNK(status.st_mode):
        said = os.readlink(path)
    return status.st_mode, status.st_size if not stat.S_ISDIR(status.st_mode) else 0, said


def opened(fds: Descriptors, count: int) -> Layers:
    return Layers([fds.add(os.open(str(layer), os.O_RDONLY)) for layer in range(count)])


@pytest.fixture(scope="module")
def workers() -> Iterator[MountWorkers]:
    with MountWorkers() as made:
        yield made


def last(layers: Layers, path: tuple[str, ...]) -> Found:
    """Of a path without links on the way."""
    return layers._chain(path)


def check(trees: list[Mapping[str, object]], workers: MountWorkers) -> None:
    with workers.scratch(), Descriptors() as fds, stacked(trees, fds) as overlay:
        layers = opened(fds, len(trees))
        for path in {path for tree in trees for path in paths(tree)}:
            found = last(layers, path)
            try:
                kernel = seen("/".join((overlay, *path)))
            except PermissionError:
                assert found.problem, (path, found)
                continue
            assert not found.problem, (path, found)
            shown = found.shown
            assert (shown is None) == (kernel is None), (path, found)
            if shown is not None and kernel is not None:
                mode, size, said = kernel
                assert (shown.status.st_mode, said) == (mode, said and str(shown.layer)), (path, found)
                assert shown.type is Type.DIRECTORY or shown.status.st_size == size
            # All that any layer has there is told, and each covered one by something above it.
            has = {layer for layer in range(len(trees)) if os.path.lexists("/".join((str(layer), *path)))}
            assert {item.node.layer for item in found.chain} == has
            assert all((item.role is Role.COVERED) == (item.by is not None) for item in found.chain)
            assert all(item.by < item.node.layer for item in found.chain if item.by is not None)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(LAYERS)
def test_a_path_comes_from_where_the_kernel_takes_it(
    workers: MountWorkers, trees: list[Mapping[str, object]]
) -> None:
    workers.submit(check, trees, workers).result()


def everything(path: str, below: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """All that an overlay shows, by path, with what tells one thing from another."""
    found: dict[tuple[str, ...], object] = {}
    for name in os.listdir("/".join((path, *below))):
        inner = (*below, name)
        there = seen("/".join((path, *inner)))
        if there is not None:
            found[inner] = there
            if stat.S_ISDIR(there[0]):
                found |= everything(path, inner)
    return found


def compare(trees: list[Mapping[str, object]], orders: list[list[int]], workers: MountWorkers) -> None:
    with workers.scratch(), Descriptors() as fds:
        for layer, tree in enumerate(trees):
            make(str(layer), Dir(tree), layer)
        views = [everything(mounted([str(layer) for layer in order], fds)) for order in orders]
        differ = {
            path for path in views[0].keys() | views[1].keys() if views[0].get(path) != views[1].get(path)
        }
        comparison = Comparison()
        told = set()
        for change in changes(opened(fds, len(trees)), *orders):
            if not comparison.same(change) and (change.before or change.after):
                told.add(change.path)
        assert told - {()} == differ


PLAIN = LAYERS.filter(lambda trees: "metacopy" not in str(trees) and "redirect=True" not in str(trees))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(PLAIN, st.data())
def test_what_differs_between_two_stacks_is_what_two_overlays_show(
    workers: MountWorkers, trees: list[Mapping[str, object]], data: st.DataObject
) -> None:
    upper = range(len(trees) - 1)
    drawn = [data.draw(st.lists(st.sampled_from(upper), unique=True)) for _ in range(2)]
    orders = [[*upper_layers, len(trees) - 1] for upper_layers in drawn]
    workers.submit(compare, trees, orders, workers).result()


def linked(tmp_path: Path) -> Layers:
    """Two layers; the links are in the upper one, what they lead to in the lower one."""
    links = {
        "to-file": "/etc/d/file", "to-dir": "d", "up": "../etc/d", "out": "/usr/share/zoneinfo/UTC",
        "out-up": "../usr/./lib", "round": "round", "one": "two", "two": "./one", "dangling": "nothing/x",
    }  # fmt: skip
    for layer in ("0", "1"):
        (tmp_path / layer / "d").mkdir(parents=True)
    for name, target in links.items():
        (tmp_path / "0" / name).symlink_to(target)
    (tmp_path / "0/d/back").symlink_to("../to-file")
    (tmp_path / "1/d/file").touch()
    return Layers([os.open(tmp_path / layer, os.O_PATH) for layer in ("0", "1")])


@pytest.mark.parametrize(
    ("path", "steps", "end"),
    [
        ("/etc/d/file", ["d/file"], ""),
        ("/etc/to-file", ["to-file", "d/file"], ""),
        ("//etc/./to-dir//file", ["to-dir", "d/file"], ""),
        ("/etc/up/back", ["up", "d/back", "to-file", "d/file"], ""),
        ("/usr/../etc/d/file", [""], "/usr/../etc/d/file"),
        ("/etc/out", ["out", ""], "/usr/share/zoneinfo/UTC"),
        ("/etc/out/x/..", ["out", ""], "/usr/share/zoneinfo/UTC/x/.."),
        ("/etc/out-up/os-release", ["out-up", ""], "/usr/lib/os-release"),
        ("/etc/d/../../usr/x", [""], "/usr/x"),
        ("/etc/dangling", ["dangling", "nothing/x"], ""),
        ("/etc", [""], ""),
        ("/etc/d/..", [""], ""),
        ("/", [""], "/"),
        ("/etc/d/file/x", ["d/file"], "is no directory, so there is no x in it"),
        ("/etc/round", ["round"] * 41, "too many links, it may lead round in a circle"),
        ("/etc/one/x", ["one", "two"] * 20 + ["one"], "too many links, it may lead round in a circle"),
    ],
)
def test_links_are_followed_one_by_one(tmp_path: Path, path: str, steps: list[str], end: str) -> None:
    layers = linked(tmp_path)
    try:
        found = list(layers.find(path))
    finally:
        for fd in layers.roots:
            os.close(fd)
    assert ["/".join(one.path) for one in found] == steps
    assert (found[-1].outside or found[-1].problem) == end
    if path == "/etc/dangling":
        assert found[-1].chain == ()


def test_a_path_is_not_followed_without_end(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    deep = tmp_path
    for _ in range(DEPTH_MAX + 1):
        deep /= "d"
        deep.mkdir()
    with Descriptors() as fds:
        top, empty = (fds.add(os.open(path, os.O_PATH)) for path in (tmp_path, tmp_path / "empty"))
        with pytest.raises(Refused, match="nested too deeply: 64 levels are the limit"):
            list(Layers([top, empty]).find("/etc" + "/d" * (DEPTH_MAX + 1)))
        with pytest.raises(Refused, match="nested too deeply"):
            list(changes(Layers([top, empty]), [1], [0, 1]))
