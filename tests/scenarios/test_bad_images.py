# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bad content: one clear line, the old stack stays, and the next good drop is applied."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarios.place import Place, Service, image, shell, tree, until
from support import disks
from support.images import confext
from support.images import image as image_of
from support.needs import filesystem, tool
from watcher.rounds.facts import AFTERGLOW_USEC

images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)
erofs = [tool("mkfs.erofs"), filesystem("erofs")]

Make = Callable[[Path], object]


def written(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def good(**how: str) -> bytes:
    return image("web_1.4", "1.4", **how).read_bytes()


def patched(offset: int, form: str, value: int, **how: str) -> Make:
    def make(path: Path) -> None:
        content = bytearray(good(**how))
        struct.pack_into(form, content, offset, value)
        path.write_bytes(content)

    return make


def made(**how: str) -> Make:
    return lambda path: shutil.copy(image("web_1.4", "1.4", **how), path)


def built(change: Callable[[Path], object], *options: str) -> Make:
    """An image of a good tree, after a change of that."""

    def make(path: Path) -> None:
        root = confext(
            path.parent.parent.parent / f"tree-{os.urandom(4).hex()}", "web", {"etc/web.conf": b"1.4\n"}
        )
        change(root)
        aside = root.with_suffix(".raw")
        image_of(root, aside, "squashfs", *options)
        aside.rename(path)

    return make


def release(root: Path, *names: str) -> None:
    directory = root / "etc/extension-release.d"
    shutil.rmtree(directory)
    directory.mkdir()
    for name in names:
        (directory / f"extension-release.{name}").write_text("ID=_any\n")


def truncated(path: Path, part: float, **how: str) -> None:
    content = good(**how)
    path.write_bytes(content[: int(len(content) * part)])


def broken_directory(path: Path) -> None:
    """A squashfs whose superblock is right, and whose table of directories is not."""
    content = bytearray(good())
    begin, *others = struct.unpack_from("<QQQ", content, 72)
    end = min(other for other in others if other > begin)
    content[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(content)


def broken_root(path: Path) -> None:
    """An erofs whose root directory says that the inode of `etc` is behind its end."""
    content = bytearray(good(fstype="erofs"))
    names = content.index(b"...etc")
    struct.pack_into("<Q", content, names - 12, 1 << 30)
    content[1024 + 8] &= ~1  # its block has a checksum no more
    path.write_bytes(content)


def disk_image(*parts: disks.Part, **changes: Any) -> Make:
    """A disk image of the good squashfs, wrong in some way."""

    def make(path: Path) -> None:
        path.write_bytes(disks.build(disks.Disk((disks.Part(good()), *parts), **changes)))

    return make


def half_a_disk_image(path: Path) -> None:
    content = disks.disk(good())
    path.write_bytes(content[: len(content) // 2])


def in_a_disk_image(made: Callable[[bytes], bytes]) -> Make:
    return lambda path: path.write_bytes(disks.disk(made(good())))


def sysext(root: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    shutil.move(root / "etc/extension-release.d", root / "usr/lib/extension-release.d")


def linked_release(root: Path) -> None:
    shutil.move(root / "etc/extension-release.d", root / "elsewhere")
    (root / "etc/extension-release.d").symlink_to("../elsewhere")


BAD: dict[str, tuple[Make, str]] = {
    "empty": (written(b""), "refused: empty"),
    "random": (
        lambda path: path.write_bytes(os.urandom(50_000)),
        "refused: no squashfs, erofs, ext4 or btrfs",
    ),
    "text": (written(b"web.conf = 1\n" * 100), "refused: no squashfs, erofs, ext4 or btrfs"),
    "zeros": (written(bytes(1 << 20)), "not uploaded yet"),
    "half of a squashfs": (lambda path: truncated(path, 0.5), r"incomplete: \d+ of \d+ bytes are here"),
    "ten bytes of a squashfs": (written(b"hsqs" + bytes(6)), "incomplete: 10 bytes are here"),
    "a squashfs that claims more": (patched(40, "<Q", 1 << 40), "incomplete: .* of 1099511627776 bytes"),
    "a squashfs that claims less": (patched(40, "<Q", 200), "refused: lies about its size"),
    "a squashfs of another kind": (patched(28, "<H", 3), "squashfs 3.0, the kernel reads 4.0 only"),
    "a squashfs with a broken file": (
        lambda path: path.write_bytes(good()[:96] + b"\xff" * 5000 + good()[5096:]),
        "refused: its extension-release has no ID=",
    ),
    "a squashfs with a broken directory": (
        broken_directory,
        "refused: broken: its extension-release cannot be read: Input/output error",
    ),
    "half of a disk image": (half_a_disk_image, r"incomplete: \d+ of \d+ bytes are here"),
    "a disk image with a usr partition": (
        disk_image(disks.Part(bytes(512), disks.USR)),
        "refused: a disk image with a usr partition: of a confext there is only /etc, in the root partition",
    ),
    "a disk image without a root partition": (
        lambda path: path.write_bytes(disks.disk(disks.Part(good(), disks.GENERIC))),
        "refused: a disk image with 1 partitions, none of them a root partition",
    ),
    "a disk image with a partition that is elsewhere": (
        disk_image(disks.Part(type=disks.GENERIC, start=1 << 40, end=1 << 41)),
        "refused: a broken disk image: partition 2 is said to be in sectors 1099511627776",
    ),
    "a disk image whose backup is another's": (
        disk_image(backup={56: bytes(16)}),
        "refused: a broken disk image: its partition table and the backup of that differ",
    ),
    "a disk image with ext2": (
        in_a_disk_image(lambda content: bytes(1080) + b"\x53\xef" + bytes(5000)),
        "refused: its root partition .number 1.: an ext2 or ext3 file system: use",
    ),
    "a disk image with a broken squashfs": (
        in_a_disk_image(lambda content: content[:96] + b"\xff" * 5000 + content[5096:]),
        "refused: its extension-release has no ID=",
    ),
    "gzip": (written(gzip.compress(b"x" * 5000)), "refused: gzip data: unpack it first"),
    "another OS": (made(release="ID=plan9\n"), "refused: made for ID=plan9, and here it is ID="),
    "another version": (
        made(release=Path("/etc/os-release").read_text() + "VERSION_ID=0.1\n"),
        "refused: made for VERSION_ID=0.1, and here it is VERSION_ID=",
    ),
    "another architecture": (
        made(release="ID=_any\nARCHITECTURE=s390x\n"),
        "refused: made for ARCHITECTURE=s390x, and here it is ARCHITECTURE=",
    ),
    "no ID": (made(release="VERSION_ID=1\n"), "refused: its extension-release has no ID="),
    "no release file": (built(release), "etc/extension-release.d/ has nothing, but must have .*web"),
    "no release directory": (
        built(lambda root: shutil.rmtree(root / "etc/extension-release.d")),
        "refused: not a confext: there is no etc/extension-release.d/ in it",
    ),
    "another's release file": (
        built(lambda root: release(root, "nginx")),
        "has extension-release.nginx, but must",
    ),
    "a sysext": (
        built(sysext),
        "refused: not a confext but a sysext",
    ),
    "a link for a directory": (
        built(linked_release),
        "refused: not a confext: extension-release.d in it is a link",
    ),
    "a mark for overlayfs": (
        built(lambda root: os.setxattr(root / "etc/web.conf", "trusted.overlay.metacopy", b"")),
        "refused: etc/web.conf in it has the extended attribute trusted.overlay.metacopy",
    ),
    "what hides for some only": (
        built(lambda root: os.setxattr(root / "etc/web.conf", "user.overlay.whiteout", b"")),
        "refused: etc/web.conf in it has the extended attribute user.overlay.whiteout",
    ),
    "a directory": (lambda path: path.mkdir(), "passed over: not a regular file"),
    "a FIFO": (os.mkfifo, "passed over: not a regular file"),
    "a device": (lambda path: os.mknod(path, 0o20600, os.makedev(1, 5)), "passed over: not a regular file"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "passed over: the link leads nowhere"),
    "a circle of links": (lambda path: path.symlink_to(path.name), "passed over: the link leads in a circle"),
    "a link to a directory": (lambda path: path.symlink_to("/usr"), "passed over: not a regular file"),
}
BAD_EROFS: dict[str, tuple[Make, str]] = {
    "half of an erofs": (
        lambda path: truncated(path, 0.5, fstype="erofs"),
        r"incomplete: \d+ of \d+ bytes are here",
    ),
    "an erofs with a broken superblock": (
        patched(1024 + 36, "<I", 7, fstype="erofs"),
        "incomplete|lies about its size|checksum of its superblock is wrong",
    ),
    "an erofs with a broken directory": (
        broken_root,
        "refused: broken: its extension-release cannot be read: (Structure needs cleaning|Input/output error)",
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in BAD.items()] + [
    pytest.param(*case, id=name, marks=erofs) for name, case in BAD_EROFS.items()
]


@images_only
@pytest.mark.parametrize(("make", "words"), CASES)
def test_a_bad_image_is_one_line_and_nothing_else(service: Service, make: Make, words: str) -> None:
    value = service.etc("web.conf").read_text()
    make(service.versions / "web_1.4.raw")
    line = service.logged(r"web_1\.4\.raw", words)
    assert "level=warning" in line
    assert service.etc("web.conf").read_text() == value
    service.put("1.5")
    service.reloaded("1.5")
    assert service.heard == ["1.5"]
    assert [one for one in service.log_lines() if "web_1.4.raw" in one.split(" message_id=")[0]] == [line]


@images_only
def test_a_refused_image_is_not_copied_again(service: Service) -> None:
    target = service.versions / "web_1.9.raw"
    broken_directory(target)
    service.logged("web_1.9.raw refused: broken")
    copy = service.place.state / "store" / hashlib.sha256(target.read_bytes()).hexdigest()
    until(lambda: not copy.exists())
    service.put("0", value="again")
    service.reloaded("again")
    service.logged("0 with new content")
    assert not copy.exists()
    history = json.loads(service.place.run("history", "--json", service.name).stdout)["events"]
    assert [event["outcome"] for event in history if event["source"] == str(target)] == ["refused"]


@images_only
@pytest.mark.parametrize("name", ["half of a squashfs", "another OS", "a dangling link"])
def test_its_good_successor_of_the_same_name_is_applied(service: Service, name: str) -> None:
    target = service.versions / "web_1.4.raw"
    BAD[name][0](target)
    service.logged("web_1.4.raw")
    service.place.bring(service.place.confext("1.4"), target)
    service.reloaded("1.4")


@images_only
def test_nothing_is_said_twice(service: Service) -> None:
    service.put("1.4").write_bytes(b"bad")
    service.logged("web_1.4.raw refused: no squashfs, erofs, ext4 or btrfs image")
    for version in ("1.1", "1.2"):
        service.put(version)
        service.reloaded(version)
    (service.versions / "web_1.4.raw").write_bytes(b"worse")
    service.logged("web_1.4.raw refused: no squashfs, erofs, ext4 or btrfs image")
    service.put("1.3")
    service.reloaded("1.3")
    assert len([line for line in service.log_lines() if "web_1.4.raw refused" in line]) == 2


@images_only
@pytest.mark.parametrize("name", ["web_1.4.img", "web_1.4.raw.xz", "web-1.4.raw", "web_1.4", "web_1 4.raw"])
def test_a_name_that_is_wrong_is_told_about(service: Service, name: str) -> None:
    service.place.bring(service.place.confext("1.4"), service.versions / name)
    service.logged(name, "passed over|ignored|not called")
    service.put("1.5")
    service.reloaded("1.5")
    assert service.heard == ["1.5"]


@images_only
@pytest.mark.parametrize(
    "name", [".web_1.4.raw.Xa81b", "web_1.4.raw.part", "web_1.4.raw~", "web_1.4.raw.filepart"]
)
def test_a_leftover_of_an_upload_is_not_looked_at(service: Service, name: str) -> None:
    (service.versions / name).write_bytes(b"not an image")
    service.put("1.5")
    service.reloaded("1.5")
    assert not [line for line in service.log_lines() if name in line]


@images_only
def test_a_file_where_a_directory_of_versions_should_be(service: Service) -> None:
    entry = service.drops / "xyz.raw.v"
    entry.write_bytes(b"")
    service.logged("xyz.raw.v: ignored: not a directory")
    entry.unlink()
    entry.mkdir()
    service.logged("xyz.raw.v: nothing in it yet that is called xyz_VERSION.raw")
    service.put("1", name="xyz", at=entry)
    service.logged("xyz 1 added")


@images_only
def test_a_directory_where_an_image_should_be(service: Service) -> None:
    (service.drops / "xyz.raw").mkdir()
    service.logged("xyz.raw: ignored: a directory, no image", r"xyz\.raw\.v/")
    service.put("1.5")
    service.reloaded("1.5")


TREES: dict[str, tuple[Make, str]] = {
    "no release directory": (
        lambda root: shutil.rmtree(root / "etc/extension-release.d"),
        "incomplete: there is no etc/extension-release.d/extension-release.* in it yet",
    ),
    "empty": (
        lambda root: shutil.rmtree(root / "etc"),
        "incomplete: there is no etc/extension-release.d/extension-release.* in it yet",
    ),
    "two release files that do not fit": (
        lambda root: release(root, "a", "b"),
        "has extension-release.a, extension-release.b, but must have",
    ),
    "a FIFO": (lambda root: os.mkfifo(root / "etc/pipe"), "refused: etc/pipe in it is a FIFO: remove it"),
    "what hides for some only": (
        lambda root: os.setxattr(root / "etc/extension-release.d", "user.overlay.opaque", b"y"),
        "etc/extension-release.d in it has the extended attribute user.overlay.opaque, which hides something in",
    ),
    "etc is a link": (
        lambda root: ((root / "etc").rename(root / "real"), (root / "etc").symlink_to("real")),
        "refused: not a confext: etc in it is a link",
    ),
    "another OS": (
        lambda root: (root / "etc/extension-release.d/extension-release.web").write_text("ID=plan9\n"),
        "refused: made for ID=plan9, and here it is ID=",
    ),
    "a release file that is a link": (
        lambda root: shell(
            "mv {0}/extension-release.web {0}/x; ln -s x {0}/extension-release.web",
            root / "etc/extension-release.d",
        ),
        "extension-release.web in it is a link",
    ),
}


@trees_only
@pytest.mark.parametrize(("spoil", "words"), TREES.values(), ids=TREES)
def test_a_bad_tree_is_one_line_and_nothing_else(service: Service, spoil: Make, words: str) -> None:
    place = service.place
    value = service.etc("web.conf").read_text()
    aside = place.path / f"aside-{next(place.numbers)}"
    place.bring(tree("web_1.4", "1.4"), aside)
    spoil(aside)
    aside.rename(service.versions / "web_1.4")
    line = service.logged("web_1.4 (refused|incomplete)", words)
    assert service.etc("web.conf").read_text() == value
    service.put("1.5")
    service.reloaded("1.5")
    assert service.heard == ["1.5"]
    assert [one for one in service.log_lines() if "web_1.4 " in one.split(" message_id=")[0]] == [line]


@images_only
def test_two_release_files_of_which_both_fit(service: Service) -> None:
    """By `user.extension-release.strict=false` any name fits."""

    def change(root: Path) -> None:
        release(root, "one", "two")
        for name in ("one", "two"):
            path = root / f"etc/extension-release.d/extension-release.{name}"
            os.setxattr(path, "user.extension-release.strict", b"0")

    built(change)(service.versions / "web_1.4.raw")
    service.logged("web_1.4.raw refused: has 2 extension-release files that fit it, one is allowed")


@images_only
@pytest.mark.parametrize("options", [("-nopad",), ("-nopad", "-comp", "zstd")])
def test_a_squashfs_without_padding_is_said_to_be_one(service: Service, options: tuple[str, ...]) -> None:
    """The kernel reads it in blocks of 1024 bytes, of which the last is not whole."""
    built(lambda root: (root / "etc/more").write_bytes(os.urandom(1001)), *options)(
        service.versions / "web_1.4.raw"
    )
    assert (service.versions / "web_1.4.raw").stat().st_size % 1024
    service.logged("web_1.4.raw incomplete", "-nopad")


@images_only
def test_a_squashfs_cut_within_its_padding_is_incomplete(service: Service) -> None:
    target = service.versions / "web_1.4.raw"
    content = good()
    used = struct.unpack_from("<Q", content, 40)[0]
    target.write_bytes(content[:used])
    service.logged(f"web_1.4.raw incomplete: {used} of ")
    with open(target, "ab") as upload:
        upload.write(content[used:])
    service.reloaded("1.4")


def test_too_large_for_imagemax(place: Place) -> None:
    limit = 60 if place.trees else 30  # files and directories count in whole blocks
    place.configure("SettleSec=20ms", f"ImageMax={limit}K")
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    path = place.path / "large"
    place.bring(place.confext("1.4", os.urandom(50_000).hex()), path)
    path.rename(service.versions / f"web_1.4{place.suffix}")
    service.logged(f"web_1.4.* refused: too large: [0-9]+ bytes, {limit * 1024} are allowed .ImageMax=")
    service.put("1.5")
    service.reloaded("1.5")


def test_the_store_is_full(place: Place) -> None:
    """Older stacks are let go of; what is on the way waits for as long as it must."""
    limit = 100 if place.trees else 55
    place.configure("SettleSec=20ms", f"StoreMax={limit}K", "KeepStacks=1")
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    for number in range(2):
        service.put("7", name=f"other{number}", at=service.drops)
    service.logged(
        f"has to wait, it is tried again by itself: the store is full: .* of {limit * 1024} bytes .StoreMax="
    )
    assert service.has("1.4")
    place.configure("SettleSec=20ms", "StoreMax=200K")
    assert place.daemon is not None
    place.daemon.send(1)
    service.logged("other1 7 added")


@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_more_layers_than_overlayfs_takes(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    service.put("1.3")
    service.reloaded("1.3")
    aside = place.path / "aside"
    aside.mkdir()
    for number in range(498):
        confext(aside / f"{number:03}", f"{number:03}", {f"etc/{number:03}": b""})
    fresh = place.path / "fresh"
    shutil.copytree(service.drops, fresh, symlinks=True)
    for tree_ in sorted(aside.iterdir()):
        (fresh / tree_.name).symlink_to(tree_)
    service.drops.rename(place.path / "old")
    fresh.rename(service.drops)
    line = service.logged("one too many: 499 layers, and 498 are allowed; all stays as it is")
    assert "level=warning" in line
    assert service.has("1.3")
    time.sleep(AFTERGLOW_USEC / 1e6)  # else its end would speak against the image
    service.stop()
    place.services.remove(service)
    again = place.start(name="web.service")
    assert again.heard == ["1.3"]
    (service.drops / "000").unlink()
    again.reloaded("1.3")
    assert again.etc("497").exists()


@tool("mksquashfs")
@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_an_image_that_nobody_here_may_mount(place: Place) -> None:
    """In a user namespace: trees only."""
    place.start_daemon()
    service = place.start()
    place.bring(image("xyz", "1", name="xyz"), service.drops / "xyz.raw")
    line = service.logged("xyz.raw (refused|has to wait)")
    assert "images need root of the host, a user namespace has directories only" in line
    service.put("1.3")
    service.reloaded("1.3")
