# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where layers come from, which of them are picked, and in which order they lie."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest

from scenarios.place import Place, Service, image, shell, tree, until

images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)


def colliding(place: Place, name: str, target: Path) -> None:
    """A confext with `etc/who`, whose content is its name."""
    made = image if target.name.endswith(".raw") else tree
    place.bring(made(name, name, name=name, extra="etc/who"), target)


@images_only
def test_layers_lie_in_the_order_of_the_design(shared: Place) -> None:
    """Declared images, dropped images by name, declared directories, dropped directories by name."""
    source = shared.path / "declared"
    source.mkdir()
    options = []
    for name in ("zz", "aa"):
        colliding(shared, name, source / f"{name}.raw")
        options += ["--extension-image", str(source / f"{name}.raw")]
    for name in ("dd", "bb"):
        colliding(shared, name, source / name)
        options += ["--extension-directory", str(source / name)]
    service = shared.start(*options, "--reload-signal", "HUP")
    drops = service.drops
    for name in ("mm.raw", "nn.raw", "cc", "ee"):
        colliding(shared, name.removesuffix(".raw"), drops / name)
    expected = ["zz", "aa", "mm", "nn", "dd", "bb", "cc", "ee"]
    for top in reversed(expected):
        service.logged("applied in") if top == expected[-1] else None
        while service.etc("who").read_text() != f"{top}\n":
            service.logged("applied in")
        # The uppermost one is taken away, and the next shows.
        for directory in (drops, source):
            for name in (top, f"{top}.raw"):
                if (directory / name).exists():
                    os.rename(directory / name, shared.path / f"gone-{next(shared.numbers)}")
    service.logged("zz removed")
    assert not service.etc("who").exists()


def test_what_is_declared_and_missing_is_said_and_comes_later(shared: Place) -> None:
    option = "--extension-directory" if shared.trees else "--extension-image"
    source = shared.path / f"late-{next(shared.numbers)}"
    wanted, optional = (source / f"{name}{shared.suffix}" for name in ("web", "other"))
    service = shared.start(
        option, str(wanted), option, f"-{optional}", "--reload-signal", "HUP", declared=False
    )
    service.logged(f"{wanted}: does not exist")
    source.mkdir()
    shared.bring(shared.confext("1.3"), wanted)
    service.reloaded("1.3")
    shared.bring(shared.confext("1", name="other"), optional)
    service.logged("other added")
    assert not [line for line in service.log_lines() if f"{optional}: does not exist" in line]


@pytest.mark.parametrize("form", ["web{}.v", "web.v/web___{}", "any.v/web___{}"])
def test_declared_paths_in_v_form(shared: Place, form: str) -> None:
    option = "--extension-directory" if shared.trees else "--extension-image"
    path = shared.path / f"declared-{next(shared.numbers)}" / form.format(shared.suffix)
    directory = path if path.name.endswith(".v") else path.parent
    directory.mkdir(parents=True)
    service = shared.start(option, str(path), "--reload-signal", "HUP", declared=False)
    service.put("1.9", at=directory)
    service.reloaded("1.9")
    service.put("1.10", at=directory)
    service.reloaded("1.10")
    service.put("1.2", at=directory)
    (directory / f"web_1.10{shared.suffix}").rename(shared.path / f"gone-{next(shared.numbers)}")
    service.reloaded("1.9")


def test_the_newest_that_fits_is_picked(service: Service) -> None:
    suffix = service.place.suffix
    for version in ("1.9", "1.10~rc1", "1.10"):
        service.put(version)
    service.reloaded("1.10")
    service.put("1.11_s390x")  # another architecture
    service.put("1.12+0")  # no tries left
    service.put("1.13+0-3")
    (service.versions / f".web_1.14{suffix}").symlink_to(f"web_1.9{suffix}")
    (service.versions / f"web-1.15{suffix}").symlink_to(f"web_1.9{suffix}")
    service.put("1.10^a")
    service.reloaded("1.10^a")
    assert service.heard[-2:] == ["1.10", "1.10^a"]


def test_a_single_image_or_tree_is_an_entry(service: Service) -> None:
    target = service.drops / f"xyz{service.place.suffix}"
    service.place.bring(service.place.confext("", "one", name="xyz"), target)
    service.logged("xyz added")
    assert service.has("one", "xyz.conf")


@pytest.mark.parametrize("how", ["ln -sfn {0} {1}", "ln -s {0} {1}.new; mv -T {1}.new {1}"])
def test_a_link_that_is_switched_is_a_drop(service: Service, how: str) -> None:
    place = service.place
    releases = [place.path / f"release-{next(place.numbers)}" for _ in range(2)]
    entry = service.drops / f"xyz{place.suffix}"
    for number, release in enumerate(releases):
        place.bring(place.confext("", f"release {number}", name="xyz"), release)
        shell(how, release, entry)
        service.logged("xyz (added|with new content), applied")
        assert service.has(f"release {number}", "xyz.conf")


def test_what_a_link_leads_to_is_watched(service: Service) -> None:
    """Through a second link, and in a directory of its own."""
    place = service.place
    releases = place.path / f"releases-{next(place.numbers)}"
    releases.mkdir()
    current = releases / "current"
    place.bring(place.confext("", "one", name="xyz"), releases / "one")
    current.symlink_to("one")
    (service.drops / f"xyz{place.suffix}").symlink_to(current)
    service.logged("xyz added")
    place.bring(place.confext("", "two", name="xyz"), releases / "two")
    shell("ln -sfn two {0}", current)
    service.logged("xyz with new content")
    assert service.has("two", "xyz.conf")
    place.bring(place.confext("", "three", name="xyz"), releases / "next")
    shell("rm -r {0}; mv {1} {0}", releases / "two", releases / "next")
    service.logged("xyz (with new content|added), applied")
    assert service.has("three", "xyz.conf")


def test_a_linked_v_directory(service: Service) -> None:
    place = service.place
    elsewhere = place.path / f"elsewhere-{next(place.numbers)}"
    elsewhere.mkdir()
    service.versions.rename(place.path / f"gone-{next(place.numbers)}")
    service.versions.symlink_to(elsewhere)
    service.put("1.3", at=elsewhere)
    service.reloaded("1.3")
    service.put("1.4", at=elsewhere)
    service.reloaded("1.4")


def test_a_link_in_a_v_directory(service: Service) -> None:
    place = service.place
    for version in ("1.3", "1.4"):
        made = place.path / f"made-{next(place.numbers)}"
        place.bring(place.confext(version), made)
        (service.versions / f"web_{version}{place.suffix}").symlink_to(made)
        service.reloaded(version)


def test_a_link_to_dev_null_masks(shared: Place) -> None:
    """In the directory of higher precedence."""
    upper, lower = (shared.path / f"{level}-{next(shared.numbers)}" for level in ("upper", "lower"))
    upper.mkdir()
    lower.mkdir()
    options = [word for path in (upper, lower) for word in ("--confext-dir", str(path))]
    service = shared.start(*options, "--reload-signal", "HUP", declared=False)
    entry = f"web{shared.suffix}"
    shared.bring(shared.confext("", "lower"), lower / entry)
    service.reloaded("lower")
    shared.bring(shared.confext("", "upper"), upper / entry)
    service.reloaded("upper")
    shell("rm -r {0}; ln -s /dev/null {0}", upper / entry)
    service.reloaded("nothing")
    (upper / entry).unlink()
    service.reloaded("lower")


@trees_only
def test_the_same_content_twice_is_there_once(service: Service) -> None:
    """overlayfs takes no directory twice."""
    service.put("1.3")
    service.reloaded("1.3")
    service.place.bring(service.place.confext("1.3"), service.drops / "web")
    service.put("1.4")
    service.logged("web 1.4 added, applied")


@images_only
def test_image_formats_mix(service: Service) -> None:
    for number, fstype in enumerate(("erofs", "squashfs", "erofs")):
        service.place.bring(
            image("web", f"{fstype} {number}", fstype=fstype), service.versions / f"web_{number + 2}.raw"
        )
        service.reloaded(f"{fstype} {number}")
    service.place.bring(tree("www", "tree", name="www", extra="etc/web.conf"), service.drops / "www")
    service.reloaded("tree")


@images_only
def test_what_is_mounted_is_the_copy_in_the_store(service: Service) -> None:
    target = service.put("1.3")
    service.reloaded("1.3")
    store = service.place.state / "store"
    backing = backing_files()
    digest = service.status()["layers"][0]["digest"]
    assert str(store / digest) in backing
    assert str(target) not in backing
    assert (store / digest).stat().st_mode & 0o777 == 0o400


@images_only
def test_copies_and_mounts_that_nobody_needs_go_away(shared: Place) -> None:
    """The last three stacks are kept, and mounted is what a service runs on."""
    service = shared.start()
    digests = {}
    for version in ("1", "2", "3", "4", "5"):
        path = service.put(version)
        digests[hashlib.sha256(path.read_bytes()).hexdigest()] = version
        service.reloaded(version)
        service.logged(f"{version}.* applied")
    store = shared.state / "store"
    until(lambda: [digests[name] for name in digests if (store / name).exists()] == ["3", "4", "5"])
    until(lambda: [digests[name] for name in digests if str(store / name) in backing_files()] == ["5"])


def backing_files() -> set[str]:
    """The files that loop devices show."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # another one's, gone just now
            found.add(path.read_text().strip())
    return found
